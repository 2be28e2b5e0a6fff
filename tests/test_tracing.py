"""One subsample a step, shared by all that is drawn."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_vi_ext import SemiImplicitELBO

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
