r"""One step of an optimizer on one parameter, as tensor operations that can be traced.

With the gradient :math:`g_t`, the learning rate :math:`\alpha_t` and :math:`t = 1, 2, \ldots`:

.. math::

    \text{Adam (Kingma and Ba 2015, arXiv:1412.6980):} \quad
    & m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
      v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \\
    & \theta_t = \theta_{t-1} - \alpha_t \,
      \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}, \\
    \text{AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101):} \quad
    & \theta_{t-1} \leftarrow (1 - \alpha_t \lambda) \, \theta_{t-1} \ \text{first}, \\
    \text{momentum (Sutskever et al. 2013):} \quad
    & b_t = \mu b_{t-1} + g_t, \quad \theta_t = \theta_{t-1} - \alpha_t b_t
      \quad \text{(Nesterov: } g_t + \mu b_t \text{ for } b_t).

Everywhere else a weight decay :math:`\lambda` is an L2 penalty,
:math:`g_t \leftarrow g_t + \lambda \theta_{t-1}`. Pyro's ClippedAdam first limits each element of
:math:`g_t` to :math:`[-c, c]`, adds :math:`\epsilon` to :math:`\sqrt{v_t}` before the bias is
corrected, :math:`\theta_t = \theta_{t-1} - \alpha_t \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
m_t / (\sqrt{v_t} + \epsilon)`, and with ``centered_variance`` puts :math:`(g_t - m_t)^2` into
:math:`v_t`.

The operations and their order are those of ``torch.optim`` and ``pyro.optim``, so that the numbers
are theirs. A float32 parameter is updated in float32; :math:`t`, :math:`\alpha_t` and the bias
corrections are float64, as Python's own numbers are in the originals.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

__all__ = ["UpdateRule", "initial_slots", "update_rule"]

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class UpdateRule:
    r"""The step of one optimizer on one parameter: its state, and the operations.

    .. math:: (\theta_t, s_t) = U(\theta_{t-1}, s_{t-1}, g_t, t, \alpha_t)

    with the state :math:`s_0 = 0`. Made by :func:`update_rule`.

    The numbers of a step, such as :math:`\alpha_t / (1 - \beta_1^t)`, are apart from its
    operations: whoever compiles many steps together can compute all numbers first, once.

    ``numbers(step, lr)`` makes them: float64 tensors of shape (), from float64 tensors of shape ():
    t, counted from 1, and :math:`\alpha_t`, after the decay. ``apply(param, grad, slots, numbers)``
    updates ``param`` and ``slots`` in place, under ``no_grad``. ``param``, ``grad`` and each slot
    have the same shape (any, () included), dtype (float32 or float64) and device; ``grad`` and its
    memory are left as they were. A graph traced from it does not hold the ``no_grad``: run it
    under one.

    :ivar slots: names of the state tensors of the parameter's shape, as in ``optimizer.state[p]``.
    :ivar counts: how the optimizer keeps t in ``optimizer.state[p]["step"]``: ``"tensor"`` (of
        shape ``()``, float32, or float64 where that is the default dtype; Adam and AdamW),
        ``"int"`` (ClippedAdam) or None (not at all; SGD).
    :ivar decay: the optimizer multiplies ``group["lr"]`` by this before each step (ClippedAdam's
        ``lrd``); 1.0 elsewhere. Whoever calls ``numbers`` must do so too.
    :ivar numbers: the numbers of a step.
    :ivar apply: the operations.

    References: D. P. Kingma and J. Ba, *Adam: A Method for Stochastic Optimization*, ICLR 2015,
    arXiv:1412.6980. I. Loshchilov and F. Hutter, *Decoupled Weight Decay Regularization*,
    ICLR 2019, arXiv:1711.05101. I. Sutskever, J. Martens, G. Dahl and G. Hinton, *On the
    Importance of Initialization and Momentum in Deep Learning*, ICML 2013.

    Example: Adam's first step has the length of the learning rate, whatever the gradient.

    >>> import torch
    >>> from pyro_vi_ext.compiled.update_rules import initial_slots, update_rule
    >>> p = torch.zeros(2)
    >>> adam = torch.optim.Adam([p], lr=0.1)
    >>> rule = update_rule(adam, adam.param_groups[0])
    >>> rule.slots, rule.counts, rule.decay
    (('exp_avg', 'exp_avg_sq'), 'tensor', 1.0)
    >>> step, lr = torch.tensor([1.0, 0.1], dtype=torch.float64)
    >>> rule.step(p, torch.tensor([3.0, -0.01]), initial_slots(rule, p), step, lr)
    >>> p
    tensor([-0.1000,  0.1000])
    """

    slots: tuple[str, ...]
    counts: str | None
    decay: float
    numbers: Callable[[Tensor, Tensor], list[Tensor]]
    apply: Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]], None]

    def step(self, param, grad, slots, step, lr) -> None:
        """The step number ``step`` at the learning rate ``lr``: ``apply`` with its ``numbers``."""
        self.apply(param, grad, slots, self.numbers(step, lr))


def update_rule(
    optimizer: torch.optim.Optimizer, group: dict, clip: dict | None = None
) -> UpdateRule | None:
    r"""The step of an optimizer for the parameters of one of its groups, or None.

    The options of the group, save the learning rate, are fixed in the rule: make a new one when
    they change. ``clip`` is PyroOptim's, applied to the gradient first, the norm before the value:

    .. math:: g \leftarrow g \, \min\big(1, \mathrm{clip\_norm} / (\|g\|_2 + 10^{-6})\big), \qquad
        g \leftarrow \max(-\mathrm{clip\_value}, \min(g, \mathrm{clip\_value})).

    None means that the step is not one of these and has to be made by the optimizer itself: the
    type is not exactly ``torch.optim.Adam``, ``AdamW``, ``SGD`` or Pyro's ``ClippedAdam``; the
    step has hooks; a parameter is neither float32 nor float64; the learning rate or another number
    is a tensor; ``amsgrad``, ``maximize``, ``capturable`` or ``differentiable`` is on; SGD has
    dampening with momentum (its first step is another than the rest); or there is an option not
    known here. ``foreach`` and ``fused`` are the same step in other kernels, equal to rounding.

    :param optimizer: made for the parameter; not modified.
    :param group: the parameter's group in ``optimizer.param_groups``.
    :param clip: ``clip_norm`` and ``clip_value``, numbers or None, in units of the gradient.

    Example: momentum twice along a constant gradient, 0.1 (1 + 1.9), and an option that is refused.

    >>> import torch
    >>> from pyro_vi_ext.compiled.update_rules import initial_slots, update_rule
    >>> p, g = torch.tensor(0.0), torch.tensor(5.0)
    >>> sgd = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    >>> rule = update_rule(sgd, sgd.param_groups[0], clip={"clip_value": 1.0})
    >>> slots = initial_slots(rule, p)
    >>> for step in (1, 2):
    ...     rule.step(p, g, slots, torch.tensor(step).double(), torch.tensor(0.1).double())
    >>> p
    tensor(-0.2900)
    >>> ascent = torch.optim.SGD([p], lr=0.1, maximize=True)
    >>> update_rule(ascent, ascent.param_groups[0]) is None
    True
    """
    rule_of, clipped = _RULES.get(type(optimizer)), _clipping(clip or {})
    options = {name: value for name, value in group.items() if name not in _NOT_OPTIONS}
    switches = [options.pop(name, False) for name in _REFUSED_IF_ON]
    if (
        rule_of is None
        or clipped is None
        or any(p.dtype not in (torch.float32, torch.float64) for p in group["params"])
        or not all(switch is False for switch in switches)
        or not all(_is_number(value) for value in [group["lr"], *options.values()])
        or {"clipped", *options} != set(inspect.signature(rule_of).parameters)
        or _has_hooks(optimizer)
    ):
        return None
    return rule_of(clipped, **options)


def initial_slots(rule: UpdateRule, p: Tensor) -> list[Tensor]:
    r"""The state before the first step, :math:`s_0 = 0`: a tensor like the parameter for each slot.

    :param p: the parameter, of any shape; gives shape, dtype, device and strides.

    Example:

    >>> import torch
    >>> from pyro_vi_ext.compiled.update_rules import initial_slots, update_rule
    >>> p = torch.ones(2)
    >>> adam = torch.optim.AdamW([p])
    >>> initial_slots(update_rule(adam, adam.param_groups[0]), p)
    [tensor([0., 0.]), tensor([0., 0.])]
    """
    return [torch.zeros_like(p, memory_format=torch.preserve_format) for _ in rule.slots]


# --- the rules; their keyword arguments are the options of the optimizer -------------------------


def _adam(clipped: Transform, betas, eps, weight_decay, decoupled_weight_decay) -> UpdateRule:
    beta1, beta2 = betas

    def numbers(step, lr):
        correction1, correction2 = 1 - torch.pow(beta1, step), 1 - torch.pow(beta2, step)
        return [lr / correction1, correction2.sqrt(), 1 - lr * weight_decay]

    @torch.no_grad()
    def apply(param, grad, slots, numbers):
        size, root, shrink = (_like(param, number) for number in numbers)
        m, v = slots
        grad = clipped(grad)
        if weight_decay and decoupled_weight_decay:
            param.mul_(shrink)
        elif weight_decay:
            grad = grad.add(param, alpha=weight_decay)
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        param.sub_(m * size / (v.sqrt() / root).add_(eps))

    return UpdateRule(("exp_avg", "exp_avg_sq"), "tensor", 1.0, numbers, apply)


def _clipped_adam(
    clipped: Transform, betas, eps, weight_decay, clip_norm, lrd, centered_variance
) -> UpdateRule:
    beta1, beta2 = betas

    def numbers(step, lr):
        correction1, correction2 = 1 - torch.pow(beta1, step), 1 - torch.pow(beta2, step)
        return [lr * correction2.sqrt() / correction1]

    @torch.no_grad()
    def apply(param, grad, slots, numbers):
        m, v = slots
        grad = clipped(grad).clamp(-clip_norm, clip_norm)
        if weight_decay:
            grad = grad.add(param, alpha=weight_decay)
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        deviation = grad - m if centered_variance else grad
        v.mul_(beta2).addcmul_(deviation, deviation, value=1 - beta2)
        param.sub_(m * _like(param, numbers[0]) / v.sqrt().add_(eps))

    return UpdateRule(("exp_avg", "exp_avg_sq"), "int", float(lrd), numbers, apply)


def _sgd(clipped: Transform, momentum, dampening, weight_decay, nesterov) -> UpdateRule | None:
    if momentum and dampening:
        return None

    @torch.no_grad()
    def apply(param, grad, slots, numbers):
        grad = clipped(grad)
        if weight_decay:
            grad = grad.add(param, alpha=weight_decay)
        if momentum:
            (b,) = slots
            b.mul_(momentum).add_(grad)
            grad = grad.add(b, alpha=momentum) if nesterov else b
        param.addcmul_(grad, _like(param, numbers[0]), value=-1)

    return UpdateRule(("momentum_buffer",) if momentum else (), None, 1.0, _rate, apply)


def _rate(step, lr):
    return [lr]


_RULES = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.SGD: _sgd,
    ClippedAdam: _clipped_adam,
}
_NOT_OPTIONS = {"params", "param_names", "lr", "initial_lr", "foreach", "fused"}
_REFUSED_IF_ON = ("amsgrad", "maximize", "capturable", "differentiable")


# --- helpers -----------------------------------------------------------------------------------


def _clipping(clip: dict) -> Transform | None:
    """The clipping of one gradient that PyroOptim does, out of place; None if it is not known."""
    clip = {name: value for name, value in clip.items() if value is not None}
    if not clip.keys() <= {"clip_norm", "clip_value"} or not all(map(_is_number, clip.values())):
        return None

    def clipped(grad: Tensor) -> Tensor:
        if "clip_norm" in clip:
            norm = torch.linalg.vector_norm(grad, 2.0)
            grad = grad * (clip["clip_norm"] / (norm + 1e-6)).clamp(max=1.0)
        if "clip_value" in clip:
            grad = grad.clamp(-clip["clip_value"], clip["clip_value"])
        return grad

    return clipped


def _like(param: Tensor, number: Tensor) -> Tensor:
    """A float64 number in the parameter's dtype; uncast it would promote parameters of shape ()."""
    return number.to(param.dtype)


def _is_number(value) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_number, value))
    return isinstance(value, (int, float))


def _has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the user's own code runs around each step, which a graph would leave out."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )
