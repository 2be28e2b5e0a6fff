"""A compiled step beside a plain one: same state, same random draws, same numbers.

A graph cannot know what Python would do in the next call. So compiled code is run beside Pyro's own
step from the same state and under the same seed, when it is made and again from time to time, and
what both leave behind is compared: the loss, the gradients (as the optimizer's moments have them),
parameters and buffers. Rounding differs; how much it may is measured: a gradient that is a small
difference of large numbers is as uncertain as plain SVI's own after a change of the parameters in
their last digit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import pyro.poutine as poutine
import torch
from pyro.infer.util import zero_grads
from pyro.util import get_rng_state, set_rng_state
from torch.utils._python_dispatch import _disable_current_modes

from pyro_vi_ext.compiled.program import Program
from pyro_vi_ext.compiled.refusal import CannotCompile
from pyro_vi_ext.compiled.stock_pass import known_buffers_kept, known_entries_kept, leaves_of
from pyro_vi_ext.compiled.written import writes_undone

__all__ = ["verify"]

#: Allowed relative difference of a gradient, a moment or a loss, by dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
#: How many times plain SVI's own rounding error is allowed besides.
ROUNDINGS = 100.0


def verify(program: Program, args: tuple, kwargs: dict, tensors: list, loop: bool = False) -> None:
    """Compare one step of ``program`` (two of its loop) with plain steps; nothing changes.

    :raises CannotCompile: if they differ for two of three seeds.
    """
    with _unchanged(program):
        differences = []
        for attempt in range(3):
            found = _difference(program, args, kwargs, tensors, loop)
            differences += [found] if found else []
            if not differences or len(differences) == 2:
                break
            torch.manual_seed(attempt)  # rounding may have decided a draw: others will tell
    if len(differences) == 2:
        raise CannotCompile(
            f"The compiled step does not do what a plain one does: {differences[0]}. Model, guide "
            "or objective depend on a state of Python (a counter, an attribute, a global that has "
            "changed). Give it as an argument, or hold it in a tensor that is updated in place."
        )


def _difference(program, args, kwargs, tensors, loop) -> str | None:
    """What differs most beyond rounding, in words, or ``None``."""
    num_steps = 2 if loop else 1
    start = get_rng_state()
    ours = _Outcome.of(program, lambda: _compiled_steps(program, tensors, num_steps, loop))
    set_rng_state(start)
    with writes_undone():
        plain = _Outcome.of(program, lambda: _plain_steps(program, args, kwargs, num_steps))
    found = ours.compare(plain, None)
    if found is None:
        return None
    set_rng_state(start)
    with _last_digit_changed(program), writes_undone():
        other = _Outcome.of(program, lambda: _plain_steps(program, args, kwargs, num_steps))
    return ours.compare(plain, other)


def _compiled_steps(program: Program, tensors, num_steps, loop):
    if loop:
        losses, number, finite = program.loop(num_steps, tensors)
        program.optimizer.after_steps(int(number))
        return losses.reshape(-1), []
    if program.optimizer is None:
        losses, _, gradients = program.gradients(tensors)
        return losses, gradients
    losses, _ = program.step(tensors)
    program.optimizer.after_steps(1)
    return losses, []


def _plain_steps(program: Program, args, kwargs, num_steps):
    leaves = program.capture.leaves.values()
    losses, gradients = [], []
    for leaf in leaves:
        leaf.grad = None
    for leaf in program.idle.values():
        leaf.grad = torch.zeros_like(leaf)
    for _ in range(num_steps):
        with poutine.trace(param_only=True) as captured:
            loss = program.stock(*args, **kwargs)
        _check_leaves(program, leaves_of(captured))
        losses += loss if isinstance(loss, tuple) else [loss]
        if program.optimizer is not None:
            program.optim([leaf for leaf in leaves if leaf.grad is not None])
        else:
            gradients = [leaf.grad for leaf in program.updated]
        zero_grads(leaves)
    losses = torch.stack([torch.as_tensor(x, dtype=torch.float64).cpu() for x in losses])
    return losses, gradients


def _check_leaves(program: Program, found: dict[str, torch.Tensor]) -> None:
    known = {id(leaf) for leaf in program.capture.leaves.values()}
    for name, leaf in found.items():
        if id(leaf) not in known and leaf.grad is not None:
            raise CannotCompile(f"Parameter '{name}' has a gradient now, and had none before.")


class _Outcome:
    """What steps leave behind, as changes: (name, dtype, tensor, how much to allow)."""

    def __init__(self, losses, gradients, before, after, names, host):
        self.host, self.rng = host, torch.get_rng_state()
        self.losses = losses.detach().cpu()
        self.gradients = [g.detach().clone() for g in gradients]
        self.before, self.after, self.names = before, after, names

    @staticmethod
    def of(program: Program, run: Callable) -> _Outcome:
        tensors = _state(program)
        before = [tensor.detach().clone() for tensor in tensors]
        with _host_state(program):
            losses, gradients = run()
            after = [tensor.detach().clone() for tensor in tensors]
            host = () if program.optimizer is None else program.optimizer.host_state()
        with _disable_current_modes(), torch.no_grad():  # this is no write of the steps
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        return _Outcome(losses, gradients, before, after, _names(program, tensors), host)

    def compare(self, plain: _Outcome, other: _Outcome | None) -> str | None:
        """The first difference to plain steps beyond tolerance, and beyond what ``other`` shows."""
        if plain.losses.isnan().any():
            return None  # plain SVI has no answer either
        if not torch.equal(self.rng, plain.rng):
            return "other random numbers are drawn"
        if self.host != plain.host:
            return f"the optimizer's counts and rates are {self.host} and not {plain.host}"
        spread = None if other is None else (plain.losses - other.losses).abs().max()
        dtype = self._dtype()
        if _apart(self.losses, plain.losses, TOLERANCE[dtype], spread):
            return f"the loss is {self.losses.tolist()} and not {plain.losses.tolist()}"
        for k, (a, b) in enumerate(zip(self.gradients, plain.gradients, strict=True)):
            spread = None if other is None else (b - other.gradients[k]).norm()
            if _apart(a, b, TOLERANCE.get(b.dtype, 0.0), spread):
                return f"a gradient of shape {tuple(b.shape)} is another"
        for k, (name, moves) in enumerate(self.names):
            a, b = self.after[k], plain.after[k]
            if not a.is_floating_point():
                if not torch.equal(a, b):
                    return f"{name} has other values"
                continue
            spread = None if other is None else (b - other.after[k]).norm()
            allowed = TOLERANCE.get(b.dtype, 0.0)
            if moves is not None:
                allowed = 10 * torch.finfo(b.dtype).eps
                moved = moves * (b - plain.before[k]).norm() / ROUNDINGS
                spread = moved if spread is None else spread + moved
            if _apart(a, b, allowed, spread):
                return f"{name} has other values"
        return None

    def _dtype(self):
        floats = [t.dtype for t in (*self.after, *self.gradients) if t.is_floating_point()]
        return torch.float32 if torch.float32 in floats or not floats else torch.float64


def _apart(a, b, relative: float, spread) -> bool:
    a, b = a.double(), b.double()
    if torch.equal(a.isnan(), b.isnan()):
        a, b = (torch.where(x.isnan(), 0.0, x) for x in (a, b))
    difference = torch.where(a == b, 0.0, a - b).norm()  # infinite ones may be equal, too
    allowed = relative * b[b.isfinite()].norm() + 1e-30
    if spread is not None:
        allowed = allowed + ROUNDINGS * spread
    return not bool(difference <= allowed)


def _state(program: Program) -> list[torch.Tensor]:
    """Every tensor that a step may change: of the graph, the optimizer, and modules' buffers."""
    tensors = [program.graph.inputs[k] for k in program.graph.mutated]
    tensors += program.capture.leaves.values()
    if program.optimizer is not None:
        tensors += program.optimizer.kept
        internal = program.optimizer.internal
        tensors = [tensor for tensor in tensors if not any(tensor is t for t in internal)]
    tensors += [b for module in program.stock.modules.values() for b in module.buffers()]
    return list({id(tensor): tensor for tensor in tensors}.values())


def _names(program: Program, tensors: Sequence[torch.Tensor]) -> list[tuple[str, float | None]]:
    """For each tensor its name and, for leaves, how much of its move may differ.

    Adam turns a gradient that is zero but for rounding into a step of full length; where there are
    moments, they show what differs.
    """
    names = {id(leaf): f"parameter '{name}'" for name, leaf in program.capture.leaves.items()}
    for name, module in program.stock.modules.items():
        for path, buffer in module.named_buffers():
            names.setdefault(id(buffer), f"buffer '{name}.{path}'")
    moves = {id(leaf): 0.02 for leaf in program.capture.leaves.values()}
    if program.optimizer is not None:
        for leaf, rule in zip(program.updated, program.optimizer.rules, strict=True):
            moves[id(leaf)] = 0.02 if rule.slots else TOLERANCE.get(leaf.dtype, 0.0)
    return [(names.get(id(t), "the optimizer's state"), moves.get(id(t))) for t in tensors]


@contextlib.contextmanager
def _host_state(program: Program):
    """Puts back what the optimizer keeps in Python numbers."""
    optimizer = program.optimizer
    if optimizer is None:
        yield
        return
    saved = optimizer.host_state()
    try:
        yield
    finally:
        optimizer.set_host_state(saved)


@contextlib.contextmanager
def _unchanged(program: Program):
    rng = get_rng_state()
    leaves = list(program.capture.leaves.values())
    gradients = [leaf.grad for leaf in leaves]
    try:
        modules = program.stock.modules
        with known_entries_kept(modules), known_buffers_kept(modules):
            yield
    finally:
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        set_rng_state(rng)


@contextlib.contextmanager
def _last_digit_changed(program: Program):
    leaves = [leaf for leaf in program.capture.leaves.values() if leaf.is_floating_point()]
    saved = [leaf.detach().clone() for leaf in leaves]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in leaves:
            sign = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf) * 2 - 1
            leaf.mul_(1 + 2 * torch.finfo(leaf.dtype).eps * sign)
    try:
        yield
    finally:
        with torch.no_grad():
            for leaf, value in zip(leaves, saved, strict=True):
                leaf.copy_(value)
