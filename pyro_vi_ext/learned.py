"""Learned parts of an objective (control variates, baselines) in Pyro's parameter store.

``pyro.module`` keeps the parameters of the first module of a name for ever, whatever the second
one looks like: two objectives of the same name would silently train each other's networks. Here a
name belongs to one live objective, and a stored parameter of another shape is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import pyro
import torch
from torch.autograd.graph import get_gradient_edge

__all__ = ["graph_leaves", "register_learned"]

_owners: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()


def register_learned(owner, name: str, module: torch.nn.Module) -> torch.nn.Module:
    """Register a module of ``owner`` with Pyro, so that the user's optimizer trains it.

    Call it in every :meth:`~pyro_vi_ext.objective.Objective.estimate`. Parameters already stored
    under the name (loaded from disk, say) replace those of the module.

    :param owner: the objective; the name is its until it is garbage, or the store is cleared.
    :param name: the name in the parameter store, the objective's keyword ``name``.
    :returns: the module.
    :raises ValueError: if another live objective owns the name, or the store holds parameters of
        other names or shapes under it.
    """
    store = pyro.get_param_store()
    prefix = name + "$$$"
    stored = {key[len(prefix) :]: key for key in store.keys() if key.startswith(prefix)}
    other = _owners.get(name)
    if stored and other is not None and other is not owner:
        raise ValueError(
            f"Two live objects, {type(other).__name__} and {type(owner).__name__}, keep learned "
            f"parts under the name '{name}'. Give an objective another name=..., register a module "
            "yourself with pyro.module, or call pyro.clear_param_store() to start afresh."
        )
    own = {key: p for key, p in module.named_parameters() if p.requires_grad}
    for key, full in stored.items():
        found = tuple(dict(store.named_parameters())[full].shape)
        expected = tuple(own[key].shape) if key in own else None
        if found != expected:
            what = f"has shape {expected} here" if expected else "does not exist here"
            raise ValueError(
                f"The parameter store holds '{full}' of shape {found}, which {what}: it belongs to "
                f"another network. Give this objective another name than '{name}', or call "
                "pyro.clear_param_store()."
            )
    _owners[name] = owner
    return pyro.module(name, module, update_module_params=True)


def graph_leaves(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The leaves that require a gradient in the graphs of tensors, each once."""
    pending = [get_gradient_edge(t).node for t in tensors if t.requires_grad]
    found, seen = [], {None}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of a node that accumulates a gradient
        if leaf is not None:
            found.append(leaf)
        pending += [child for child, _ in node.next_functions]
    return found
