"""The base class: what subclasses inherit, and the module's parameters."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn
from torch.distributions import constraints

from pyro_vi_ext import SemiImplicitELBO
from pyro_vi_ext.objective import Estimate, Objective, positive_int
from pyro_vi_ext.scoring import linear_bound, pair_terms


class Doubled(Objective):
    """An objective whose gradient is not that of its loss: twice the ELBO's."""

    def estimate(self, run):
        terms = []
        for pair in run.pairs:
            scored = pair_terms(run, pair)
            terms += [*scored.model, *scored.guide.values()]
        loss = -linear_bound(terms, run)
        return Estimate(loss, surrogate=2 * loss, terms=terms)


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    torch.manual_seed(0)


def model():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def guide():
    loc = pyro.param("loc", lambda: torch.tensor(1.5))
    scale = pyro.param("scale", lambda: torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


def gradients(objective):
    module = objective(model, guide)
    module()
    torch.manual_seed(7)
    loss = module()
    return loss.item(), torch.autograd.grad(loss, list(module.parameters()))


def test_value_of_the_loss_gradient_of_the_surrogate():
    loss, doubled = gradients(Doubled(5))
    expected, plain = gradients(SemiImplicitELBO(5))
    assert loss == pytest.approx(expected)
    for a, b in zip(doubled, plain, strict=True):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.parametrize("vectorize", [True, False])
def test_linear_bound_is_the_mean_over_particles(vectorize):
    objective = Doubled(7, vectorize_particles=vectorize)
    run = objective._run(model, guide, (), {})
    values = torch.cat([pair.guide.nodes["z"]["value"].reshape(-1) for pair in run.pairs])
    assert values.shape == (7,)
    expected = dist.Normal(0.0, 1.0).log_prob(values) - dist.Normal(1.5, 0.5).log_prob(values)
    torch.testing.assert_close(-objective.estimate(run).loss, expected.mean())


def test_parameters_are_the_unconstrained_leaves_under_their_names():
    module = SemiImplicitELBO()(model, guide)
    assert list(module.parameters()) == []
    module()
    named = dict(module.named_parameters())
    assert set(named) == {"loc", "scale"}
    assert named["scale"] is pyro.param("scale").unconstrained()


def test_parameters_follow_the_store_when_it_is_cleared():
    module = SemiImplicitELBO()(model, guide)
    module()
    pyro.clear_param_store()
    module()
    (loc, _) = module.parameters()
    assert loc is pyro.param("loc").unconstrained()


def test_parameters_of_later_calls_are_found():
    def growing(more):
        guide()
        if more:
            pyro.param("extra", lambda: torch.tensor(0.0))

    module = SemiImplicitELBO()(lambda more: model(), growing)
    module(False)
    assert len(list(module.parameters())) == 2
    module(True)
    assert len(list(module.parameters())) == 3


def test_local_parameters_of_modules():
    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 1)
            self.scale = pyro.nn.PyroParam(torch.tensor(0.5), constraints.positive)

        def forward(self):
            pyro.sample("z", dist.Normal(self.net(torch.ones(1)).squeeze(-1), self.scale))

    with pyro.settings.context(module_local_params=True):
        guides = Guide(), Guide()
        leaves = []
        for g in guides:
            module = SemiImplicitELBO(3)(model, g)
            module().backward()
            assert len(list(module.parameters())) == 3
            leaves += [id(p) for p in module.parameters()]
        assert len(set(leaves)) == 6
    assert len(pyro.get_param_store()) == 0


def test_stock_settings_are_understood():
    objective = SemiImplicitELBO(4, max_plate_nesting=2, vectorize_particles=False)
    assert objective.num_particles == 4 and not objective.vectorize_particles


def test_one_objective_serves_many_pairs():
    objective = SemiImplicitELBO(2)
    for i in range(20):
        objective.loss(model, lambda i=i: guide())
    assert len(objective._structures) <= 8


def test_nan_loss_is_an_error_before_the_parameters_move():
    def broken():
        scale = pyro.param("scale", lambda: torch.tensor(0.5))
        pyro.sample("z", dist.Normal(0.0, scale))
        pyro.factor("bad", (scale - scale) / 0.0, has_rsample=True)

    svi = SVI(model, broken, pyro.optim.SGD({"lr": 0.1}), SemiImplicitELBO())
    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="'bad' in the guide is NaN"):
            svi.step()
    assert pyro.param("scale").item() == 0.5


def test_discrete_structure_changes_between_calls():
    """Roles are looked up by the sites a run has, so an optional site is no problem."""

    def optional(noise):
        loc = torch.tensor(0.0)
        if noise:
            loc = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(loc, 1.0))

    objective = SemiImplicitELBO(100, 50)
    assert objective.loss(lambda noise: model(), optional, False) == pytest.approx(0.0)
    assert objective.loss(lambda noise: model(), optional, True) > 0.01


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_positive_int(value):
    with pytest.raises(ValueError, match="count must be an integer >= 1"):
        positive_int("count", value)
