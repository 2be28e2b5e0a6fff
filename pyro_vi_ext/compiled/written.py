"""What a pass writes to, put back: buffers, data in a closure, whatever existed before it."""

from __future__ import annotations

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = ["Written", "writes_undone"]


class Written(TorchDispatchMode):
    """Remembers tensors, before they are written to, that are older than the pass.

    Even where a graph is made of tensors without values, small existing ones are written for real.

    :ivar saved: the tensors and their values.
    """

    def __init__(self):
        super().__init__()
        self.saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._known: set[int] = set()  # storages that are saved, or made in the pass
        self._made: dict[int, torch.Tensor] = {}  # alive: no other storage takes their place

    def made(self, tensor: torch.Tensor) -> bool:
        """Whether the pass has made a tensor, with a value of its own."""
        return tensor.untyped_storage()._cdata in self._made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    self._remember(tensor)
        out = func(*args, **kwargs)
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            self._note(tensor, args)
        return out

    def _remember(self, tensor) -> None:
        if not _is_real(tensor) or tensor.untyped_storage()._cdata in self._known:
            return
        with _disable_current_modes(), torch.no_grad():
            whole = tensor.detach()
            if tensor.untyped_storage().nbytes() % tensor.element_size() == 0:
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                whole = whole.as_strided((size,), (1,), 0)  # also what lies around a view
            self.saved.append((whole, whole.clone()))
        self._known.add(tensor.untyped_storage()._cdata)

    def _note(self, tensor, args) -> None:
        if not _is_real(tensor):
            return
        storage = tensor.untyped_storage()._cdata
        if storage in self._known:
            return
        given = (a for a in args if _is_real(a))
        if not any(a.untyped_storage()._cdata == storage for a in given):  # not a view
            self._known.add(storage)
            with _disable_current_modes():
                self._made[storage] = tensor.detach()

    @contextlib.contextmanager
    def put_back(self):
        """Restores the values at the end; the mode is entered where the pass is."""
        try:
            yield self
        finally:
            self._made.clear()
            with torch.no_grad():
                for tensor, value in self.saved:
                    tensor.copy_(value)


@contextlib.contextmanager
def writes_undone():
    """Runs a pass, and puts back what it has written to."""
    with Written().put_back() as written, written:
        yield


def _is_real(tensor) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and not isinstance(tensor, FakeTensor)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
    )
