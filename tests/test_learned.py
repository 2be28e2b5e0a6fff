"""Learned parts of an objective: trained by the user's optimizer, never mixed up silently."""

import gc

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_vi_ext.learned import register_learned
from pyro_vi_ext.objective import Estimate, Objective
from pyro_vi_ext.scoring import linear_bound, pair_terms


class WithBaseline(Objective):
    """The ELBO plus the loss of a network that has nothing to do with it."""

    def __init__(self, width=3, name="WithBaseline"):
        super().__init__()
        self.net, self.name = nn.Linear(1, width), name

    def estimate(self, run):
        net = register_learned(self, self.name, self.net)
        scored = pair_terms(run, run.pairs[0])
        loss = -linear_bound([*scored.model, *scored.guide.values()], run)
        extra = net(torch.ones(1)).square().sum()
        return Estimate(loss, surrogate=loss + extra)


def model():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def guide():
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 1.0))


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    torch.manual_seed(0)


def size(objective):
    return objective.net(torch.ones(1)).square().sum().item()


def test_svi_trains_the_learned_part():
    objective = WithBaseline()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)
    before = size(objective)
    for _ in range(30):
        svi.step()
    assert size(objective) < 0.5 * before
    assert any(name.startswith("WithBaseline$$$") for name in pyro.get_param_store())


def test_learned_part_is_among_the_parameters():
    objective = WithBaseline()
    module = objective(model, guide)
    module()
    leaves = {id(p) for p in module.parameters()}
    assert {id(p) for p in objective.net.parameters()} <= leaves
    assert id(pyro.param("loc").unconstrained()) in leaves and len(leaves) == 3


def test_the_loss_is_not_the_surrogate():
    objective = WithBaseline()
    torch.manual_seed(1)
    loss = objective.loss(model, guide)
    torch.manual_seed(1)
    assert objective.differentiable_loss(model, guide).item() == pytest.approx(loss)


def test_two_live_objectives_of_one_name_are_refused():
    first, second = WithBaseline(), WithBaseline()
    first.loss(model, guide)
    with pytest.raises(ValueError, match="Two live objects.*'WithBaseline'"):
        second.loss(model, guide)
    WithBaseline(name="other").loss(model, guide)
    pyro.clear_param_store()
    second.loss(model, guide)


def test_another_shape_under_the_same_name_is_refused():
    first = WithBaseline(3)
    first.loss(model, guide)
    del first
    gc.collect()
    with pytest.raises(ValueError, match=r"shape \(3, 1\), which has shape \(4, 1\) here"):
        WithBaseline(4).loss(model, guide)


def test_stored_parameters_are_taken_over():
    first = WithBaseline()
    first.loss(model, guide)
    weight = first.net.weight.detach().clone()
    del first
    gc.collect()
    second = WithBaseline()
    second.loss(model, guide)
    assert torch.equal(second.net.weight, weight)
    assert second.net.weight is pyro.get_param_store()._params["WithBaseline$$$weight"]
