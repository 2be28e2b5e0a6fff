"""Running a pair: one subsample a step, and every structural mistake named."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_vi_ext import SemiImplicitELBO
from pyro_vi_ext.tracing import Structure

AUXILIARY = {"is_auxiliary": True}
X = torch.arange(8.0, dtype=torch.float64)


pytestmark = pytest.mark.usefixtures("float64")


def model():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def raises(match, model, guide, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match):
        SemiImplicitELBO(**kwargs).loss(model, guide, *args)


# --- plate nesting -----------------------------------------------------------------------------


def nested(x):
    with pyro.plate("columns", 2, dim=-2), pyro.plate("rows", len(x), dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_plate_nesting_is_found_and_kept_per_pair():
    objective = SemiImplicitELBO(3)
    assert objective._structure(nested, nested, (X,), {}).max_plate_nesting == 2
    assert objective._structure(model, model, (), {}).max_plate_nesting == 0
    objective.loss(nested, nested, X)
    objective.loss(model, model)
    objective.loss(nested, nested, X)


def test_given_plate_nesting_is_used():
    objective = SemiImplicitELBO(3, max_plate_nesting=4)
    assert objective._structure(model, model, (), {}).max_plate_nesting == 4
    run = objective._run(model, model, (), {})
    assert run.pairs[0].guide.nodes["z"]["value"].shape == (3, 1, 1, 1, 1)


def test_set_up_creates_parameters_but_consumes_no_randomness():
    def guide():
        loc = pyro.param("loc", lambda: torch.randn(()))
        pyro.sample("z", dist.Normal(loc, 1.0))

    state = torch.get_rng_state()
    Structure.of(model, guide, (), {})
    assert torch.equal(torch.get_rng_state(), state)
    assert "loc" in pyro.get_param_store()


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


# --- mistakes ----------------------------------------------------------------------------------


def test_extra_guide_site_that_is_not_auxiliary():
    def guide():
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(noise, 1.0))

    raises("'noise' is not in the model.*is_auxiliary", model, guide)


def test_latent_missing_from_the_guide():
    raises("Latent site 'z' of the model is not in the guide", model, lambda: None)


def test_auxiliary_site_that_is_a_latent():
    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0), infer=AUXILIARY)

    raises("'z' is marked auxiliary but is a latent", model, guide)


def test_observed_site_in_the_guide():
    def guide():
        model()
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    raises("'y' is observed: a guide", model, guide)


def test_guide_site_that_the_model_observes():
    def observing():
        pyro.sample("z", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    raises("'z' is observed in the model", observing, model)


def test_plate_of_another_dim_or_size():
    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def plated(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pyro.validation_enabled(False):
        raises("'z' plate 'data' has dim -2 .* elsewhere dim -1", plated, guide, X)


def test_plate_subsampled_in_the_guide_only():
    def guide(x):
        with pyro.plate("other", len(x), subsample_size=3, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def plated(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    raises("Plate 'other' is subsampled .3 of 8. in the guide but", plated, guide, X)


def test_unplated_batch_is_refused():
    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    def batched():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    raises('"z", invalid log_prob shape', batched, guide)


def test_shape_that_does_not_match_the_plate():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    raises("plate.'data'. at site z", guide, guide, X)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("validate", [True, False])
def test_bad_data_name_the_site(bad, validate):
    def observing(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    x = X.clone()
    x[3] = bad
    with pyro.validation_enabled(validate):
        raises("'y'", observing, lambda x: model(), x)
        with pytest.raises(ValueError, match="'y'"):
            SemiImplicitELBO().loss_and_grads(observing, lambda x: model(), x)


def test_infinite_log_probability_names_the_site():
    def bounded():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(z.abs() < 9, -torch.inf, 0.0))

    raises("site 'wall' in the model is NaN or inf", bounded, model)


def test_conditioned_and_blocked_models_work():
    def two():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        model()

    objective = SemiImplicitELBO(3)
    conditioned = poutine.condition(two, {"a": torch.tensor(0.0)})
    log_p = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0)).item()
    assert -objective.loss(conditioned, model) == pytest.approx(log_p)
