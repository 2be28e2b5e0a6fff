"""verify finds planted errors, lets rounding pass, and leaves everything as it was."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vi_ext.compiled.arguments import Arguments
from pyro_vi_ext.compiled.program import Program
from pyro_vi_ext.compiled.refusal import CannotCompile
from pyro_vi_ext.compiled.stock_pass import StockPass
from pyro_vi_ext.compiled.verification import _apart, verify

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)
OPTIMS = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.03}),
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.9}),
    "sgd": lambda: pyro.optim.SGD({"lr": 0.03}),
    "outer": lambda: pyro.optim.RMSprop({"lr": 0.03}),
}


class Made:
    """A program of a pair with a buffer, run operation by operation, a few steps on."""

    def __init__(self, optim="adam", dtype=torch.float64):
        torch.set_default_dtype(dtype)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.factor = 1.0  # a state of Python, baked into the graph
        self.average, self.args = Average(), (X.to(dtype).clone(),)
        stock = StockPass(self.model, self.guide, Trace_ELBO().loss_and_grads)
        self.optim, self.arguments = OPTIMS[optim](), Arguments(self.args, {})
        self.leaves = stock.find_leaves(self.args, {})
        self.program = Program(stock, self.arguments, self.optim, "eager", self.leaves)
        self.program.compile()
        self.code = self.program._step
        if self.program.optimizer:
            for _ in range(3):
                self.program.step(self.arguments.tensors)
                self.program.optimizer.after_steps(1)

    def model(self, x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m.sum(), 1.0), obs=x)

    def guide(self, x):
        loc = pyro.param("loc", torch.tensor([0.4, -0.3]))
        log_scale = pyro.param("log_scale", torch.tensor(-1.0))
        self.average(x)
        m = pyro.sample("m", dist.Normal(self.factor * loc, log_scale.exp()).to_event(1))
        pyro.sample("n", dist.Normal(m.sum(), 1.0), infer={"is_auxiliary": True})

    def verify(self):
        verify(self.program, self.args, {}, self.arguments.tensors)

    def plant(self, wrong):
        """Code that calls ``wrong(code, *inputs)`` instead of the code."""
        code = self.code
        self.program._step = lambda *inputs: wrong(code, *inputs)

    def number_of(self, tensor):
        """Which of the inputs of the code a tensor is."""
        return [k for k, t in enumerate(self.program.graph.inputs) if t is tensor][0]


class Average(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([1.0, 2.0]))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.mean())
        self.count.add_(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("optim", OPTIMS)
def test_a_right_step_passes(optim, dtype):
    made = Made(optim, dtype)
    for _ in range(3):
        made.verify()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("optim", OPTIMS)
def test_rounding_passes(optim, dtype):
    made = Made(optim, dtype)
    few = 4 * torch.finfo(dtype).eps

    def rounded(code, *inputs):
        out = code(*inputs)
        for tensor in inputs[1:]:
            if tensor.is_floating_point():
                tensor.mul_(1 + few)
        return tuple(t * (1 + few) if t.is_floating_point() else t for t in out)

    made.plant(rounded)
    made.verify()


def message(made):
    with pytest.raises(CannotCompile, match="does not do what a plain one does") as caught:
        made.verify()
    return str(caught.value)


def test_a_wrong_loss():
    made = Made()

    def wrong(code, *inputs):
        losses, finite = code(*inputs)
        return losses * (1 + 1e-6), finite

    made.plant(wrong)
    assert "the loss is" in message(made)


def test_a_wrong_gradient_without_an_optimizer():
    made = Made("outer")

    def wrong(code, *inputs):
        losses, finite, first, *rest = code(*inputs)
        return losses, finite, first * (1 + 1e-6), *rest

    made.plant(wrong)
    assert "a gradient of shape" in message(made)


@pytest.mark.parametrize("optim", ["adam", "clipped"])
@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_a_wrong_moment(optim, moment):
    made = Made(optim)
    leaf = made.leaves["loc"]
    place = made.number_of(made.optim.optim_objs[leaf].state[leaf][moment])

    def wrong(code, *inputs):
        out = code(*inputs)
        inputs[place].mul_(1 + 1e-6)
        return out

    made.plant(wrong)
    assert "the optimizer's state" in message(made)


@pytest.mark.parametrize("optim", ["adam", "clipped", "sgd"])
@pytest.mark.parametrize("share", [0.0, 0.9, 1.1, -1.0])
def test_a_wrong_update(optim, share):
    """Of another length than the plain one, or in the other direction."""
    made = Made(optim)
    place = made.number_of(made.leaves["loc"])

    def wrong(code, *inputs):
        before = inputs[place].clone()
        out = code(*inputs)
        inputs[place].copy_(before + share * (inputs[place] - before))
        return out

    made.plant(wrong)
    assert "parameter 'loc'" in message(made)


def test_a_gradient_that_is_slightly_wrong_where_no_moment_shows_it():
    made = Made("sgd")
    place = made.number_of(made.leaves["loc"])

    def wrong(code, *inputs):
        before = inputs[place].clone()
        out = code(*inputs)
        inputs[place].copy_(before + 1.01 * (inputs[place] - before))
        return out

    made.plant(wrong)
    assert "parameter 'loc'" in message(made)


def test_a_count_that_is_not_kept():
    made = Made("adam")
    leaf = made.leaves["loc"]
    place = made.number_of(made.optim.optim_objs[leaf].state[leaf]["step"])

    def wrong(code, *inputs):
        out = code(*inputs)
        inputs[place].sub_(1)
        return out

    made.plant(wrong)
    assert "the optimizer's state" in message(made)


def test_a_count_of_python_that_is_not_kept(monkeypatch):
    made = Made("clipped")
    monkeypatch.setattr(made.program.optimizer, "after_steps", lambda steps: None)
    assert "counts and rates" in message(made)


@pytest.mark.parametrize("name", ["mean", "count"])
def test_a_buffer_that_is_not_updated(name):
    made = Made()
    place = made.number_of(getattr(made.average, name))

    def wrong(code, *inputs):
        inputs = list(inputs)
        inputs[place] = inputs[place].clone()
        return code(*inputs)

    made.plant(wrong)
    assert f"average.{name}' has other values" in message(made)


def test_a_buffer_that_only_plain_steps_write():
    """Which the graph does not even read."""
    made = Made()
    made.average.register_buffer("late", torch.zeros(2))
    made.average.register_forward_hook(lambda module, *_: module.late.add_(1.0))
    assert "average.late' has other values" in message(made)


def test_another_order_of_draws():
    made = Made()

    def wrong(code, *inputs):
        torch.rand(())
        return code(*inputs)

    made.plant(wrong)
    message(made)


def test_draws_too_many_at_the_end():
    """The step is right, and every one after it is not what the seed would give."""
    made = Made()

    def wrong(code, *inputs):
        out = code(*inputs)
        torch.rand(())
        return out

    made.plant(wrong)
    message(made)


def test_a_state_of_python_that_has_changed():
    made = Made()
    made.verify()
    made.factor = 1.01
    assert "state of Python" in message(made)
    made.factor = 1.0
    made.verify()


def test_one_difference_of_three_is_let_pass():
    """A draw that rounding decides is another once; an error is one always."""
    made, calls = Made(), []

    def wrong(code, *inputs):
        losses, finite = code(*inputs)
        calls.append(1)
        return (losses * 2 if len(calls) in wrong_calls else losses), finite

    made.plant(wrong)
    wrong_calls = {1}
    made.verify()
    assert len(calls) == 3
    calls.clear()
    wrong_calls = {1, 3}
    message(made)


def test_where_plain_steps_have_no_answer_there_is_nothing_to_compare():
    made = Made()
    made.args[0].fill_(torch.nan)
    with pyro.validation_enabled(False):
        made.verify()


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(optim, fails):
    made = Made(optim)
    if fails:
        made.factor = 1.5
    for k, leaf in enumerate(made.leaves.values()):
        leaf.grad = torch.full_like(leaf, 3.0) if k else None

    def stand():
        state = made.program.optimizer
        tensors = [*made.leaves.values(), *made.average.buffers(), *(state.kept if state else [])]
        tensors += [torch.get_rng_state(), *[g for g in grads() if g is not None]]
        values = [tensor.detach().clone() for tensor in tensors]
        host = state.host_state() if state else None
        return values, (host, random.getstate(), np.random.get_state()[1].tolist())

    def grads():
        return [leaf.grad for leaf in made.leaves.values()]

    before, gradients = stand(), grads()
    entries = {name: id(leaf) for name, leaf in pyro.get_param_store()._params.items()}
    if fails:
        message(made)
    else:
        made.verify()
    after = stand()
    assert all(map(torch.equal, before[0], after[0])) and before[1] == after[1]
    assert all(a is b for a, b in zip(gradients, grads(), strict=True))
    assert entries == {name: id(leaf) for name, leaf in pyro.get_param_store()._params.items()}
    if made.program.optimizer:  # and the next step is that of a program that was not compared
        made.factor = 1.0
        assert made.program.optimizer.current()


def test_an_outer_optimizer_is_not_stepped():
    made = Made("outer")
    made.verify()
    assert not any(optimizer.state for optimizer in made.optim.optim_objs.values())


def test_apart():
    inf, nan = float("inf"), float("nan")
    t = torch.tensor
    assert not _apart(t([1.0, 2.0]), t([1.0, 2.0 + 1e-10]), 1e-9, None)
    assert _apart(t([1.0, 2.0]), t([1.0, 2.0 + 1e-8]), 1e-9, None)
    assert not _apart(t([1.0, 2.0]), t([1.0, 2.0 + 1e-8]), 1e-9, t(1e-9))
    assert not _apart(t([inf, 1.0]), t([inf, 1.0]), 1e-9, None)
    assert _apart(t([1.0, 1.0]), t([inf, 1.0]), 1e-9, None)
    assert not _apart(t([nan, 1.0]), t([nan, 1.0]), 1e-9, None)
    assert _apart(t([nan, 1.0]), t([1.0, 1.0]), 1e-9, None)
