"""A loss, gradient, parameter or value that is not finite is traced to where it comes from."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader

from pyro_vi_ext.checkpoint import load_checkpoint
from pyro_vi_ext.training import fit

from .fitting import DATA, adam, assert_same, clear, guide, make_svi, model, parameters

pytestmark = pytest.mark.usefixtures("float64")


def with_nan(*where):
    x = DATA.clone()
    x[list(where)] = math.nan
    return x


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("kind", ["svi", "module"])
def test_nan_data_name_the_site(kind, validate, tmp_path):
    batches = DataLoader(torch.stack([DATA, DATA, with_nan(1, 2)]), batch_size=None)
    options = {"num_steps": 9, "checkpoint": tmp_path / "a", "checkpoint_every": 1}
    target, before = make_svi(), []
    if kind == "module":
        target, options["optimizer"] = Trace_ELBO()(model, AutoNormal(model)), adam
    options["callback"] = lambda *_: before.append(parameters())
    with pyro.validation_enabled(validate):
        with pytest.raises(ValueError, match=r"step 3 of fit(.|\n)*site 'x' \(2 of 10 entries\)"):
            fit(target, batches, **options)
    assert len(before) == 2
    assert_same(parameters(), before[-1])
    assert load_checkpoint(tmp_path / "a")["step"] == 2


def test_masked_nan_data_are_not_blamed():
    def masked(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=~x.isnan()):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(math.nan))

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError) as raised:
            fit(make_svi(masked), with_nan(0), num_steps=2)
    assert "'y'" in str(raised.value) and "'x'" not in str(raised.value)


def test_a_value_that_is_not_finite_names_its_site():
    def wild(x):
        guide(x)
        b = pyro.sample("b", dist.Bernoulli(0.5).to_event(0), infer={"is_auxiliary": True})
        pyro.sample("loc2", dist.Normal(torch.where(b > 0, torch.log(-b), b), 1.0))

    def model2(x):
        model(x)
        pyro.sample("loc2", dist.Normal(0.0, 1.0))

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="value of site 'loc2' in the guide") as raised:
            fit(make_svi(model2, wild), DATA, num_steps=50)
    assert "'x'" not in str(raised.value)


def test_the_step_that_failed_is_looked_at_with_its_own_draws():
    def rarely(x):
        guide(x)
        u = pyro.sample("u", dist.Uniform(0.0, 1.0))
        pyro.sample("v", dist.Normal(torch.where(u < 0.003, math.nan, u), 1.0))

    def model2(x):
        model(x)
        pyro.sample("u", dist.Uniform(0.0, 1.0))
        pyro.sample("v", dist.Normal(0.0, 1.0))

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="value of site 'v' in the guide"):
            fit(make_svi(model2, rarely), DATA, num_steps=2000)


@pytest.mark.parametrize("kind", ["svi", "module"])
def test_a_parameter_that_is_not_finite_is_named(kind):
    auto = AutoNormal(model)
    auto(DATA)
    with torch.no_grad():
        auto.scales.loc_unconstrained.fill_(math.nan)
    target, options = make_svi(guide=auto), {}
    if kind == "module":
        target, options = Trace_ELBO()(model, auto), {"optimizer": adam}
    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="step 1 of fit.*parameter '.*scales.loc"):
            fit(target, DATA, num_steps=5, **options)


@pytest.mark.parametrize("kind", ["svi", "module"])
def test_a_gradient_that_is_not_finite_names_its_parameter(kind):
    class Root(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.edge = torch.nn.Parameter(torch.tensor(0.0))
            self.good = torch.nn.Parameter(torch.tensor(0.0))

        def forward(self, x):
            pyro.sample("loc", dist.Normal(self.good + self.edge.abs().sqrt(), 1.0))

    root = Root()
    target, options = make_svi(guide=root), {}
    if kind == "module":
        target, options = Trace_ELBO()(model, root), {"optimizer": adam}
    with pytest.raises(ValueError, match="loss is finite, the gradient of.*edge' is not"):
        fit(target, DATA, num_steps=5, **options)
    assert root.edge == 0.0 and root.good == 0.0


def test_large_finite_gradients_are_no_error():
    class Large(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.full((2,), 0.1, dtype=torch.float32))

        def forward(self):
            return (self.p * 3e38).sum()  # the norm of the gradient overflows

    target = Large()
    result = fit(target, num_steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=1e-39))
    assert result.num_steps == 2 and target.p.grad is None


def test_own_steps_cannot_keep_the_parameters_and_the_error_does_not_say_so():
    class Own(SVI):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    svi = Own(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="observed site 'x'") as raised:
            fit(svi, with_nan(1), num_steps=2)
    assert "still those" not in str(raised.value)


def test_errors_of_the_objective_get_the_step_and_others_pass():
    def failing(error):
        def broken(x):
            if pyro.param("mean") < 0.0:
                raise error
            guide(x)

        pyro.param("mean", torch.tensor(0.1))
        return make_svi(guide=broken, optim=pyro.optim.SGD({"lr": 1.0}))

    cause = ValueError("site 'q' has K < 2")
    with pytest.raises(ValueError, match=r"At step \d+ of fit: site 'q' has K < 2") as raised:
        fit(failing(cause), DATA - 10.0, num_steps=50)
    assert str(raised.value.__cause__).startswith("site 'q' has K < 2")
    clear()

    class Special(ValueError):
        pass

    with pytest.raises(Special):
        fit(failing(Special("mine")), DATA - 10.0, num_steps=50)
