"""The arguments of a step: tensors are inputs of the graph, everything else is part of its key.

A number, a string or ``None`` among the arguments is a constant of the graph; with another value
the step is compiled again. Objects are told apart by identity. Only the values of tensors are free.
"""

from __future__ import annotations

import dataclasses
import numbers
import operator

import numpy as np
import torch
from torch.utils import _pytree as pytree

from pyro_vi_ext.compiled.refusal import CannotCompile

__all__ = ["Arguments"]


class Arguments:
    """The arguments of one call, taken apart.

    :ivar tensors: the tensors in tuples, lists and dicts of the arguments, in order.
    :ivar key: what a graph depends on: structure, shapes, strides, types, devices, other values.
    :raises CannotCompile: for an array, and a tensor that requires a gradient.
    """

    __slots__ = ("_others", "_places", "_spec", "key", "tensors")

    def __init__(self, args: tuple, kwargs: dict):
        if not kwargs and all(type(x) is torch.Tensor for x in args):  # the fast way
            self._spec, self._others, self.tensors = None, None, list(args)
            self._places = list(map(_place, args))
            self.key = tuple(map(_kind, args))
            return
        leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self.tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        self._places = None
        self._others = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        self.key = (self._spec, *map(_kind, leaves))

    @property
    def objects(self) -> list:
        """What is neither a tensor nor a number or string."""
        return [kind.thing for kind in self.key if type(kind) is _Same]

    def are(self, args: tuple) -> bool:
        """Whether ``args`` are these very tensors, with the shapes and the memory they had."""
        return (
            self._places is not None
            and len(args) == len(self.tensors)
            and all(map(operator.is_, args, self.tensors))
            and list(map(_place, args)) == self._places
        )

    def rebuild(self, tensors):
        """The arguments with other tensors in the same places."""
        if self._spec is None:
            return tuple(tensors), {}
        tensors = iter(tensors)
        kinds = self.key[1:]
        leaves = [
            next(tensors) if type(kind) is _TensorKind else other
            for kind, other in zip(kinds, self._others, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._spec)


_STRIDED = torch.strided


def _place(x: torch.Tensor):
    return x.shape, x.data_ptr() if x.layout is _STRIDED else None


class _TensorKind(tuple):
    """Shape, stride, dtype and device of a tensor."""

    __slots__ = ()


def _kind(x):
    if isinstance(x, torch.Tensor):
        if x.requires_grad:
            raise CannotCompile(
                "An argument is a tensor that requires a gradient, which a compiled step does not "
                "give it. Detach it, or make it a pyro.param."
            )
        return _TensorKind((x.shape, x.stride(), x.dtype, x.device))
    if isinstance(x, np.ndarray):
        raise CannotCompile(
            "An argument is a NumPy array, whose values would be part of the graph. Pass a tensor: "
            "torch.as_tensor(array)."
        )
    if x is None or isinstance(x, (str, bytes, numbers.Number)):
        return type(x), repr(x)  # -0.0 is another number than 0.0, and nan is itself
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        raise CannotCompile(
            f"An argument is a dataclass, {type(x).__name__}, whose fields cannot be followed. "
            "Pass the fields, or dataclasses.asdict of it."
        )
    return _Same(x)


class _Same:
    """An object as a key: equal to itself only, and alive as long as the key."""

    __slots__ = ("thing",)

    def __init__(self, thing):
        self.thing = thing

    def __eq__(self, other):
        return type(other) is _Same and other.thing is self.thing

    def __hash__(self):
        return id(self.thing)
