"""The stock pass: the unmodified call, the leaves it uses, what finding them leaves behind."""

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import ReweightedWakeSleep, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_vi_ext import ImportanceWeightedELBO, TraceRELAX_ELBO
from pyro_vi_ext.compiled.stock_pass import StockPass, leaves_of

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)


def model(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def guide(x):
    loc = pyro.param("loc", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    pyro.param("unused", torch.ones(2))
    pyro.sample("m", dist.Normal(loc, scale))


def normalised():
    net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))

    def with_net(x):
        pyro.module("net", net)
        loc, scale = net(x.unsqueeze(-1)).mean(0)
        pyro.sample("m", dist.Normal(loc, scale.exp()))

    return net, with_net


def test_the_pass_is_the_stock_call():
    stock = StockPass(model, guide, Trace_ELBO().loss_and_grads)
    leaves = stock.find_leaves((X,), {})
    pyro.set_rng_seed(1)
    ours, gradients = stock(X), [leaf.grad for leaf in leaves.values()]
    for leaf in leaves.values():
        leaf.grad = None
    pyro.set_rng_seed(1)
    assert ours == Trace_ELBO().loss_and_grads(model, guide, X)
    for gradient, leaf in zip(gradients, leaves.values(), strict=True):
        assert (gradient is None) == (leaf.grad is None)
        assert gradient is None or torch.equal(gradient, leaf.grad)


@pytest.mark.parametrize("loss", [Trace_ELBO(), ImportanceWeightedELBO(num_particles=3)])
def test_the_symbolic_pass_is_the_stock_pass(loss):
    stock = StockPass(model, guide, loss.loss_and_grads)
    leaves = stock.find_leaves((X,), {})
    found = []
    for run in (stock, stock.symbolic):
        pyro.set_rng_seed(1)
        found.append([float(run(X)), *(leaves[name].grad.clone() for name in ("loc", "scale"))])
        for leaf in leaves.values():
            leaf.grad = None
    assert found[0] == found[1] and any(g != 0 for g in found[0][1:])


def test_our_objectives_do_not_look_at_a_loss_that_is_not_finite():
    stock = StockPass(model, guide, ImportanceWeightedELBO(num_particles=3).loss_and_grads)
    stock.find_leaves((X,), {})
    bad = X * torch.nan
    with pyro.validation_enabled(False):
        assert stock.symbolic(bad).isnan()
        with pytest.raises(ValueError, match="x"):
            stock(bad)


def test_an_objective_with_a_step_of_its_own_is_called():
    class Own(ImportanceWeightedELBO):
        def loss_and_grads(self, *args, **kwargs):
            return torch.tensor(7.0)

    assert StockPass(model, guide, Own(num_particles=2).loss_and_grads).symbolic(X) == 7.0


def test_a_loss_function_without_an_owner():
    def loss_and_grads(model, guide, *args):
        return functools.partial(Trace_ELBO().loss_and_grads, model, guide)(*args)

    stock = StockPass(model, guide, loss_and_grads)
    assert stock.owner is None and set(stock.find_leaves((X,), {})) == {"loc", "scale", "unused"}
    assert isinstance(stock.symbolic(X), float)


def test_several_losses_stay_several():
    loss = ReweightedWakeSleep(num_particles=2, vectorize_particles=False)
    stock = StockPass(model, guide, loss.loss_and_grads)
    assert len(stock(X)) == 2


# --- leaves --------------------------------------------------------------------------------------


def test_leaves_are_unconstrained_and_the_stores_own():
    leaves = StockPass(model, guide, Trace_ELBO().loss_and_grads).find_leaves((X,), {})
    stored = dict(pyro.get_param_store().named_parameters())
    assert leaves.keys() == stored.keys() == {"loc", "scale", "unused"}
    assert all(leaves[name] is stored[name] for name in leaves)
    assert leaves["scale"] == torch.tensor(2.0).log()
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves.values())


def test_leaves_of_a_trace():
    with poutine.trace(param_only=True) as captured:
        guide(X)
    store = dict(pyro.get_param_store().named_parameters())
    found = leaves_of(captured)
    assert found.keys() == store.keys() and all(found[n] is store[n] for n in found)


def test_leaves_of_modules_and_autoguides():
    net, with_net = normalised()
    stock = StockPass(model, with_net, Trace_ELBO().loss_and_grads)
    leaves = stock.find_leaves((X,), {})
    assert {id(leaf) for leaf in leaves.values()} == {id(p) for p in net.parameters()}
    assert stock.modules == {"guide.net": net} and set(stock.all_modules()) == set(net.modules())
    auto = AutoNormal(model)
    leaves = StockPass(model, auto, Trace_ELBO().loss_and_grads).find_leaves((X,), {})
    assert {id(leaf) for leaf in leaves.values()} == {id(p) for p in auto.parameters()}


def test_learned_parts_of_an_objective_are_leaves():
    def coins(x):
        pyro.sample("k", dist.Bernoulli(0.3))

    def coin_guide(x):
        pyro.sample("k", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1))))

    stock = StockPass(coins, coin_guide, TraceRELAX_ELBO().loss_and_grads)
    leaves = stock.find_leaves((X,), {})
    learned = {id(p) for module in stock.modules.values() for p in module.parameters()}
    learned |= {id(p) for _, p in pyro.get_param_store().named_parameters()}
    assert "logit" in leaves and len(leaves) > 1
    assert {id(leaf) for leaf in leaves.values()} <= learned


# --- what finding them leaves behind -------------------------------------------------------------


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("fails", [False, True])
def test_finding_leaves_changes_nothing_but_the_store(fails):
    net, with_net = normalised()
    bystander = pyro.param("bystander", torch.ones(2))
    bystander.grad = torch.full((2,), 3.0)
    net[0].weight.grad = torch.ones(2, 1)
    kept = net[0].weight.grad
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    before, states = [p.detach().clone() for p in net.parameters()], random_states()

    def noisy(x):
        np.random.rand()
        model(x)
        if fails:
            raise KeyError("model")

    stock = StockPass(noisy, with_net, Trace_ELBO().loss_and_grads)
    pyro.module("net", net)  # no parameter is new
    if fails:
        with pytest.raises(KeyError):
            stock.find_leaves((X,), {})
    else:
        assert len(stock.find_leaves((X,), {})) == 4
    assert random_states() == states and net[0].weight.grad is kept and (kept == 1.0).all()
    assert all(p.grad is None for p in list(net.parameters())[1:])
    assert torch.equal(bystander.grad, torch.full((2,), 3.0))
    assert all(map(torch.equal, before, net.parameters()))
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_draws_that_made_a_parameter_do_not_come_again():
    def drawn(x):
        start = pyro.param("start", lambda: torch.randn(()))
        pyro.sample("m", dist.Normal(start, 1.0))

    stock = StockPass(model, drawn, Trace_ELBO().loss_and_grads)
    pyro.set_rng_seed(3)
    leaves = stock.find_leaves((X,), {})
    assert torch.randn(()) != leaves["start"]
    after = random_states()
    assert stock.find_leaves((X,), {})["start"] is leaves["start"] and random_states() == after


def test_finding_leaves_puts_a_replaced_buffer_back():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor(1.0))

        def forward(self, x):
            model(x)
            self.mean = 0.5 * self.mean

    replacing = Model()
    buffer = replacing.mean
    StockPass(replacing, guide, Trace_ELBO().loss_and_grads).find_leaves((X,), {})
    assert replacing.mean is buffer and buffer == 1.0
