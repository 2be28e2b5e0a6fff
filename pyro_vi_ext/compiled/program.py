"""A compiled step for one set of shapes, bound to the tensors of parameters and optimizer."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable

import pyro
import torch
from pyro.optim import PyroOptim

from pyro_vi_ext.compiled.arguments import Arguments
from pyro_vi_ext.compiled.backends import compiled
from pyro_vi_ext.compiled.capture import Capture, capture
from pyro_vi_ext.compiled.optimizer_state import OptimizerState
from pyro_vi_ext.compiled.refusal import CannotCompile
from pyro_vi_ext.compiled.step_graph import StepGraph, loop_graph, step_graph
from pyro_vi_ext.compiled.stock_pass import StockPass
from pyro_vi_ext.objective import Objective

__all__ = ["Program"]

logger = logging.getLogger("pyro_vi_ext.compiled")

_REQUIRES_GRAD = operator.attrgetter("requires_grad")


class Program:
    """The step for arguments of one kind.

    :ivar trace_seconds: time spent to make graphs from the pass.
    :ivar compile_seconds: time spent to make code from graphs; next to nothing if the same graph
        was compiled before.
    :ivar num_operations: in the graph of a step.
    :ivar num_steps: steps run so far.
    :ivar next_check: the number of steps at which it is compared with a plain one again.
    :ivar has_loop: whether many steps are one call: with Inductor, on a CPU, the optimizer inside.
    :ivar entries: the leaves by name; a leaf may have several names.
    """

    def __init__(
        self, stock: StockPass, arguments: Arguments, optim: PyroOptim | None, backend: str, leaves
    ):
        self.stock, self.optim, self.backend = stock, optim, backend
        self.trace_seconds = self.compile_seconds = 0.0
        self.num_steps = self.next_check = 0
        start = time.perf_counter()
        self.entries = leaves
        leaves = {name: leaf for leaf, name in {leaf: n for n, leaf in leaves.items()}.items()}
        self._objects = arguments.objects
        before = stock.python_state(*self._objects)
        self.capture: Capture = capture(stock.symbolic, leaves, arguments, stock.modules)
        counted = before.counted()
        if counted is not None:
            raise CannotCompile(
                f"The pass changes {counted}, which a graph does not do. Count between the steps, "
                "or hold the number in a tensor that is updated in place."
            )
        trained = [leaves[name] for name in self.capture.trained]
        #: Leaves that had a gradient in a step of another kind: zero now, as Pyro leaves it.
        self.idle = {
            name: leaf
            for name, leaf in leaves.items()
            if leaf.grad is not None and name not in self.capture.trained
        }
        updated = [*trained, *self.idle.values()]
        self.optimizer = None if optim is None else OptimizerState.of(optim, updated)
        self.updated = updated if self.optimizer else trained
        self.graph: StepGraph = step_graph(
            self.capture,
            arguments.tensors,
            self.optimizer,
            self.updated,
            strict=isinstance(stock.owner, Objective),
            decompose=backend != "eager",
        )
        self.num_operations = len(self.graph.graph.graph.nodes)
        self.trace_seconds = time.perf_counter() - start
        self.num_given = len(arguments.tensors)
        self._live = self.graph.inputs[self.num_given :]
        own = [] if self.optimizer is None else self.optimizer.tensors
        self._num_outside = len(self._live) - len(own)  # the rest is watched by the optimizer
        self._bound = [tensor.detach() for tensor in self._live]
        self._outside = self._live[: self._num_outside]
        self._addresses = [*map(torch.Tensor.data_ptr, self._outside)]
        written = [self.graph.inputs[k] for k in self.graph.mutated]
        self._written = {tensor.untyped_storage()._cdata for tensor in written}
        self.device = self.graph.inputs[-1].device
        self._are_apart: list | None = None
        self._step: Callable | None = None
        self._loop: Callable | None = None
        self.has_loop = (
            self.optimizer is not None and backend == "inductor" and self.device.type == "cpu"
        )
        self.take_guards()

    # What the graph takes for granted.

    def take_guards(self) -> None:
        """Remember what the graph takes for granted, as it is now."""
        store, modules = pyro.get_param_store(), self.stock.all_modules()
        self._names = [name for name in self.entries if name in store._params]
        self._leaves = [self.entries[name] for name in self._names]
        known = {id(p): p for p in self._leaves}
        known |= {id(p): p for module in modules for p in module.parameters(recurse=False)}
        self._watched = list(known.values())
        self._requires = [*map(_REQUIRES_GRAD, self._watched)]

        places = {id(tensor): k for k, tensor in enumerate(self._live)}
        self._tables, self._keys, self._held = [], [], []
        for module in modules:
            for table in (module._buffers, module._parameters, module._modules, module.__dict__):
                for key, value in table.items():
                    if id(value) in places or table is module._modules:
                        self._tables.append(table)
                        self._keys.append(key)
                        self._held.append(value)
        self._constants = [(t, t._version, t.detach().clone()) for t, _ in self.capture.constants]
        self._python = self.stock.python_state(*self._objects)

    def why_stale(self) -> str | None:
        """What has changed since the graph was made and cannot be followed, if anything has."""
        stored = pyro.get_param_store()._params
        if not all(map(operator.is_, map(stored.get, self._names), self._leaves)):
            return "a parameter that was replaced in the store"
        if [*map(_REQUIRES_GRAD, self._watched)] != self._requires:
            return "requires_grad of a parameter that was changed"
        if not all(map(operator.is_, map(dict.get, self._tables, self._keys), self._held)):
            reason = self._follow_attributes()
            if reason is not None:
                return reason
        if [*map(torch.Tensor.data_ptr, self._outside)] != self._addresses:
            reason = self._follow_data()
            if reason is not None:
                return reason
        change = self._python.change()
        if change is not None:
            return f"{change}, which was changed"
        for k, (tensor, version, value) in enumerate(self._constants):
            if tensor._version != version:
                if not torch.equal(tensor, value):
                    return "a constant, read by model or guide, which was changed"
                self._constants[k] = (tensor, tensor._version, value)
        if self.optimizer is not None and not self.optimizer.current():
            return "the optimizer, which has another state or other hyperparameters"
        return None

    def _follow_attributes(self) -> str | None:
        """Use the tensors that modules have now; why not, if that is impossible."""
        places = {id(tensor): k for k, tensor in enumerate(self._live)}
        now = [table.get(key) for table, key in zip(self._tables, self._keys, strict=True)]
        moved: dict[int, torch.Tensor] = {}
        for key, old, new in zip(self._keys, self._held, now, strict=True):
            fixed = any(old is leaf for leaf in self._watched) or not isinstance(old, torch.Tensor)
            if new is not old and (fixed or not _same_kind(old, new) or new.requires_grad):
                return f"'{key}' of a module, which was replaced"
            if moved.setdefault(places.get(id(old), -1), new) is not new and id(old) in places:
                return f"'{key}' of a module, which was replaced in one place and not in another"
        for k, new in moved.items():
            if k >= 0:
                self._live[k] = self.graph.inputs[self.num_given + k] = new
                self._bound[k] = new.detach()
                if self.num_given + k in self.graph.mutated:
                    self._written.add(new.untyped_storage()._cdata)
                self._are_apart = None
                if k < len(self.capture.inputs):
                    self.capture.inputs[k] = new
        self._held = now
        self._outside = self._live[: self._num_outside]
        self._addresses = [*map(torch.Tensor.data_ptr, self._outside)]
        return None

    def _follow_data(self) -> str | None:
        """Use the memory that tensors have now, after ``tensor.data = ...``."""
        for k, (tensor, bound) in enumerate(zip(self._live, self._bound, strict=True)):
            if tensor.data_ptr() != bound.data_ptr():
                if not _same_kind(bound, tensor):
                    return "a tensor with data of another kind"
                self._bound[k] = tensor.detach()
                self._written.add(tensor.untyped_storage()._cdata)
                self._are_apart = None
        self._outside = self._live[: self._num_outside]
        self._addresses = [*map(torch.Tensor.data_ptr, self._outside)]
        return None

    # Running it.

    def compile(self) -> None:
        """Make the code of a step, if that has not been done."""
        if self._step is None:
            self._step = self._compiled(self.graph, loop=False)

    def compile_loop(self) -> None:
        """Make the code of a loop of steps, if that has not been done."""
        if self._loop is None and self.has_loop:
            start = time.perf_counter()
            graph = loop_graph(self.graph)
            self.trace_seconds += time.perf_counter() - start
            self._loop = self._compiled(graph, loop=True)

    @property
    def loop_is_compiled(self) -> bool:
        return self._loop is not None

    def _compiled(self, graph: StepGraph, loop: bool) -> Callable:
        start = time.perf_counter()
        code = compiled(self.backend, graph.graph, graph.inputs, graph.mutated)
        seconds = time.perf_counter() - start
        self.compile_seconds += seconds
        logger.info(
            "compiled %s of %d operations with %s in %.1f s",
            "a loop of steps" if loop else "a step",
            self.num_operations,
            self.backend,
            seconds,
        )
        return code

    def step(self, tensors: list[torch.Tensor]):
        """One step with the optimizer in it: the losses, and whether all was finite."""
        self.compile()
        self.optimizer.before_steps()
        return self._step(*self._apart(tensors), *self._bound)  # of tensors without gradients

    def loop(self, count: int, tensors: list[torch.Tensor]):
        """At most :data:`LOOP_STEPS` steps: losses, number of steps begun, whether finite."""
        self.compile_loop()
        self.optimizer.before_steps()
        limit = torch.tensor(count, dtype=torch.int64, device=self.device)
        losses, number, finite = self._loop(limit, *self._apart(tensors), *self._bound)
        return losses[:count], number, finite

    def gradients(self, tensors: list[torch.Tensor]):
        """One pass without the optimizer: losses, whether finite, a gradient for each leaf."""
        self.compile()
        losses, finite, *gradients = self._step(*self._apart(tensors), *self._bound)
        return losses, finite, gradients

    def _apart(self, tensors):
        """The arguments, copied where they lie in the memory of a tensor that the step changes."""
        if tensors is self._are_apart:
            return tensors
        inside = [t.untyped_storage()._cdata in self._written for t in tensors]
        if not any(inside):
            self._are_apart = tensors
        return [t.clone() if k else t for t, k in zip(tensors, inside, strict=True)]


def _same_kind(a, b) -> bool:
    """Whether a graph made for one tensor takes the other."""
    return (
        isinstance(b, torch.Tensor)
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.device == b.device
    )
