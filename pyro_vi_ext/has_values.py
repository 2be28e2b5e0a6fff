"""Whether a tensor has values to look at.

While a step is compiled (:class:`~pyro_vi_ext.compiled.CompiledSVI`), model, guide and objective
run on tensors of shapes and types alone. A check of values has nothing to check there, and is made
by the plain steps that the compiled one is compared with.
"""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["has_values"]


def has_values(*things) -> bool:
    """Whether none of the things is a tensor that stands for a shape only.

    Example:

    >>> import torch
    >>> from pyro_vi_ext.has_values import has_values
    >>> has_values(torch.zeros(3))
    True
    """
    return not any(isinstance(thing, FakeTensor) for thing in things)
