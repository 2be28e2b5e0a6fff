"""The step and the loop as graphs, run operation by operation, beside plain SVI."""

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO
from torch import nn

from pyro_vi_ext.compiled.arguments import Arguments
from pyro_vi_ext.compiled.capture import capture
from pyro_vi_ext.compiled.optimizer_state import OptimizerState
from pyro_vi_ext.compiled.step_graph import LOOP_STEPS, loop_graph, step_graph
from pyro_vi_ext.compiled.stock_pass import StockPass

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)
OPTIMS = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.03}),
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.9}),
    "momentum": lambda: pyro.optim.SGD({"lr": 0.03, "momentum": 0.9}),
}


class Made:
    """A pair with a buffer that counts and one that averages, its graph, and its optimizer."""

    def __init__(self, optim="adam", loss=None, x=X, idle=False, outer=False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.net = nn.BatchNorm1d(1)
        nn.init.constant_(self.net.bias, 0.3)  # its gradient is not zero, so no sign of rounding
        self.optim, self.x = OPTIMS[optim](), x
        self.loss = loss or Trace_ELBO()
        stock = StockPass(self.model, self.guide, self.loss.loss_and_grads)
        self.leaves = stock.find_leaves((x,), {})
        arguments = Arguments((x,), {})
        self.capture = capture(stock.symbolic, self.leaves, arguments, {"net": self.net})
        self.trained = [self.leaves[name] for name in self.capture.trained]
        self.updated = [*self.trained, *([self.leaves["idle"]] if idle else [])]
        self.state = None if outer else OptimizerState.of(self.optim, self.updated)
        self.graph = step_graph(self.capture, arguments.tensors, self.state, self.updated)
        self._loop = None

    def model(self, x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(self, x):
        pyro.module("net", self.net)
        log_scale = pyro.param("log_scale", torch.tensor(-1.0))
        pyro.param("idle", torch.ones(2))
        loc = self.net(x.unsqueeze(-1)).square().mean()
        pyro.sample("m", dist.Normal(loc, log_scale.exp()))

    def step(self, x=None):
        if self.state:
            self.state.before_steps()
        with torch.no_grad():
            inputs = [t.detach() for t in self.graph.inputs[1:]]
            out = self.graph.graph(self.x if x is None else x, *inputs)
        if self.state:
            self.state.after_steps(int(out[1]))
        return out

    def loop(self, count, x=None):
        self._loop = self._loop or loop_graph(self.graph)
        self.state.before_steps()
        with torch.no_grad():
            inputs = [t.detach() for t in self._loop.inputs[2:]]
            losses, number, finite = self._loop.graph(
                torch.tensor(count), self.x if x is None else x, *inputs
            )
        begun = int(number)
        self.state.after_steps(begun if finite else begun - 1)
        return losses, begun, bool(finite)

    def tensors(self):
        """Copies of parameters, buffers and the state of the optimizer."""
        kept = [
            *self.leaves.values(),
            *self.net.buffers(),
            *(self.state.kept if self.state else ()),
        ]
        return [tensor.detach().clone() for tensor in kept]

    def host(self):
        return self.state.host_state()


def by_svi(steps, optim="adam", loss=None):
    """Losses, parameters and buffers of plain SVI, and its optimizer."""
    made = Made(optim, loss)
    optimizer = OPTIMS[optim]()
    svi = SVI(made.model, made.guide, optimizer, made.loss)
    pyro.set_rng_seed(7)
    losses = [svi.step(made.x) for _ in range(steps)]
    return losses, [*made.leaves.values(), *made.net.buffers()]


@pytest.mark.parametrize("optim", OPTIMS)
def test_steps_are_those_of_svi(optim):
    expected, expected_tensors = by_svi(20, optim)
    made = Made(optim)
    pyro.set_rng_seed(7)
    rows = [made.step() for _ in range(20)]
    assert all(bool(finite) and losses.shape == (1,) for losses, finite in rows)
    losses = torch.stack([row[0][0] for row in rows])
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-12, atol=0)
    for ours, tensor in zip(made.tensors(), expected_tensors, strict=False):
        torch.testing.assert_close(ours, tensor.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_loop_is_its_steps(optim):
    single, together = Made(optim), None
    pyro.set_rng_seed(7)
    losses = torch.stack([single.step()[0] for _ in range(6)])
    together = Made(optim)
    pyro.set_rng_seed(7)
    ours, begun, finite = together.loop(6)
    assert (begun, finite) == (6, True) and ours.shape == (LOOP_STEPS, 1)
    assert torch.equal(ours[:6], losses) and not ours[6:].any()
    assert all(map(torch.equal, together.tensors(), single.tensors()))
    assert together.host() == single.host()
    pyro.set_rng_seed(8)
    again, _, _ = together.loop(2)  # where it has stopped
    pyro.set_rng_seed(8)
    assert torch.equal(again[:2], torch.stack([single.step()[0] for _ in range(2)]))
    assert all(map(torch.equal, together.tensors(), single.tensors()))


def test_a_loop_of_no_steps():
    made = Made()
    before = made.tensors()
    losses, begun, finite = made.loop(0)
    assert (begun, finite) == (0, True) and not losses.any()
    assert all(map(torch.equal, before, made.tensors()))


def test_several_losses():
    loss = ReweightedWakeSleep(num_particles=2, vectorize_particles=False)
    expected, _ = by_svi(3, loss=loss)
    made = Made(loss=loss)
    pyro.set_rng_seed(7)
    losses, begun, _ = made.loop(3)
    assert made.graph.num_losses == 2 and losses.shape == (LOOP_STEPS, 2)
    torch.testing.assert_close(losses[:3], torch.tensor(expected), rtol=1e-12, atol=0)


# --- what it reads and writes --------------------------------------------------------------------


def test_what_is_written_is_known():
    made = Made()
    written = {id(made.graph.inputs[k]) for k in made.graph.mutated}
    counts, rates = made.state.internal
    expected = [*made.trained, *made.net.buffers(), *made.state.kept]
    assert written - {id(counts), id(rates)} == {id(t) for t in expected}
    assert made.graph.mutated == sorted(set(made.graph.mutated))
    assert id(made.x) not in written


def test_what_is_written_is_all_that_changes():
    made = Made()
    made.state.before_steps()
    before = [t.detach().clone() for t in made.graph.inputs[1:]]
    made.step()
    changed = {
        k
        for k, (a, b) in enumerate(zip(before, made.graph.inputs[1:], strict=True), start=1)
        if not torch.equal(a, b)
    }
    assert changed and changed <= set(made.graph.mutated)


def test_new_arguments_and_rates_are_read():
    made = Made("momentum")
    pyro.set_rng_seed(7)
    first, _ = made.step()
    for leaf in made.trained:
        made.optim.optim_objs[leaf].param_groups[0]["lr"] = 0.0
    before = [leaf.detach().clone() for leaf in made.trained]
    pyro.set_rng_seed(7)
    second, _ = made.step(X + 1.0)
    assert first != second
    assert all(map(torch.equal, before, made.trained))


def test_without_an_optimizer():
    made = Made(outer=True)
    before = [leaf.detach().clone() for leaf in made.leaves.values()]
    pyro.set_rng_seed(7)
    losses, finite, *gradients = made.step()
    assert finite and losses.shape == (1,) and all(map(torch.equal, before, made.leaves.values()))
    made = Made(outer=True)
    pyro.set_rng_seed(7)
    assert made.loss.loss_and_grads(made.model, made.guide, X) == losses.item()
    for gradient, leaf in zip(gradients, made.trained, strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-14)


def test_a_leaf_without_gradient_moves_as_if_it_were_zero():
    """As in Pyro, where the gradient of an earlier step stays, as zeros."""
    made = Made("momentum", idle=True)
    leaf = made.leaves["idle"]
    entry = made.optim.optim_objs[leaf].state[leaf]
    entry["momentum_buffer"].fill_(1.0)
    made.step()
    torch.testing.assert_close(leaf.detach(), torch.full((2,), 1.0 - 0.03 * 0.9))
    assert (entry["momentum_buffer"] == 0.9).all()


# --- steps that are not finite -------------------------------------------------------------------


class Hostile(Made):
    """A loss that is not finite where ``x`` is not; at 0 only its gradient is not."""

    def model(self, x):
        super().model(X)
        slope = pyro.param("slope", torch.ones(()))
        pyro.factor("root", -(slope - slope.detach() + x.sum()).sqrt())


@pytest.mark.parametrize("x", [torch.inf, -torch.inf, torch.nan, 0.0], ids=str)
def test_a_step_that_is_not_finite_changes_no_parameter(x):
    for optim in OPTIMS:
        made = Hostile(optim, x=torch.ones(3))
        made.step()
        made.state.before_steps()
        leaves = [t.detach().clone() for t in made.leaves.values()]
        kept, host = [t.clone() for t in made.state.tensors], made.host()
        losses, finite = made.step(torch.full((3,), x))
        assert not finite and losses.isfinite() == (x == 0.0)
        assert all(map(torch.equal, leaves, made.leaves.values()))
        assert all(map(torch.equal, kept, made.state.tensors)) and made.host() == host
        _, finite = made.step()
        assert finite and any(
            not torch.equal(a, b) for a, b in zip(leaves, made.leaves.values(), strict=True)
        )


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_loop_stops_at_a_step_that_is_not_finite(optim):
    """After so many steps as a parameter needs to the edge of where its logarithm is defined."""

    class Downhill(Made):
        def model(self, x):
            super().model(x)
            left = pyro.param("left", torch.tensor(0.1))
            pyro.factor("edge", left.log().detach() - 0.2 * left)

    single, together = Downhill(optim), Downhill(optim)
    pyro.set_rng_seed(7)
    rows = []
    while not rows or rows[-1][1]:
        rows.append(single.step())
    assert 2 < len(rows) < 40
    pyro.set_rng_seed(7)
    losses, begun, finite = together.loop(100)
    assert (begun, finite) == (len(rows), False)
    expected = torch.stack([row[0] for row in rows])
    assert torch.equal(losses[: begun - 1], expected[:-1]) and losses[begun - 1].isnan()
    assert not losses[begun:].any()
    assert all(map(torch.equal, together.tensors(), single.tensors()))
    assert together.host() == single.host()
