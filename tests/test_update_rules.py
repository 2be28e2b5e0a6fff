"""update_rule against the optimizers themselves, and against closed forms."""

import pyro
import pytest
import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import SGD, Adam, AdamW
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from pyro_vi_ext.compiled.update_rules import initial_slots, update_rule

pytestmark = pytest.mark.usefixtures("float64")

STEPS, CHANGE = 200, 100  # the learning rate is cut to 0.3 of itself after CHANGE steps
SHAPES = [(), (3,), (2, 3)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
CASES = {
    "adam": (Adam, {"lr": 0.03}, None),
    "adam options": (
        Adam,
        {"lr": 0.03, "betas": (0.7, 0.9), "eps": 0.1, "weight_decay": 0.2},
        None,
    ),
    "adam one beta": (Adam, {"lr": 0.03, "betas": (0.0, 0.99)}, None),
    "adam decoupled": (
        Adam,
        {"lr": 0.03, "weight_decay": 0.5, "decoupled_weight_decay": True},
        None,
    ),
    "adam foreach": (Adam, {"lr": 0.03, "weight_decay": 0.2, "foreach": True}, None),
    "adam fused": (Adam, {"lr": 0.03, "weight_decay": 0.2, "fused": True}, None),
    "adam norm": (Adam, {"lr": 0.03, "eps": 0.1}, {"clip_norm": 1.0}),
    "adam value": (Adam, {"lr": 0.03, "eps": 0.1}, {"clip_value": 0.5}),
    "adam norm, value": (Adam, {"lr": 0.03, "eps": 0.1}, {"clip_norm": 1.0, "clip_value": 0.4}),
    "adamw": (AdamW, {"lr": 0.03}, None),
    "adamw options": (AdamW, {"lr": 0.03, "weight_decay": 0.5, "betas": (0.8, 0.95)}, None),
    "sgd": (SGD, {"lr": 0.03}, None),
    "sgd decay": (SGD, {"lr": 0.03, "weight_decay": 0.2, "dampening": 0.3}, None),
    "momentum": (SGD, {"lr": 0.03, "momentum": 0.9}, None),
    "nesterov": (
        SGD,
        {"lr": 0.03, "momentum": 0.9, "nesterov": True, "weight_decay": 0.2},
        {"clip_norm": 1.0, "clip_value": 0.4},
    ),
    "momentum foreach": (SGD, {"lr": 0.03, "momentum": 0.9, "foreach": True}, None),
    "momentum fused": (SGD, {"lr": 0.03, "momentum": 0.9, "fused": True}, None),
    "clipped": (ClippedAdam, {"lr": 0.03}, None),
    "clipped options": (
        ClippedAdam,
        {"lr": 0.03, "clip_norm": 0.6, "weight_decay": 0.2, "lrd": 0.999, "betas": (0.7, 0.9)},
        None,
    ),
    "clipped centred": (ClippedAdam, {"lr": 0.03, "lrd": 0.99, "centered_variance": True}, None),
    "clipped eps": (ClippedAdam, {"lr": 0.03, "eps": 0.1}, {"clip_norm": 1.0}),
}
every_case = pytest.mark.parametrize("case", CASES)


def problem(shape, dtype):
    """A start, and a seeded gradient for each step, with a mean that does not vanish."""
    generator = torch.Generator().manual_seed(len(shape))
    start, noise = (torch.randn(n, *shape, generator=generator) for n in (1, STEPS))
    return start[0].to(dtype), (0.3 + noise).to(dtype)


def make_rule(case, start):
    optimizer_type, options, clip = CASES[case]
    optimizer = optimizer_type([start], **options)
    return update_rule(optimizer, optimizer.param_groups[0], clip)


def by_optimizer(case, start, grads):
    """The parameter of a param store, and its state, after the steps of a PyroOptim."""
    optimizer_type, options, clip = CASES[case]
    pyro.clear_param_store()
    p = pyro.param("p", start.clone()).unconstrained()
    optim = PyroOptim(optimizer_type, options, clip)
    for t, grad in enumerate(grads):
        if t == CHANGE:
            optim.optim_objs[p].param_groups[0]["lr"] *= 0.3
        p.grad = grad.clone()
        optim([p])
    return p.detach(), optim.optim_objs[p]


def by_rule(case, start, grads, count_from=1, decays=True, apply=None):
    """The same by the rule; the keyword arguments plant errors, or another ``apply``."""
    rule = make_rule(case, start)
    p, slots, lr = start.clone(), initial_slots(rule, start), CASES[case][1]["lr"]
    for t, grad in enumerate(grads):
        if t == CHANGE:
            lr *= 0.3
        lr *= rule.decay if decays else 1.0
        numbers = torch.tensor([t + count_from, lr], dtype=torch.float64)
        (apply or rule.step)(p, grad, slots, *numbers)
    return p, slots


def agree(actual, expected):
    """Equal to the tolerance of the dtype, relative to the largest element."""
    same_kind = actual.dtype == expected.dtype and actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    return same_kind and bool(error <= TOLERANCE[expected.dtype])


# --- the numbers of the optimizers ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_case
def test_the_steps_of_the_optimizer(case, shape, dtype):
    start, grads = problem(shape, dtype)
    p, slots = by_rule(case, start, grads)
    expected, optimizer = by_optimizer(case, start, grads)
    rule, (state,) = make_rule(case, start), optimizer.state.values() or [{}]

    assert agree(p, expected)
    assert set(state) == {*rule.slots, *({"step"} if rule.counts else ())}
    for name, slot in zip(rule.slots, slots, strict=True):
        assert agree(slot, state[name])
    kinds = {"tensor": torch.Tensor, "int": int, None: type(None)}
    assert isinstance(state.get("step"), kinds[rule.counts])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_case
def test_a_traced_step_is_the_same(case, shape):
    start, grads = problem(shape, torch.float64)
    rule = make_rule(case, start)

    def apply(p, grad, slots, step, lr):
        rule.step(p, grad, slots, step, lr)

    numbers = torch.ones(2, dtype=torch.float64)
    graph = make_fx(apply, tracing_mode="fake")(
        start.clone(), grads[0], initial_slots(rule, start), *numbers
    )
    assert not any(node.op == "get_attr" for node in graph.graph.nodes)  # nothing is baked in
    p, slots = by_rule(case, start, grads)
    traced_p, traced_slots = by_rule(case, start, grads, apply=graph)
    for actual, expected in zip([traced_p, *traced_slots], [p, *slots], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["adam", "adamw", "clipped options"])
def test_the_comparison_rejects_a_wrong_count(case):
    start, grads = problem((3,), torch.float64)
    expected, _ = by_optimizer(case, start, grads)
    assert agree(by_rule(case, start, grads)[0], expected)
    assert not agree(by_rule(case, start, grads, count_from=2)[0], expected)


@pytest.mark.parametrize("case", ["clipped options", "clipped centred"])
def test_the_comparison_rejects_a_missing_decay(case):
    start, grads = problem((3,), torch.float64)
    expected, _ = by_optimizer(case, start, grads)
    assert not agree(by_rule(case, start, grads, decays=False)[0], expected)


@pytest.mark.parametrize("clip", [None, {}, {"clip_norm": 2.0}, {"clip_value": 0.4}], ids=str)
def test_the_comparison_rejects_another_clipping(clip, monkeypatch):
    start, grads = problem((3,), torch.float64)
    expected, _ = by_optimizer("adam norm, value", start, grads)
    monkeypatch.setitem(CASES, "adam norm, value", (*CASES["adam norm, value"][:2], clip))
    assert not agree(by_rule("adam norm, value", start, grads)[0], expected)


def test_a_schedule_of_the_learning_rate():
    start, grads = problem((3,), torch.float64)
    p = start.clone().requires_grad_()
    optimizer = Adam([p], lr=0.03)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
    rule = update_rule(optimizer, optimizer.param_groups[0])
    q, slots = start.clone(), initial_slots(rule, start)
    for t, grad in enumerate(grads, start=1):
        lr = optimizer.param_groups[0]["lr"]
        rule.step(q, grad, slots, *torch.tensor([t, lr], dtype=torch.float64))
        p.grad = grad
        optimizer.step()
        schedule.step()
    assert agree(q, p.detach())


# --- closed forms --------------------------------------------------------------------------------


def constant_gradient(case):
    start, g = torch.tensor([[0.7, -1.1], [2.0, -0.5]])
    return start, g, by_rule(case, start, g.expand(CHANGE, 2))[0]


def test_adam_along_a_constant_gradient():
    start, g, p = constant_gradient("adam")  # m / (1 - beta1^t) is g, v / (1 - beta2^t) is g^2
    torch.testing.assert_close(p, start - CHANGE * 0.03 * g / (g.abs() + 1e-8), rtol=1e-10, atol=0)


def test_adamw_along_a_constant_gradient():
    start, g, p = constant_gradient("adamw options")  # p <- (1 - a) p - lr u, to -u lr / a
    shrink, fixed_point = 1 - 0.03 * 0.5, -g / (g.abs() + 1e-8) / 0.5
    exact = fixed_point + shrink**CHANGE * (start - fixed_point)
    torch.testing.assert_close(p, exact, rtol=1e-10, atol=0)


def test_momentum_along_a_constant_gradient():
    start, g, p = constant_gradient("momentum")  # b_t = g (1 - mu^t) / (1 - mu)
    total = (CHANGE - 0.9 * (1 - 0.9**CHANGE) / 0.1) / 0.1
    torch.testing.assert_close(p, start - 0.03 * total * g, rtol=1e-10, atol=0)


# --- what a step leaves alone --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@every_case
def test_a_step_writes_the_leaf_and_nothing_else(case, dtype):
    start, grads = problem((), dtype)
    p, grad = torch.nn.Parameter(start.clone()), grads[0].clone()
    rule = make_rule(case, start)
    slots = initial_slots(rule, p)
    assert not any(slot.requires_grad for slot in slots)
    step, lr = torch.tensor([1.0, 0.03], dtype=torch.float64)
    assert rule.step(p, grad, slots, step, lr) is None
    assert p.is_leaf and p.requires_grad and p.grad is None and p.dtype == dtype
    assert p.item() != start.item()
    assert (grad.item(), step.item(), lr.item()) == (grads[0].item(), 1.0, 0.03)


def test_slots_are_laid_out_like_the_parameter():
    p = torch.randn(4, 3).T
    (slot,) = initial_slots(make_rule("momentum", p), p)
    assert slot.stride() == p.stride() and not slot.any()


# --- refusals ------------------------------------------------------------------------------------


class MyAdam(Adam):
    pass


class MyClippedAdam(ClippedAdam):
    pass


@pytest.mark.parametrize(
    "optimizer_type, options",
    [
        (torch.optim.RMSprop, {}),
        (torch.optim.NAdam, {}),
        (MyAdam, {}),
        (MyClippedAdam, {}),
        (Adam, {"amsgrad": True}),
        (Adam, {"maximize": True}),
        (Adam, {"capturable": True}),
        (Adam, {"differentiable": True}),
        (Adam, {"lr": torch.tensor(0.1)}),
        (Adam, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}),
        (AdamW, {"amsgrad": True}),
        (SGD, {"lr": torch.tensor(0.1)}),
        (SGD, {"lr": 0.1, "weight_decay": torch.tensor(0.1)}),
        (SGD, {"lr": 0.1, "maximize": True}),
        (SGD, {"lr": 0.1, "differentiable": True}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
        (ClippedAdam, {"lr": torch.tensor(0.1)}),
        (ClippedAdam, {"clip_norm": torch.tensor(0.1)}),
    ],
    ids=str,
)
def test_steps_that_cannot_be_written(optimizer_type, options):
    p = torch.zeros(3, requires_grad=True)
    optimizer = optimizer_type([p], **options)
    assert update_rule(optimizer, optimizer.param_groups[0]) is None


@pytest.mark.parametrize("clip", [{"clip": 1.0}, {"clip_norm": torch.tensor(1.0)}], ids=str)
def test_clippings_that_are_not_known(clip):
    optimizer = Adam([torch.zeros(3)])
    assert update_rule(optimizer, optimizer.param_groups[0], clip) is None


@pytest.mark.parametrize("optimizer_type", [Adam, AdamW, SGD, ClippedAdam])
def test_options_that_are_not_known(optimizer_type):
    optimizer = optimizer_type([torch.zeros(3)], lr=0.1)
    group = optimizer.param_groups[0]
    assert update_rule(optimizer, group) is not None
    assert update_rule(optimizer, {**group, "warmup": 10}) is None
    del group["weight_decay"]
    assert update_rule(optimizer, group) is None


def test_a_schedule_of_the_momentum_is_not_known():
    optimizer = Adam([torch.zeros(3)])
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    assert update_rule(optimizer, optimizer.param_groups[0]) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64], ids=str)
def test_other_dtypes(dtype):
    optimizer = Adam([torch.zeros(3, dtype=dtype)])
    assert update_rule(optimizer, optimizer.param_groups[0]) is None


@pytest.mark.parametrize(
    "register",
    [
        lambda optimizer: optimizer.register_step_pre_hook,
        lambda optimizer: optimizer.register_step_post_hook,
        lambda _: register_optimizer_step_pre_hook,
        lambda _: register_optimizer_step_post_hook,
    ],
)
def test_hooks_around_the_step(register):
    optimizer = Adam([torch.zeros(3)])
    handle = register(optimizer)(lambda *_: None)
    try:
        assert update_rule(optimizer, optimizer.param_groups[0]) is None
    finally:
        handle.remove()
    assert update_rule(optimizer, optimizer.param_groups[0]) is not None
