"""Code that looks at the value of a tensor while a graph is made.

A graph is made from shapes: tensors have no values then. Where Python asks for one, there are four
cases, told apart here:

- Pyro's losses turn tensors into floats to add them up (``.item()``): the sum stays a tensor;
- ``TraceEnum_ELBO`` drops impossible outcomes only if there are any: it is made to keep all, the
  impossible ones with weight zero, which is the same sum and the same gradient;
- a constant of the model is read: its value becomes part of the graph, and the graph is thrown
  away should the constant change in place;
- a parameter, an argument or something computed is read: the graph would repeat the value of today
  for ever. That is refused, with the line that does it.
"""

from __future__ import annotations

import contextlib
import math
import sys

import pyro.util
import torch
from pyro.ops.provenance import ProvenanceTensor, detach_provenance
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributions import transforms
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from pyro_vi_ext.compiled.refusal import CannotCompile, user_line
from pyro_vi_ext.compiled.written import Written

__all__ = ["ValueReads", "without_values"]

_READS = {
    torch.Tensor.item: ".item()",
    torch.Tensor.tolist: ".tolist()",
    torch.Tensor.__float__: "float()",
    torch.Tensor.__int__: "int()",
    torch.Tensor.__index__: "an index",
    torch.Tensor.__bool__: "a condition",
    torch.Tensor.__complex__: "complex()",
    torch.is_nonzero: "a condition",
    torch.equal: "torch.equal()",
    torch.allclose: "torch.allclose()",
}
_TO_NUMPY = {torch.Tensor.numpy, torch.Tensor.__array__}

REMEDY = (
    "Compute it with tensor operations (torch.where instead of if), compute it once outside of "
    "model and guide, or give it as an argument that is not a tensor (each value is compiled "
    "once)."
)


class ValueReads(TorchFunctionMode):
    """Watches a pass of model, guide and objective for reads of values.

    :param leaves: the parameters: a read of one is refused, even where it has a value to read.
    :param written: knows what the pass has made.
    :ivar constants: the tensors whose values were read, each with the version it had.
    """

    def __init__(self, leaves, written: Written | None = None):
        super().__init__()
        self.written = written
        self.storages = {leaf.untyped_storage()._cdata for leaf in leaves}
        self.constants: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _READS or func in _TO_NUMPY:
            args = detach_provenance(args)
        if func in _READS or func in _TO_NUMPY or func in _DICE:
            caller = sys._getframe(1)
            library = caller.f_globals.get("__name__", "")
            if func in _DICE and library == "pyro.infer.util":
                if caller.f_code.co_name == "compute_expectation":
                    return _DICE[func](*args, **kwargs)
            if func is torch.Tensor.item and library.startswith("pyro.infer"):
                if isinstance(args[0], FakeTensor):
                    return args[0].detach().double()
            if func in _READS or func in _TO_NUMPY:
                for tensor in args:
                    if isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor):
                        self._read(tensor, func)
        return func(*args, **kwargs)

    def _read(self, tensor: torch.Tensor, func) -> None:
        if func in _TO_NUMPY:
            raise CannotCompile(
                f"A tensor is given to NumPy at {user_line()}, where a graph is made from shapes "
                f"and tensors have no values. {REMEDY}"
            )
        if tensor.untyped_storage()._cdata in self.storages:
            raise CannotCompile(
                f"The value of a parameter is read ({_READS[func]}) at {user_line()}: every step "
                f"would use the value it has today. {REMEDY}"
            )
        if self.written is not None and self.written.made(tensor):
            raise CannotCompile(
                f"A computed value is read ({_READS[func]}) at {user_line()}: every step would "
                f"use the value of today. {REMEDY}"
            )
        self.constants.append((tensor, tensor._version))


# What ``Dice.compute_expectation`` does to its mask of possible outcomes.


def _some_are_impossible(mask, *args, **kwargs):
    return False


def _zero_where_impossible(tensor, mask):
    return torch.where(mask, tensor, tensor.new_zeros(()))


_DICE = {
    torch.Tensor.all: _some_are_impossible,
    torch.Tensor.masked_select: _zero_where_impossible,
}


@contextlib.contextmanager
def without_values():
    """Pyro and its distributions, able to run on tensors without values.

    Validation and warnings of NaN, which look at values, are off; and the tensors that remember
    where they come from (in ``TraceGraph_ELBO``) may be made of tensors that have only a shape.
    """
    replaced = [
        (pyro.util, "torch_isnan", lambda x: False),
        (pyro.util, "torch_isinf", lambda x: False),
        # A distribution made outside of the pass keeps the validation of that time.
        (torch.distributions.Distribution, "_validate_sample", lambda self, value: None),
        (ProvenanceTensor, "__new__", _provenance_of_a_shape),
        # Indexing by a mask has a shape that depends on values; these indices do not.
        (transforms, "tril_matrix_to_vec", _tril_matrix_to_vec),
        (transforms, "vec_to_tril_matrix", _vec_to_tril_matrix),
    ]
    saved = [(owner, name, vars(owner)[name]) for owner, name, _ in replaced]
    for owner, name, stand_in in replaced:
        setattr(owner, name, stand_in)
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


def _tril_matrix_to_vec(mat, diag=0):
    rows, columns = torch.tril_indices(*mat.shape[-2:], diag, device=mat.device)
    return mat[..., rows, columns]


def _vec_to_tril_matrix(vec, diag=0):
    # n (n + 1) / 2 elements and, for each further diagonal, n more (or less)
    root = math.isqrt((1 + 2 * diag) ** 2 + 8 * vec.shape[-1] + 4 * abs(diag) * (diag + 1))
    size = (root - (1 + 2 * diag)) // 2
    rows, columns = torch.tril_indices(size, size, diag, device=vec.device)
    matrix = vec.new_zeros((*vec.shape[:-1], size, size))
    matrix[..., rows, columns] = vec
    return matrix


_new_provenance = vars(ProvenanceTensor)["__new__"]


def _provenance_of_a_shape(cls, data, provenance=frozenset(), **kwargs):
    if not isinstance(data, FakeTensor) or not provenance:
        return _new_provenance.__func__(cls, data, provenance, **kwargs)
    with _disable_current_modes():
        shell = torch.empty(0).as_subclass(cls)  # every operation is one on the tensor inside
    shell._t, shell._provenance = data, provenance
    return shell
