"""has_values tells tensors with values from those that stand for a shape."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyro_vi_ext.has_values import has_values


@pytest.fixture
def shape_only():
    with FakeTensorMode():
        return torch.zeros(3)


def test_tensors_and_other_things_have_values():
    assert has_values() and has_values(torch.zeros(3), torch.nn.Parameter(torch.ones(2)))
    assert has_values(None, True, 1.0, "mask")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_tensor_without_values_is_enough(shape_only, place):
    things = [torch.zeros(3), None]
    things.insert(place, shape_only)
    assert not has_values(*things)
    assert not has_values(shape_only + 1)
