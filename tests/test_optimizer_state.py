"""OptimizerState beside the optimizer itself: the same steps, the same state, taken in turns."""

import copy

import pyro
import pyro.optim
import pytest
import torch
from pyro.optim import PyroOptim

from pyro_vi_ext.compiled.optimizer_state import OptimizerState, TorchOptimizer

pytestmark = pytest.mark.usefixtures("float64")

YES, NO = torch.tensor(True), torch.tensor(False)
OPTIMS = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.03}),
    "adamw": lambda: pyro.optim.AdamW({"lr": 0.03, "weight_decay": 0.5}),
    "adam, fused": lambda: pyro.optim.Adam({"lr": 0.03, "fused": True}),
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.9, "clip_norm": 0.5}),
    "sgd": lambda: pyro.optim.SGD({"lr": 0.03}),
    "momentum": lambda: pyro.optim.SGD({"lr": 0.03, "momentum": 0.9}),
    "clip": lambda: PyroOptim(torch.optim.Adam, {"lr": 0.03, "eps": 0.1}, {"clip_norm": 0.3}),
    "by name": lambda: pyro.optim.Adam(lambda name: {"lr": 0.01 if name == "a" else 0.1}),
    "schedule": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "gamma": 0.8}
    ),
    "clipped schedule": lambda: pyro.optim.StepLR(
        {
            "optimizer": pyro.optim.clipped_adam.ClippedAdam,
            "optim_args": {"lr": 0.03, "lrd": 0.95},
            "step_size": 3,
            "gamma": 0.5,
        }
    ),
}
every_optim = pytest.mark.parametrize("name", OPTIMS)


def make_leaves():
    pyro.clear_param_store()
    generator = torch.Generator().manual_seed(1)
    for name, shape in (("a", (3,)), ("b", ()), ("c", (2, 2))):
        pyro.param(name, torch.randn(shape, generator=generator))
    return [leaf for _, leaf in pyro.get_param_store().named_parameters()]


def gradients(leaves, step):
    generator = torch.Generator().manual_seed(100 + step)
    return [0.2 + torch.randn(leaf.shape, generator=generator) for leaf in leaves]


def by_graph(state, leaves, grads, finite=YES):
    """One step as a compiled one makes it."""
    state.before_steps()
    with torch.no_grad():
        state.update(leaves, grads, state.tensors, finite)
    state.after_steps(int(finite))


def by_optimizer(optim, leaves, grads):
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad.clone()
    optim(leaves)


def trained(name, plan):
    """Parameters and states after a plan of steps: "p" plain ones, "g" of a graph."""
    leaves, optim, state = make_leaves(), OPTIMS[name](), None
    for step, how in enumerate(plan):
        grads = gradients(leaves, step)
        if how == "g":
            if state is None:
                state = OptimizerState.of(optim, leaves)
            assert state.current()
            by_graph(state, leaves, grads)
        else:
            by_optimizer(optim, leaves, grads)
        if hasattr(optim, "step"):
            optim.step()
    saved = {name: copy.deepcopy(value) for name, value in optim.get_state().items()}
    return [leaf.detach().clone() for leaf in leaves], saved


def numbers(value, where=""):
    """All numbers of nested states by where they are, tensors and Python's own told apart."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {where: (type(value), value)}
    return {k: v for key, item in items for k, v in numbers(item, f"{where}.{key}").items()}


def assert_same_state(ours, expected):
    ours, expected = numbers(ours), numbers(expected)
    assert ours.keys() == expected.keys()
    for where, (kind, value) in expected.items():
        assert ours[where][0] is kind, where
        if kind is torch.Tensor:
            torch.testing.assert_close(ours[where][1], value, rtol=1e-12, atol=1e-14)
        elif kind is float:
            assert ours[where][1] == pytest.approx(value, rel=1e-14), where
        elif not callable(value):
            assert ours[where][1] == value, where


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
@pytest.mark.parametrize("plan", ["gggggggg", "ppgggpgp", "gppppppg"])
@every_optim
def test_steps_in_turns(name, plan):
    leaves, state = trained(name, plan)
    expected_leaves, expected_state = trained(name, "p" * len(plan))
    for leaf, expected in zip(leaves, expected_leaves, strict=True):
        torch.testing.assert_close(leaf, expected, rtol=1e-12, atol=1e-14)
    assert_same_state(state, expected_state)


@every_optim
def test_the_comparison_rejects_one_step_more(name):
    leaves, state = trained(name, "pppp")
    more, more_state = trained(name, "pppg" + "g")
    assert not torch.allclose(leaves[0], more[0], rtol=1e-6)
    if name != "sgd":
        with pytest.raises(AssertionError):
            assert_same_state(state, more_state)


@every_optim
def test_the_tensors_are_the_optimizers_own(name):
    leaves, optim = make_leaves(), OPTIMS[name]()
    state = OptimizerState.of(optim, leaves)
    own = [
        value
        for leaf in leaves
        for value in getattr(optim.optim_objs[leaf], "optimizer", optim.optim_objs[leaf])
        .state[leaf]
        .values()
        if isinstance(value, torch.Tensor)
    ]
    assert {id(t) for t in own} == {id(t) for t in state.kept}
    assert [id(t) for t in state.tensors] == [id(t) for t in (*state.kept, *state.internal)]
    rules = [(rule.slots, rule.counts) for rule in state.rules]
    assert len(own) == sum(len(slots) + (counts == "tensor") for slots, counts in rules)


@every_optim
def test_nothing_changes_where_a_step_is_not_finite(name):
    leaves, optim = make_leaves(), OPTIMS[name]()
    state = OptimizerState.of(optim, leaves)
    by_graph(state, leaves, gradients(leaves, 0))
    before = [t.detach().clone() for t in (*leaves, *state.tensors)], state.host_state()
    bad = [torch.full_like(leaf, torch.nan) for leaf in leaves]
    by_graph(state, leaves, bad, finite=NO)
    assert all(map(torch.equal, before[0], (*leaves, *state.tensors)))
    assert state.host_state() == before[1]
    by_graph(state, leaves, gradients(leaves, 1))
    assert not torch.equal(before[0][0], leaves[0])


def test_a_learning_rate_set_by_hand_is_used():
    leaves, optim = make_leaves(), pyro.optim.SGD({"lr": 0.5})
    state = OptimizerState.of(optim, leaves)
    by_graph(state, leaves, gradients(leaves, 0))
    before = [leaf.detach().clone() for leaf in leaves]
    for leaf, rate in zip(leaves, (0.25, 0.5, 0.0), strict=True):
        optim.optim_objs[leaf].param_groups[0]["lr"] = rate
    assert state.current()
    by_graph(state, leaves, [torch.ones_like(leaf) for leaf in leaves])
    moved = [float((b - leaf).detach().mean()) for b, leaf in zip(before, leaves, strict=True)]
    assert moved == pytest.approx([0.25, 0.5, 0.0], abs=1e-15)


def test_counts_and_rates_of_clipped_adam_are_numbers_of_python():
    leaves, optim = make_leaves(), OPTIMS["clipped"]()
    state = OptimizerState.of(optim, leaves)
    for step in range(3):
        by_graph(state, leaves, gradients(leaves, step))
    for leaf in leaves:
        optimizer = optim.optim_objs[leaf]
        assert type(optimizer.state[leaf]["step"]) is int and optimizer.state[leaf]["step"] == 3
        assert optimizer.param_groups[0]["lr"] == 0.03 * 0.9 * 0.9 * 0.9
    assert state.internal[0].tolist() == [3.0] * 3
    assert state.internal[1].tolist() == pytest.approx([0.03 * 0.9**3] * 3, rel=1e-15)


@pytest.mark.parametrize("name", ["clipped", "adam", "clipped schedule"])
def test_many_steps_at_once_are_counted_like_single_ones(name):
    """What a loop does: the graph's own numbers go on, the host's follow at the end."""
    leaves, optim = make_leaves(), OPTIMS[name]()
    state = OptimizerState.of(optim, leaves)
    state.before_steps()
    with torch.no_grad():
        for step in range(5):
            state.update(leaves, gradients(leaves, step), state.tensors, YES)
    state.after_steps(5)
    together = [leaf.detach().clone() for leaf in leaves], state.host_state()
    leaves, optim = make_leaves(), OPTIMS[name]()
    state = OptimizerState.of(optim, leaves)
    for step in range(5):
        by_graph(state, leaves, gradients(leaves, step))
    assert all(map(torch.equal, together[0], leaves)) and state.host_state() == together[1]


def test_the_host_state_comes_back():
    leaves, optim = make_leaves(), OPTIMS["clipped"]()
    state = OptimizerState.of(optim, leaves)
    by_graph(state, leaves, gradients(leaves, 0))
    saved = state.host_state()
    tensors = [t.clone() for t in (*leaves, *state.kept)]
    by_graph(state, leaves, gradients(leaves, 1))
    once = [leaf.detach().clone() for leaf in leaves]
    with torch.no_grad():
        for tensor, value in zip((*leaves, *state.kept), tensors, strict=True):
            tensor.copy_(value)
    state.set_host_state(saved)
    by_graph(state, leaves, gradients(leaves, 1))
    assert all(map(torch.equal, once, leaves))


# --- when a state is out of date -----------------------------------------------------------------


def optimizer_of(optim, leaf):
    return optim.optim_objs[leaf]


def change_betas(optimizer):
    optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def change_decay(optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0.1


def add_option(optimizer):
    optimizer.param_groups[0]["amsgrad"] = True


def load(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def clear(optimizer):
    optimizer.state.clear()


def replace_moment(optimizer):
    (entry,) = optimizer.state.values()
    entry["exp_avg"] = torch.zeros_like(entry["exp_avg"])


@pytest.mark.parametrize(
    "change", [change_betas, change_decay, add_option, load, clear, replace_moment]
)
@pytest.mark.parametrize("which", [0, 2])
def test_what_makes_a_state_out_of_date(change, which):
    leaves, optim = make_leaves(), OPTIMS["adam"]()
    state = OptimizerState.of(optim, leaves)
    by_graph(state, leaves, gradients(leaves, 0))
    assert state.current()
    change(optimizer_of(optim, leaves[which]))
    assert not state.current()


def test_a_new_state_goes_on_where_a_loaded_one_is():
    leaves, optim = make_leaves(), OPTIMS["adam"]()
    state = OptimizerState.of(optim, leaves)
    for step in range(3):
        by_graph(state, leaves, gradients(leaves, step))
    load(optimizer_of(optim, leaves[0]))
    state = OptimizerState.of(optim, leaves)
    by_graph(state, leaves, gradients(leaves, 3))
    for leaf, expected in zip(leaves, trained("adam", "pppp")[0], strict=True):
        torch.testing.assert_close(leaf.detach(), expected, rtol=1e-12, atol=1e-14)


# --- what has no state here ----------------------------------------------------------------------


class OwnOptim(PyroOptim):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: pyro.optim.RMSprop({"lr": 0.1}),
        lambda: pyro.optim.Adam({"lr": 0.1, "amsgrad": True}),
        lambda: pyro.optim.AdagradRMSProp({"eta": 0.1}),
        lambda: OwnOptim(torch.optim.Adam, {"lr": 0.1}),
        lambda: pyro.optim.Adam(lambda name: {"lr": 0.1, "amsgrad": name == "b"}),
    ],
)
def test_optimizers_that_step_by_themselves(make):
    assert OptimizerState.of(make(), make_leaves()) is None


def test_without_leaves():
    assert OptimizerState.of(OPTIMS["adam"](), []) is None


def test_a_state_that_waits_to_be_loaded():
    leaves, optim = make_leaves(), OPTIMS["adam"]()
    by_optimizer(optim, leaves, gradients(leaves, 0))
    saved, fresh = optim.get_state(), OPTIMS["adam"]()
    fresh.set_state(saved)
    state = OptimizerState.of(fresh, leaves)
    by_graph(state, leaves, gradients(leaves, 1))
    by_graph(state, leaves, gradients(leaves, 2))
    for leaf, expected in zip(leaves, trained("adam", "ppp")[0], strict=True):
        torch.testing.assert_close(leaf.detach(), expected, rtol=1e-12, atol=1e-14)


# --- optimizers of torch -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_an_optimizer_of_torch_with_groups(kind):
    found = []
    for how in ("graph", "plain"):
        leaves = make_leaves()
        groups = [{"params": leaves[:2], "lr": 0.1}, {"params": leaves[2:]}]
        optim = TorchOptimizer(kind(groups, lr=0.01))
        state = OptimizerState.of(optim, leaves) if how == "graph" else None
        for step in range(5):
            if state:
                by_graph(state, leaves, gradients(leaves, step))
            else:
                by_optimizer(optim, leaves, gradients(leaves, step))
        found.append([*(leaf.detach() for leaf in leaves)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_an_optimizer_of_torch_that_lacks_a_parameter():
    leaves = make_leaves()
    optim = TorchOptimizer(torch.optim.Adam(leaves[:2]))
    assert OptimizerState.of(optim, leaves) is None
    by_optimizer(optim, leaves[:2], gradients(leaves[:2], 0))
    with pytest.raises(ValueError, match="'c'"):
        by_optimizer(optim, leaves, gradients(leaves, 0))
