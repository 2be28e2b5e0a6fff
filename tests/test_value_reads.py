"""Reads of values while a graph is made: which are let through, refused, remembered."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import util
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pyro_vi_ext.compiled.refusal import CannotCompile
from pyro_vi_ext.compiled.value_reads import ValueReads, without_values

pytestmark = pytest.mark.usefixtures("float64")

READS = {
    "item": torch.Tensor.item,
    "tolist": torch.Tensor.tolist,
    "float": float,
    "int": int,
    "bool": bool,
    "complex": complex,
    "index": lambda t: [0, 1, 2][t],
    "is_nonzero": torch.is_nonzero,
    "equal": lambda t: torch.equal(t, t),
    "allclose": lambda t: torch.allclose(t, t),
}
every_read = pytest.mark.parametrize("read", READS)


def reading(read, tensor, leaves=()):
    """What is remembered of reading a tensor beside these parameters."""
    with ValueReads(leaves) as reads:
        READS[read](tensor)
    return reads.constants


@every_read
def test_a_constant_is_remembered(read):
    constant = torch.tensor(1)
    found = reading(read, constant, [torch.zeros(2)])
    assert found and all(tensor is constant for tensor, _ in found)
    assert all(version == constant._version for _, version in found)


@every_read
def test_a_parameter_is_refused(read):
    leaf = torch.tensor(1)
    with pytest.raises(CannotCompile, match=r"value of a parameter.*test_value_reads\.py:\d+"):
        reading(read, leaf, [leaf])


@every_read
@pytest.mark.parametrize("alias", [lambda p: p.data, lambda p: p.detach(), lambda p: p[0]])
def test_another_view_of_a_parameter_is_refused(read, alias):
    leaf = torch.ones(1, dtype=torch.int64)
    with pytest.raises(CannotCompile, match="value of a parameter"):
        reading(read, alias(leaf), [torch.zeros(2), leaf])


@pytest.mark.parametrize("give", [lambda t: t.numpy(), lambda t: t.__array__()])
def test_arrays_are_refused(give):
    with ValueReads([]), pytest.raises(CannotCompile, match="NumPy at test_value_reads.py"):
        give(torch.ones(2))


def test_the_version_is_that_of_the_read():
    constant = torch.tensor(1.0)
    with ValueReads([]) as reads:
        float(constant)
        constant.add_(1.0)
        float(constant)
    (_, first), (_, second) = reads.constants
    assert first < second == constant._version


def test_nothing_else_is_a_read():
    leaf = torch.ones(3, requires_grad=True)
    with ValueReads([leaf]) as reads:
        assert len(leaf) == 3 and leaf.shape[0] == 3 and leaf.dim() == 1
        (2.0 * leaf).sum().backward()
        torch.where(leaf > 0, leaf, 0.0).unbind()
    assert reads.constants == []


def test_a_read_of_a_tensor_without_values_fails_loudly():
    with FakeTensorMode(), ValueReads([]), pytest.raises(DataDependentOutputException):
        float(torch.ones(()))


def test_losses_of_pyro_stay_tensors():
    """``.item()`` in a frame of pyro.infer gives a tensor, in any other it is a read."""
    code = compile("def item(t): return t.item()", "<frame>", "exec")
    inside, outside = {"__name__": "pyro.infer.trace_elbo"}, {"__name__": "pyro.inference"}
    exec(code, inside)
    exec(code, {"__name__": "other"} | outside)
    exec(code, outside)
    with FakeTensorMode():
        loss = torch.ones((), dtype=torch.float32, requires_grad=True) * 1
        with ValueReads([]):
            kept = inside["item"](loss)
            assert kept.dtype == torch.float64 and kept.shape == () and not kept.requires_grad
            with pytest.raises(DataDependentOutputException):
                torch.ones(()).item()
    with ValueReads([]) as reads:
        assert inside["item"](torch.tensor(2.0)) == 2.0  # a constant of the model
    assert len(reads.constants) == 1


def test_impossible_outcomes_of_enumeration_only():
    mask, values = torch.tensor([True, False]), torch.tensor([1.0, torch.nan])
    code = compile("def compute_expectation(f, *a): return f(*a)", "<frame>", "exec")
    frame = {"__name__": util.__name__}
    exec(code, frame)
    dice = frame["compute_expectation"]
    with ValueReads([]) as reads:
        assert dice(torch.Tensor.all, mask) is False
        kept = dice(torch.Tensor.masked_select, values, mask)
        selected = torch.Tensor.masked_select(values, mask)  # elsewhere as always
        everything = mask.all()
    assert kept.tolist() == [1.0, 0.0] and selected.tolist() == [1.0] and not everything
    assert reads.constants == []


def test_the_method_that_is_stood_in_for_is_there():
    """The names that are looked for exist in this version of Pyro."""
    names = util.Dice.compute_expectation.__code__.co_names
    assert {"all", "masked_select"} <= set(names)
    assert util.Dice.__module__ == "pyro.infer.util"
    assert "item" in util.torch_item.__code__.co_names
    assert util.torch_item.__module__.startswith("pyro.infer")


@pytest.mark.parametrize("fails", [False, True])
def test_without_values_is_put_back(fails):
    saved = pyro.util.torch_isnan, pyro.util.torch_isinf, torch.distributions.Distribution
    validation = dist.is_validation_enabled(), util.is_validation_enabled()
    try:
        with without_values():
            assert not pyro.util.torch_isnan(torch.tensor(torch.nan))
            assert not util.is_validation_enabled() and not dist.is_validation_enabled()
            dist.Normal(0.0, -1.0)  # is not looked at
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert saved == (pyro.util.torch_isnan, pyro.util.torch_isinf, torch.distributions.Distribution)
    assert validation == (dist.is_validation_enabled(), util.is_validation_enabled())
    assert pyro.util.torch_isnan(torch.tensor(torch.nan))


def test_a_distribution_made_before_is_not_validated_either():
    prior = dist.Normal(0.0, 1.0, validate_args=True)
    with without_values():
        assert prior.log_prob(torch.tensor(torch.nan)).isnan()
    with pytest.raises(ValueError, match="support"):
        prior.log_prob(torch.tensor(torch.nan))


def test_warnings_of_nan_do_not_look_at_values():
    with FakeTensorMode(), without_values():
        pyro.util.warn_if_nan(torch.ones(()), "loss")
