"""A pass that leaves nothing behind: gradients, random states, stores, modules and parameters."""

from __future__ import annotations

import contextlib

import pyro
import torch
from pyro.util import get_rng_state, set_rng_state
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["as_it_was", "perturbed"]


@contextlib.contextmanager
def as_it_was(leaves: dict, modules: dict):
    """Puts back gradients, random states, and whatever the pass replaces in stores and modules.

    Yields a function that names the first replaced tensor, or returns ``None``.
    """
    store = pyro.get_param_store()
    gradients = [leaf.grad for leaf in leaves.values()]
    rng = get_rng_state()
    tables = [("the parameter store's entry '{}'", store._params)]
    for name, root in modules.items():
        for path, module in root.named_modules():
            where = ".".join(filter(None, (name, path)))
            tables.append((f"'{where}.{{}}'", module._buffers))
            tables.append((f"'{where}.{{}}'", module._parameters))
            # Flows remember the scale of their latest draw, for the density that is asked next.
            cache = type(module).__module__.startswith("pyro.")
            tables.append((None if cache else f"'{where}.{{}}'", module.__dict__))
    saved = [(what, table, _tensors(table)) for what, table in tables]

    def changed():
        for what, table, before in saved:
            after = _tensors(table)
            for key in {**before, **after}:
                if what is not None and before.get(key) is not after.get(key):
                    return what.format(key)
            for key, value in table.items():
                if what is not None and _kept_stand_ins(value):
                    return what.format(key)
        return None

    try:
        yield changed
    finally:
        for leaf, gradient in zip(leaves.values(), gradients, strict=True):
            leaf.grad = gradient
        set_rng_state(rng)
        for _, table, before in saved:
            for key in _tensors(table).keys() - before.keys():
                del table[key]
            for key, value in before.items():
                if table.get(key) is not value:
                    table[key] = value
            for value in table.values():
                for kept in _kept_stand_ins(value):
                    value.remove(kept) if isinstance(value, list) else value.pop(kept)


def _kept_stand_ins(value) -> list:
    """The elements of a list, or keys of a dict, that are tensors without values."""
    if isinstance(value, list):
        return [item for item in value if isinstance(item, FakeTensor)]
    if isinstance(value, dict):
        return [key for key, item in value.items() if isinstance(item, FakeTensor)]
    return []


def _tensors(table: dict) -> dict:
    return {key: value for key, value in table.items() if isinstance(value, torch.Tensor)}


@contextlib.contextmanager
def perturbed(tensors):
    """Other values in all parameters, which come back as they were, bit for bit."""
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.no_grad():
            for tensor in tensors:
                tensor.add_(tensor.abs() * 0.0137 + 0.0171)
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
