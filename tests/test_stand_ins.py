"""Stand-ins have shapes, strides, types and devices, and no memory in common."""

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pyro_vi_ext.compiled.stand_ins import stand_ins


def test_they_are_of_the_same_kind():
    tensors = [
        torch.zeros(2, 3).t(),
        torch.zeros((), dtype=torch.float64),
        torch.arange(4).expand(2, 4),
        torch.zeros(3, requires_grad=True),
    ]
    made = stand_ins(FakeTensorMode(), tensors)
    for tensor, stand_in in zip(tensors, made, strict=True):
        assert isinstance(stand_in, FakeTensor) and not stand_in.requires_grad
        assert (stand_in.shape, stand_in.stride()) == (tensor.shape, tensor.stride())
        assert (stand_in.dtype, stand_in.device) == (tensor.dtype, tensor.device)


def test_one_tensor_twice_is_two():
    x = torch.zeros(3)
    a, b, part = stand_ins(FakeTensorMode(), [x, x, x[:2]])
    assert a is not b
    storages = {t.untyped_storage()._cdata for t in (a, b, part)}
    assert len(storages) == 3


def test_sparse():
    x = torch.eye(3).to_sparse()
    (made,) = stand_ins(FakeTensorMode(allow_non_fake_inputs=True), [x])
    assert made.layout == torch.sparse_coo and made.shape == x.shape
