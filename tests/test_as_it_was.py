"""What a pass may not leave behind: each thing changed once, and back as it was."""

import random

import numpy as np
import pyro
import pytest
import torch
from pyro.distributions.transforms import affine_autoregressive
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pyro_vi_ext.compiled.as_it_was import as_it_was, perturbed

pytestmark = pytest.mark.usefixtures("float64")


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.latest = torch.tensor(1.0)
        self.seen = []
        self.by_name = {}


@pytest.fixture
def pair():
    """The leaves, with and without gradients, and a module."""
    net = Part()
    leaves = {"a": torch.zeros(2, requires_grad=True), "b": torch.ones(2, requires_grad=True)}
    leaves["a"].grad = torch.ones(2)
    pyro.param("kept", torch.tensor(1.0))
    return leaves, {"net": net}


def replace_buffer(leaves, net):
    net.norm.running_mean = torch.ones(2)


def replace_parameter(leaves, net):
    net.linear.bias = nn.Parameter(torch.ones(2))


def replace_attribute(leaves, net):
    net.latest = torch.tensor(2.0)


def add_attribute(leaves, net):
    net.newest = torch.tensor(2.0)


def add_buffer(leaves, net):
    net.register_buffer("newest", torch.tensor(2.0))


def remove_attribute(leaves, net):
    del net.latest


def replace_entry(leaves, net):
    pyro.get_param_store()["kept"] = torch.tensor(2.0)


def add_entry(leaves, net):
    pyro.param("newest", torch.tensor(2.0))


def keep_in_a_list(leaves, net):
    with FakeTensorMode():
        net.seen.append(torch.ones(2))


def keep_in_a_dict(leaves, net):
    with FakeTensorMode():
        net.by_name["x"] = torch.ones(2)


def state(net):
    """All tensors by their places, with the lists and dicts of the module."""
    tables = {"store": pyro.get_param_store()._params}
    for path, part in net.named_modules():
        for table in ("_buffers", "_parameters", "__dict__"):
            tables[path, table] = getattr(part, table)
    tensors = {
        (where, key): id(value)
        for where, table in tables.items()
        for key, value in table.items()
        if isinstance(value, torch.Tensor)
    }
    return tensors, len(net.seen), list(net.by_name)


@pytest.mark.parametrize(
    "change, name",
    [
        (replace_buffer, "'net.norm.running_mean'"),
        (replace_parameter, "'net.linear.bias'"),
        (replace_attribute, "'net.latest'"),
        (add_attribute, "'net.newest'"),
        (add_buffer, "'net.newest'"),
        (remove_attribute, "'net.latest'"),
        (replace_entry, "'kept'"),
        (add_entry, "'newest'"),
        (keep_in_a_list, "'net.seen'"),
        (keep_in_a_dict, "'net.by_name'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("fails", [False, True])
def test_a_replaced_tensor_is_named_and_put_back(pair, change, name, fails):
    leaves, modules = pair
    before = state(modules["net"])
    try:
        with as_it_was(leaves, modules) as replaced:
            assert replaced() is None
            change(leaves, modules["net"])
            assert state(modules["net"]) != before
            assert name in replaced()
            if fails:
                raise ArithmeticError
    except ArithmeticError:
        assert fails
    assert state(modules["net"]) == before


def test_gradients_and_random_states(pair):
    leaves, modules = pair
    gradient = leaves["a"].grad
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with as_it_was(leaves, modules) as replaced:
        leaves["a"].grad, leaves["b"].grad = None, torch.ones(2)
        torch.rand(1), random.random(), np.random.rand()
        assert replaced() is None
    assert leaves["a"].grad is gradient and leaves["b"].grad is None
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_the_memory_of_a_flow_is_put_back_and_no_replacement():
    flow = affine_autoregressive(2)
    flow(torch.randn(3, 2))
    latest = flow._cached_log_scale
    with as_it_was({}, {"flow": flow}) as replaced:
        flow(torch.randn(3, 2))
        assert flow._cached_log_scale is not latest and replaced() is None
    assert flow._cached_log_scale is latest


@pytest.mark.parametrize("fails", [False, True])
def test_perturbed_parameters_come_back_bit_for_bit(fails):
    values = [torch.tensor([0.0, -0.0, 0.1, -3.0, 1e30, torch.inf]), torch.tensor([1, 2])]
    tensors = [values[0].clone().requires_grad_(), values[1].clone()]
    try:
        with perturbed(tensors):
            moved = (tensors[0] != values[0])[:5]
            assert moved.all() and torch.equal(tensors[1], values[1])  # whole numbers stay
            if fails:
                raise ArithmeticError
    except ArithmeticError:
        assert fails
    assert all(map(torch.equal, tensors, values))
    assert torch.equal(tensors[0].signbit(), values[0].signbit())
