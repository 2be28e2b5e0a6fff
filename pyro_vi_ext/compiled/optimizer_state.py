"""The state of an optimizer as inputs of the graph: the very tensors that the optimizer keeps.

Moments and step counts stay in the optimizer's own ``state`` and are updated in place, so that
``optim.get_state()``, a checkpoint, or a plain ``SVI`` that goes on with the same optimizer find
what they would have found. Learning rates are read from the optimizer before every step: a
schedule needs no new graph. Any other hyperparameter that changes makes a new one.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain

import pyro
import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.optim.optim import _load_state_dict

from pyro_vi_ext.compiled.update_rules import initial_slots, update_rule

__all__ = ["OptimizerState", "TorchOptimizer"]

_STATE, _GROUPS = operator.attrgetter("state"), operator.attrgetter("param_groups")


class OptimizerState:
    """The states of one optimizer for some leaves.

    :ivar rules: for each leaf its :class:`~pyro_vi_ext.compiled.update_rules.UpdateRule`.
    :ivar tensors: what the graph reads and writes: the slots of each leaf, the step counts, and the
        learning rates last.
    :ivar kept: those of them that are the optimizer's own.
    :ivar internal: copies of what the optimizer keeps in Python numbers.
    """

    def __init__(self, optim: PyroOptim, leaves: Sequence[torch.Tensor], held, rules):
        self.optim, self.leaves, self.rules = optim, leaves, rules
        self._optimizers = [optimizer for optimizer, _ in held]
        self._groups = [group for _, group in held]
        self._clips = _clips(optim, leaves)
        own = [o.state[leaf] for o, leaf in zip(self._optimizers, leaves, strict=True)]
        self._getters = [
            operator.itemgetter(*sorted(g.keys() - {"params", "lr"})) for g in self._groups
        ]
        self._options = list(zip(self._getters, self._groups, strict=True))
        self._hyperparameters = [get(group) for get, group in self._options]

        slots = []
        for leaf, rule, entry, group in zip(leaves, rules, own, self._groups, strict=True):
            fresh = initial_slots(rule, leaf)
            for name, value in zip(rule.slots, fresh, strict=True):
                if entry.get(name) is None:
                    entry[name] = value
                slots.append(entry[name])
            if rule.counts == "tensor" and "step" not in entry:
                double = torch.get_default_dtype() == torch.float64
                fused = bool(group.get("fused"))  # counts on the parameter's device, in float32
                dtype = torch.float64 if double and not fused else torch.float32
                device = leaf.device if fused else "cpu"
                entry["step"] = torch.zeros((), dtype=dtype, device=device)
            elif rule.counts == "int":
                entry.setdefault("step", 0)
        entries = [
            (entry, name, value)
            for entry in own
            for name, value in entry.items()
            if isinstance(value, torch.Tensor)
        ]
        self._entries, self._names, self._values = (
            map(list, zip(*entries, strict=True)) if entries else [[]] * 3
        )
        # Looked up by position: a tensor is slow as a key.
        self._objects = optim.optim_objs
        self._object_ids = [*map(id, self._objects.values())]
        self._unique = [*{id(o): o for o in self._optimizers}.values()]
        self._states = [o.state for o in self._unique]
        self._group_lists = [o.param_groups for o in self._unique]
        self._entry_ids = [*map(id, chain.from_iterable(map(dict.values, self._states)))]
        device = leaves[0].device
        # Counts that are Python's, or that the graph cannot reach because it runs on a GPU.
        self._is_counted = [
            rule.counts == "int"
            or (rule.counts == "tensor" and entry["step"].device != leaf.device)
            for leaf, rule, entry in zip(leaves, rules, own, strict=True)
        ]
        self._counted = [e for e, counted in zip(own, self._is_counted, strict=True) if counted]
        self._counts = torch.zeros(len(self._counted), dtype=torch.float64, device=device)
        self._known_counts: list[int] = [0] * len(self._counted)
        self._rates = torch.zeros(len(rules), dtype=torch.float64, device=device)
        self._known_rates: list[float] = [0.0] * len(rules)
        self._decays = [rule.decay for rule in rules]
        self._decaying = any(decay != 1.0 for decay in self._decays)
        steps = [
            entry["step"]
            for entry, rule, counted in zip(own, rules, self._is_counted, strict=True)
            if rule.counts and not counted
        ]
        self.kept = [*slots, *steps]
        self.internal = [self._counts, self._rates]
        self.tensors = [*self.kept, *self.internal]

    @staticmethod
    def of(optim: PyroOptim, leaves: Sequence[torch.Tensor]) -> OptimizerState | None:
        """The state that ``optim`` has for leaves; ``None`` if its step must run by itself."""
        if not leaves or type(optim) not in (PyroOptim, PyroLRScheduler, TorchOptimizer):
            return None
        if isinstance(optim, TorchOptimizer) and not optim.holds_only(leaves):
            return None  # it may move others, too
        held, rules = [], []
        for leaf in leaves:
            optimizer, group, clip = _holder(optim, leaf)
            rule = None if optimizer is None else update_rule(optimizer, group, clip)
            if rule is None:
                return None
            held.append((optimizer, group))
            rules.append(rule)
        return OptimizerState(optim, leaves, held, rules)

    def current(self) -> bool:
        """Whether the optimizer still keeps these tensors, with these hyperparameters."""
        return (
            [*map(id, self._objects.values())] == self._object_ids
            and all(map(operator.is_, map(_STATE, self._unique), self._states))
            and all(map(operator.is_, map(_GROUPS, self._unique), self._group_lists))
            and [*map(id, chain.from_iterable(map(dict.values, self._states)))] == self._entry_ids
            and all(map(operator.is_, map(dict.get, self._entries, self._names), self._values))
            and [get(group) for get, group in self._options] == self._hyperparameters
            and (self._clips is None or _clips(self.optim, self.leaves) == self._clips)
        )

    def before_steps(self) -> None:
        """Bring learning rates and step counts up to date, if the host has changed them."""
        rates = [group["lr"] for group in self._groups]
        if rates != self._known_rates:
            self._rates.copy_(torch.tensor(rates, dtype=torch.float64))
            self._known_rates = rates
        if self._counted:
            counts = [int(entry["step"]) for entry in self._counted]
            if counts != self._known_counts:
                self._counts.copy_(torch.tensor(counts, dtype=torch.float64))
                self._known_counts = counts

    def after_steps(self, num_steps: int) -> None:
        """Do to the host's numbers what the graph has done to its own."""
        if self._counted and num_steps:
            self._known_counts = [count + num_steps for count in self._known_counts]
            for entry, count in zip(self._counted, self._known_counts, strict=True):
                _set_count(entry, count)
        if self._decaying and num_steps:
            rates = []
            for rate, decay, group in zip(
                self._known_rates, self._decays, self._groups, strict=True
            ):
                for _ in range(num_steps):
                    rate *= decay
                group["lr"] = rate
                rates.append(rate)
            self._known_rates = rates

    def host_state(self) -> tuple:
        """What the optimizer keeps in Python numbers."""
        counts = [int(entry["step"]) for entry in self._counted]
        return counts, [group["lr"] for group in self._groups]

    def set_host_state(self, saved: tuple) -> None:
        counts, rates = saved
        for entry, count in zip(self._counted, counts, strict=True):
            _set_count(entry, count)
        for group, rate in zip(self._groups, rates, strict=True):
            group["lr"] = rate
        self._known_counts, self._known_rates = [], []  # the tensors are to be written again

    def update(self, leaves, gradients, tensors, finite) -> None:
        """The optimizer's step as tensor operations, in place; nothing where not ``finite``."""
        tensors = list(tensors)
        rates, counts = tensors.pop(), tensors.pop()
        num_slots = sum(len(rule.slots) for rule in self.rules)
        slots, steps = iter(tensors[:num_slots]), iter(tensors[num_slots:])
        if self._decaying:
            slower = [rate * decay for rate, decay in zip(rates, self._decays, strict=True)]
            rates.copy_(torch.where(finite, torch.stack(slower), rates))
        if self._counted:
            counts.add_(finite)
        counted = iter(counts.unbind() if self._counted else ())
        done = []
        for rule, is_counted in zip(self.rules, self._is_counted, strict=True):
            if is_counted:
                done.append(next(counted))
            elif rule.counts:
                step = next(steps)
                step.add_(finite)
                done.append(step.to(torch.float64))
            else:
                done.append(rates.new_ones(()))
        numbers = self._numbers(torch.stack(done), rates)
        for k, (leaf, gradient, rule) in enumerate(zip(leaves, gradients, self.rules, strict=True)):
            old = [leaf, *(next(slots) for _ in rule.slots)]
            new = [tensor.clone() for tensor in old]
            rule.apply(new[0], gradient, new[1:], numbers[k])
            for tensor, value in zip(old, new, strict=True):
                tensor.copy_(torch.where(finite, value, tensor))

    def _numbers(self, steps: torch.Tensor, rates: torch.Tensor) -> list[list[torch.Tensor]]:
        """The numbers of each leaf's step, made for all leaves of one kind at once.

        They are joined, so that compiled code keeps them and does not make them for each element.
        """
        kinds: dict[tuple, list[int]] = {}
        for k, (optimizer, known) in enumerate(
            zip(self._optimizers, self._hyperparameters, strict=True)
        ):
            kinds.setdefault((type(optimizer), known), []).append(k)
        numbers: list = [None] * len(self.rules)
        for members in kinds.values():
            own = steps, rates
            if len(members) < len(self.rules):  # no list as an index: that is a constant tensor
                own = tuple(torch.stack([vector[k] for k in members]) for vector in own)
            joined = torch.cat(self.rules[members[0]].numbers(*own)).unbind()
            for place, k in enumerate(members):
                numbers[k] = joined[place :: len(members)]
        return numbers


def _set_count(entry: dict, count: int) -> None:
    if isinstance(entry["step"], torch.Tensor):
        entry["step"].fill_(count)
    else:
        entry["step"] = count


def _clips(optim: PyroOptim, leaves) -> list[dict] | None:
    """How gradients are clipped, if they are."""
    if not optim.pt_clip_args:
        return None
    return [dict(optim._get_grad_clip_args(leaf)) for leaf in leaves]


def _holder(optim: PyroOptim, leaf):
    """The torch optimizer of a leaf, its group, and how gradients are clipped."""
    if isinstance(optim, TorchOptimizer):
        for group in optim.optimizer.param_groups:
            if any(leaf is p for p in group["params"]):
                return optim.optimizer, group, None
        return None, None, None
    if leaf not in optim.optim_objs:  # PyroOptim makes them when it first sees a parameter
        optim.optim_objs[leaf] = optim._get_optim(leaf)
        optim.grad_clip[leaf] = optim._get_grad_clip(leaf)
        name = pyro.get_param_store().param_name(leaf)
        state = optim._state_waiting_to_be_consumed.pop(name, None)
        if state is not None:
            _load_state_dict(optim.optim_objs[leaf], state)
    optimizer = optim.optim_objs[leaf]
    optimizer = getattr(optimizer, "optimizer", optimizer)  # a scheduler around it
    return optimizer, optimizer.param_groups[0], optim._get_grad_clip_args(leaf)


class TorchOptimizer(PyroOptim):
    """A ``torch.optim.Optimizer`` where an ``SVI`` expects one of Pyro's.

    Its parameters must exist already; a leaf that it does not hold is an error at the first step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__(type(optimizer), {})
        self.optimizer = optimizer
        first = optimizer.param_groups[0]["params"][0]
        self.optim_objs, self.grad_clip = {first: optimizer}, {first: None}

    def holds_only(self, leaves) -> bool:
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return held <= {id(leaf) for leaf in leaves}

    def __call__(self, params, *args, **kwargs) -> None:
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [p for p in params if id(p) not in held and p.grad is not None]
        if missing:
            name = pyro.get_param_store().param_name(missing[0])
            raise ValueError(
                f"The optimizer does not hold parameter '{name}'. Make it from all parameters "
                "after a first call of objective(model, guide), or use pyro.optim, which finds "
                "them by itself."
            )
        self.optimizer.step(*args, **kwargs)
