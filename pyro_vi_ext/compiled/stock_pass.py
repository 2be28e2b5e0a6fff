"""The pass that is compiled: what ``SVI.step`` calls, unmodified, and the parameters it uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pyro
import pyro.poutine as poutine
import torch
from pyro.util import get_rng_state, set_rng_state
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vi_ext.checkpoint import find_modules, undisturbed
from pyro_vi_ext.compiled.executed_code import ExecutedCode
from pyro_vi_ext.compiled.python_state import PythonState
from pyro_vi_ext.compiled.written import writes_undone
from pyro_vi_ext.objective import Objective

__all__ = ["StockPass", "leaves_of"]


class StockPass:
    """``loss_and_grads`` of an objective on one pair.

    :param loss_and_grads: called with model, guide and their arguments; adds to ``.grad``.
    :ivar modules: those behind model, guide and objective, by name.
    """

    def __init__(self, model: Callable, guide: Callable, loss_and_grads: Callable):
        self.model, self.guide, self.loss_and_grads = model, guide, loss_and_grads
        self.owner = getattr(loss_and_grads, "__self__", None)
        self.executed = ExecutedCode(model, guide)
        self.modules = find_modules(model=model, guide=guide, loss=self.owner or loss_and_grads)

    def __call__(self, *args, **kwargs):
        """The loss, or losses, as the objective returns them."""
        return self.loss_and_grads(self.model, self.guide, *args, **kwargs)

    def is_of(self, svi) -> bool:
        """Whether an ``SVI`` has this model, guide and loss."""
        return (
            svi.model is self.model
            and svi.guide is self.guide
            and svi.loss_and_grads is self.loss_and_grads
        )

    def symbolic(self, *args, **kwargs):
        """The same for tensors without values: our own objectives look at their loss."""
        own = getattr(type(self.owner), "loss_and_grads", None)
        if isinstance(self.owner, Objective) and own is Objective.loss_and_grads:
            return self.owner.differentiate(self.model, self.guide, *args, **kwargs)
        return self(*args, **kwargs)

    def find_leaves(self, args, kwargs) -> dict[str, torch.Tensor]:
        """The leaves by name, from a pass that changes nothing but makes missing parameters.

        Random states are as before, unless making parameters drew from them: what they drew must
        not come again.
        """
        known, start = set(pyro.get_param_store().keys()), get_rng_state()
        leaves, drawn = self._leaves_of_a_pass(args, kwargs)
        if not known >= set(pyro.get_param_store().keys()):
            _, drawn_without = self._leaves_of_a_pass(args, kwargs)
            if not torch.equal(drawn["torch"], drawn_without["torch"]):
                start = drawn
        set_rng_state(start)
        return leaves

    def _leaves_of_a_pass(self, args, kwargs):
        """The leaves, and the random states after the pass; those before it are put back."""
        gradients = {leaf: leaf.grad for _, leaf in pyro.get_param_store().named_parameters()}
        for module in self.modules.values():
            gradients |= {p: p.grad for p in module.parameters()}
        for leaf in gradients:
            leaf.grad = None
        try:
            with (
                undisturbed(self.modules),  # batch norm writes without saying so
                writes_undone(),
                known_entries_kept(self.modules),
                known_buffers_kept(self.modules),
                self.watching_modules(),
                self.executed.watched(),
                poutine.trace(param_only=True) as captured,
            ):
                self(*args, **kwargs)
                drawn = get_rng_state()
        finally:
            leaves = leaves_of(captured)
            for leaf in leaves.values():
                leaf.grad = None
            for leaf, gradient in gradients.items():
                leaf.grad = gradient
        return leaves, drawn

    @contextlib.contextmanager
    def watching_modules(self):
        """Adds the modules that are called to ``modules``, wherever they are kept."""
        known = {id(module) for module in self.all_modules()}

        def note(module, args):
            if id(module) not in known:
                known.update(id(m) for m in module.modules())
                self.modules[f"called.{len(self.modules)}"] = module

        handle = register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def python_state(self, *arguments) -> PythonState:
        """What the code of the pass finds outside of its arguments."""
        loss = self.owner or self.loss_and_grads
        modules = self.all_modules()
        return PythonState(self.executed, self.model, self.guide, loss, *modules, *arguments)

    def all_modules(self) -> list[torch.nn.Module]:
        found = {id(m): m for root in self.modules.values() for m in root.modules()}
        return list(found.values())


@contextlib.contextmanager
def known_entries_kept(modules: dict[str, torch.nn.Module]):
    """Puts back entries of the parameter store that a pass has replaced; new ones stay.

    Where a pass stores the parameter that a module has now, that stays too.
    """
    store = pyro.get_param_store()
    before = dict(store._params)
    try:
        yield
    finally:
        own = {id(p) for module in modules.values() for p in module.parameters()}
        for name, leaf in before.items():
            replacement = store._params.get(name)
            if replacement is not leaf and id(replacement) not in own:
                store._param_to_name.pop(replacement, None)
                store._params[name] = leaf
                store._param_to_name[leaf] = name


@contextlib.contextmanager
def known_buffers_kept(modules: dict[str, torch.nn.Module]):
    """Puts back buffers, and other tensors that are no parameters, that a pass has replaced."""
    parts = [part for module in modules.values() for part in module.modules()]
    tables = [table for part in parts for table in (part._buffers, part.__dict__)]
    saved = [(table, dict(table)) for table in tables]
    try:
        yield
    finally:
        for table, before in saved:
            for key, value in before.items():
                if isinstance(value, torch.Tensor) and table.get(key) is not value:
                    table[key] = value


def leaves_of(captured) -> dict[str, torch.Tensor]:
    """The unconstrained leaves of the parameter sites of ``poutine.trace(param_only=True)``."""
    sites = captured.trace.nodes.items()
    values = {name: site["value"] for name, site in sites if site["type"] == "param"}
    return {
        name: value.unconstrained() if hasattr(value, "unconstrained") else value
        for name, value in values.items()
    }
