"""A program: what it takes for granted, what it reports, and what its calls return."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vi_ext.compiled.arguments import Arguments
from pyro_vi_ext.compiled.program import Program
from pyro_vi_ext.compiled.stock_pass import StockPass

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 0.5), obs=x)


class Guide(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.power = 2.0
        self.register_buffer("shift", torch.tensor(0.1))

    def forward(self, x):
        pyro.module("guide", self)
        scale = pyro.param("scale", lambda: torch.tensor(0.5), constraint=dist.constraints.positive)
        mean = self.net(x.mean().unsqueeze(-1)).squeeze(-1) + self.shift**self.power
        pyro.sample("loc", dist.Normal(mean, scale))


def make(optim=None):
    guide = Guide()
    stock = StockPass(model, guide, Trace_ELBO().loss_and_grads)
    optim = pyro.optim.Adam({"lr": 0.1}) if optim is None else optim
    leaves = stock.find_leaves((X,), {})
    return Program(stock, Arguments((X,), {}), optim, "eager", leaves), guide


def test_a_step_changes_leaves_and_counts():
    program, _ = make()
    before = [leaf.detach().clone() for leaf in program.updated]
    losses, finite = program.step([X])
    assert losses.shape == (1,) and losses.dtype == torch.float64 and bool(finite)
    for leaf, old in zip(program.updated, before, strict=True):
        # Adam's first step has the length of the learning rate
        torch.testing.assert_close((leaf - old).abs(), torch.full_like(old, 0.1), rtol=1e-6, atol=0)
    steps = [program.optim.optim_objs[leaf].state[leaf]["step"] for leaf in program.updated]
    assert [step.item() for step in steps] == [1.0] * len(steps)


def test_gradients_are_those_of_the_pass():
    program, _ = make(pyro.optim.RMSprop({"lr": 0.1}))
    assert program.optimizer is None
    torch.manual_seed(4)
    losses, finite, gradients = program.gradients([X])
    torch.manual_seed(4)
    loss = Trace_ELBO().loss_and_grads(program.stock.model, program.stock.guide, X)
    assert losses.tolist() == [loss] and bool(finite)
    assert all(
        torch.equal(leaf.grad, g) for leaf, g in zip(program.updated, gradients, strict=True)
    )


def test_it_reports_what_it_cost():
    program, _ = make()
    program.compile()
    assert program.trace_seconds > 0 and program.compile_seconds >= 0
    assert program.num_operations > 50 and program.num_steps == 0
    assert not program.has_loop  # that is for Inductor


def replace_entry(program, guide):
    pyro.get_param_store()["scale"] = torch.tensor(0.7)


def clear_store(program, guide):
    pyro.clear_param_store()


def freeze(program, guide):
    guide.net.weight.requires_grad_(False)


def other_shape(program, guide):
    guide.shift = torch.tensor([0.2])


def other_dtype(program, guide):
    guide.net.float()


def replace_layer(program, guide):
    guide.net = nn.Linear(1, 1)


def attribute(program, guide):
    guide.power = 3.0


def cleared_state(program, guide):
    program.optim.optim_objs[guide.net.weight].state.clear()


def replace_weight(program, guide):
    guide.net.weight = nn.Parameter(torch.ones(1, 1))


def other_betas(program, guide):
    program.optim.optim_objs[guide.net.weight].param_groups[0]["betas"] = (0.5, 0.9)


def other_state(program, guide):
    optimizer = program.optim.optim_objs[guide.net.weight]
    optimizer.load_state_dict(optimizer.state_dict())


REASONS = {
    replace_entry: "replaced in the store",
    clear_store: "replaced in the store",
    freeze: "requires_grad",
    other_shape: "'shift' of a module",
    other_dtype: "data of another kind",
    replace_weight: "'weight' of a module",
    replace_layer: "'net' of a module",
    attribute: "attribute 'power'",
    other_betas: "hyperparameters",
    other_state: "another state",
    cleared_state: "another state",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_why_stale(change):
    program, guide = make()
    assert program.why_stale() is None
    program.step([X])
    guide.net.weight.data.mul_(2)  # values are free
    guide.shift.add_(1)
    program.optim.optim_objs[guide.net.weight].param_groups[0]["lr"] = 0.01
    assert program.why_stale() is None
    change(program, guide)
    assert REASONS[change] in program.why_stale()


def replace_buffer(guide):
    guide.shift = torch.tensor(0.9)


def move_buffer(guide):
    guide.shift.data = torch.tensor(0.9)


def move_weight(guide):
    guide.net.weight.data = torch.tensor([[5.0]])


@pytest.mark.parametrize("change", [replace_buffer, move_buffer, move_weight])
def test_tensors_of_one_kind_are_followed(change):
    program, guide = make(pyro.optim.RMSprop({"lr": 0.1}))
    change(guide)
    assert program.why_stale() is None
    torch.manual_seed(4)
    losses, _, _ = program.gradients([X])
    torch.manual_seed(4)
    assert losses.tolist() == [Trace_ELBO().loss_and_grads(model, guide, X)]


def test_an_argument_in_the_memory_of_a_parameter_is_copied():
    def use(x):
        net = pyro.module("guide", guide)
        loc = pyro.sample("loc", dist.Normal(net.net.weight.sum() * x.detach().sum(), 1.0))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(0.3))

    guide = Guide()
    x = guide.net.weight
    stock = StockPass(use, lambda x: guide(X), Trace_ELBO().loss_and_grads)
    leaves = stock.find_leaves((x.detach(),), {})
    optim = pyro.optim.Adam({"lr": 0.1})
    program = Program(stock, Arguments((x.detach(),), {}), optim, "eager", leaves)
    (copied,) = program._apart([x.detach()])
    assert torch.equal(copied, x) and copied.data_ptr() != x.data_ptr()
    other = torch.ones(1, 1)
    assert program._apart([other])[0] is other


def test_a_constant_that_was_read_is_watched():
    limit = torch.tensor(2)

    def reading(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        for _ in range(limit.item()):
            loc = loc + 1
        pyro.sample("x", dist.Normal(loc, 1.0).expand([3]).to_event(1), obs=x)

    guide = Guide()
    stock = StockPass(reading, guide, Trace_ELBO().loss_and_grads)
    leaves = stock.find_leaves((X,), {})
    program = Program(stock, Arguments((X,), {}), None, "eager", leaves)
    assert program.why_stale() is None
    limit.add_(1)
    assert "constant" in program.why_stale()


def test_a_leaf_with_two_names_is_updated_once():
    shared = nn.Linear(1, 1)

    def guide(x):
        pyro.module("a", shared)
        pyro.module("b", shared)
        pyro.sample("loc", dist.Normal(shared(x[:1]).squeeze(-1), 0.5))

    with poutine.block():
        stock = StockPass(model, guide, Trace_ELBO().loss_and_grads)
        leaves = stock.find_leaves((X,), {})
    optim = pyro.optim.Adam({"lr": 0.1})
    program = Program(stock, Arguments((X,), {}), optim, "eager", leaves)
    assert len(program.entries) == 4 and len(program.updated) == 2
    assert len({id(leaf) for leaf in program.updated}) == 2
