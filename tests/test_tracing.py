"""One subsample a step, shared by all that is drawn."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalizingFlow

from pyro_vi_ext import ImportanceWeightedELBO, SemiImplicitELBO

AUXILIARY = {"is_auxiliary": True}
X = torch.arange(8.0, dtype=torch.float64)


pytestmark = pytest.mark.usefixtures("float64")


def model():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def raises(match, model, guide, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match):
        SemiImplicitELBO(**kwargs).loss(model, guide, *args)


# --- one subsample -----------------------------------------------------------------------------

SEEN = []


def subsampling(x, batch):
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        SEEN.append(index.clone())
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def subsampling_guide(x, batch):
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        SEEN.append(index.clone())
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer=AUXILIARY)
        pyro.sample("z", dist.Normal(x[index] + psi, 1.0))


@pytest.mark.parametrize("vectorize", [True, False])
def test_one_subsample_is_shared_by_particles_and_extra_draws(vectorize):
    objective = SemiImplicitELBO(3, 2, vectorize_particles=vectorize)
    objective.loss(subsampling, subsampling_guide, X, 3)
    SEEN.clear()
    objective.loss(subsampling, subsampling_guide, X, 3)
    first = list(SEEN)
    assert len(first) == (3 if vectorize else 3 + 3 + 3 * 2)
    assert all(torch.equal(index, first[0]) for index in first)
    SEEN.clear()
    objective.loss(subsampling, subsampling_guide, X, 3)
    assert not torch.equal(SEEN[0], first[0])  # another step, another minibatch


def test_subsample_in_the_model_only_is_shared_too():
    def guide(x, batch):
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    def hierarchical(x, batch):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=batch) as index:
            SEEN.append(index.clone())
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])

    objective = SemiImplicitELBO(3, vectorize_particles=False)
    objective.loss(hierarchical, guide, X, 3)
    SEEN.clear()
    objective.loss(hierarchical, guide, X, 3)
    assert len(SEEN) == 3 and all(torch.equal(index, SEEN[0]) for index in SEEN)


def test_autoguide_that_draws_other_indices_than_the_model_is_refused():
    def fixed(x, index):
        with pyro.plate("data", len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    index = torch.tensor([1, 5])
    raises("Plate 'data' fixes its subsample.*create_plates", fixed, AutoNormal(fixed), X, index)

    def plates(x, index):
        return pyro.plate("data", len(x), subsample=index, dim=-1)

    SemiImplicitELBO(3).loss(fixed, AutoNormal(fixed, create_plates=plates), X, index)


# --- flows that know their inverse only at their latest draw -------------------------------------


def three():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(1.0))


@pytest.mark.parametrize("flow", [transforms.planar, transforms.radial, transforms.sylvester])
@pytest.mark.parametrize("vectorize", [True, False])
def test_flows_without_an_inverse_are_scored_as_they_are_drawn(flow, vectorize):
    guide = AutoNormalizingFlow(three, flow)
    guide()
    options = dict(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=0)
    ours = ImportanceWeightedELBO(**options)
    for _ in range(2):  # the first call also checks the pair
        pyro.set_rng_seed(1)
        loss = ours.loss(three, guide)
        pyro.set_rng_seed(1)
        log_w = [stock_log_weights(guide, vectorize) for _ in range(1 if vectorize else 3)]
        expected = torch.cat(log_w).logsumexp(0) - torch.tensor(3.0).log()
        assert loss == pytest.approx(-expected.item(), rel=1e-12)
    single = SemiImplicitELBO(**options)  # linear in the log-density: Pyro's own ELBO
    pyro.set_rng_seed(2)
    loss = single.loss(three, guide)
    pyro.set_rng_seed(2)
    assert loss == pytest.approx(Trace_ELBO(**options).loss(three, guide), rel=1e-12)


def stock_log_weights(guide, vectorize):
    def in_plate(fn):
        def inside():
            with pyro.plate("particles", 3 if vectorize else 1, dim=-1):
                fn()

        return inside

    trace = pyro.poutine.trace(in_plate(guide)).get_trace()
    trace.compute_log_prob()
    model = pyro.poutine.trace(pyro.poutine.replay(in_plate(three), trace)).get_trace()
    model.compute_log_prob()
    log_p, log_q = (
        sum(site["log_prob"] for site in t.nodes.values() if "log_prob" in site)
        for t in (model, trace)
    )
    return log_p - log_q
