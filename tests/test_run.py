"""Running a pair: its structure is found once, without side effects; bad numbers name the site."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_vi_ext import SemiImplicitELBO
from pyro_vi_ext.run import Structure

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
