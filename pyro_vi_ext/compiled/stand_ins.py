"""Tensors without values in the place of others: shapes, strides, types and devices alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["stand_ins"]


def stand_ins(mode: FakeTensorMode, tensors: Sequence[torch.Tensor]) -> list[FakeTensor]:
    """A tensor without values for each tensor; each has a memory of its own.

    Two arguments may be one tensor today and two tomorrow, and one may be a part of a parameter
    today: the graph must not know.
    """
    with mode:
        return [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            if t.layout == torch.strided
            else mode.from_tensor(t.detach(), static_shapes=True)
            for t in tensors
        ]
