"""Arguments: which calls share a graph, and what is put back together."""

from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch

from pyro_vi_ext.compiled.arguments import Arguments
from pyro_vi_ext.compiled.refusal import CannotCompile

Batch = namedtuple("Batch", "x, y")
THING, OTHER = object(), object()


def key(*args, **kwargs):
    return Arguments(args, kwargs).key


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


SAME = {
    "values": (key(zeros(3)), key(torch.ones(3))),
    "none at all": (key(), key()),
    "nested": (key([zeros(2), {"a": zeros(1)}], n=3), key([zeros(2) + 1, {"a": zeros(1)}], n=3)),
    "numbers": (key(zeros(2), 3, 0.5, "a", None), key(zeros(2), 3, 0.5, "a", None)),
    "one object": (key(zeros(2), THING), key(zeros(2), THING)),
    "keywords": (key(x=zeros(2), flag=True), key(x=zeros(2), flag=True)),
    "a slice": (key(zeros(5)[1:3]), key(zeros(2))),
}
DIFFERENT = {
    "shape": (key(zeros(3)), key(zeros(4))),
    "dimensions": (key(zeros(3)), key(zeros(1, 3))),
    "dtype": (key(zeros(3)), key(zeros(3, dtype=torch.int64))),
    "precision": (key(zeros(3)), key(zeros(3, dtype=torch.float64))),
    "stride": (key(zeros(2, 3)), key(zeros(3, 2).T)),
    "device": (key(zeros(3)), key(zeros(3, device="meta"))),
    "how many": (key(zeros(3)), key(zeros(3), zeros(3))),
    "one without": (key(zeros(3)), key(zeros(3), None)),
    "order": (key(zeros(2), zeros(3)), key(zeros(3), zeros(2))),
    "number": (key(zeros(2), 3), key(zeros(2), 4)),
    "type of number": (key(zeros(2), 1), key(zeros(2), 1.0)),
    "truth and one": (key(zeros(2), 1), key(zeros(2), True)),
    "sign of zero": (key(zeros(2), 0.0), key(zeros(2), -0.0)),
    "number of NumPy": (key(zeros(2), 1.0), key(zeros(2), np.float64(1.0))),
    "text": (key(zeros(2), "a"), key(zeros(2), "b")),
    "text and bytes": (key(zeros(2), "a"), key(zeros(2), b"a")),
    "nothing and zero": (key(zeros(2), None), key(zeros(2), 0)),
    "tensor and number": (key(zeros(2), zeros(())), key(zeros(2), 0.0)),
    "object": (key(zeros(2), THING), key(zeros(2), OTHER)),
    "keyword": (key(x=zeros(2)), key(y=zeros(2))),
    "by position": (key(zeros(2)), key(x=zeros(2))),
    "list and tuple": (key([zeros(2)]), key((zeros(2),))),
    "depth": (key([zeros(2)], zeros(2)), key([zeros(2), zeros(2)])),
    "key of a dict": (key({"a": zeros(2)}), key({"b": zeros(2)})),
    "place of a number": (key([1, 2], zeros(2)), key([2, 1], zeros(2))),
}


@pytest.mark.parametrize("pair", SAME)
def test_calls_of_one_kind(pair):
    one, other = SAME[pair]
    assert one == other and hash(one) == hash(other) and len({one, other}) == 1


@pytest.mark.parametrize("pair", DIFFERENT)
def test_calls_of_two_kinds(pair):
    one, other = DIFFERENT[pair]
    assert one != other and len({one, other}) == 2


def test_an_object_lives_as_long_as_its_key():
    """Otherwise another object of the same address could take its place."""

    class Thing:
        pass

    first = key(zeros(2), Thing())
    assert all(first != key(zeros(2), Thing()) for _ in range(100))


CALLS = {
    "positional": ((zeros(2), torch.ones(3)), {}),
    "none at all": ((), {}),
    "keywords": ((zeros(2),), {"scale": torch.ones(()), "flag": None}),
    "nested": (
        ([zeros(1), (torch.ones(2), "a")], {"b": torch.full((2,), 2.0), "a": 3}),
        {"more": Batch(torch.full((1,), 4.0), OrderedDict(z=torch.full((1,), 5.0)))},
    ),
    "twice the same": ((THING, zeros(2), zeros(2)), {}),
}


def flat(value):
    if isinstance(value, dict):
        return [type(value), [(name, flat(item)) for name, item in value.items()]]
    if isinstance(value, (tuple, list)):
        return [type(value), [flat(item) for item in value]]
    return value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("call", CALLS)
def test_rebuild_is_the_inverse(call):
    args, kwargs = CALLS[call]
    arguments = Arguments(args, kwargs)
    rebuilt = arguments.rebuild(arguments.tensors)
    assert flat(rebuilt) == flat((args, kwargs))
    others = [tensor + 10.0 for tensor in arguments.tensors]
    changed = arguments.rebuild(others)
    assert [t.tolist() for t in Arguments(*changed).tensors] == [t.tolist() for t in others]
    assert Arguments(*changed).key == arguments.key
    assert flat(arguments.rebuild(arguments.tensors)) == flat((args, kwargs))  # as often as wanted


def test_tensors_are_those_of_the_call_in_order():
    x, y, z = zeros(1), zeros(2), zeros(3)
    assert [id(t) for t in Arguments((x, y, x), {}).tensors] == [id(x), id(y), id(x)]
    assert [id(t) for t in Arguments(([x, {"a": y}],), {"z": z}).tensors] == [id(x), id(y), id(z)]


def test_a_subclass_of_tensor_is_a_tensor():
    arguments = Arguments((torch.nn.Parameter(zeros(2), requires_grad=False), 1), {})
    assert len(arguments.tensors) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_what_is_refused(nested):
    def wrapped(x):
        return (({"x": [x]},), {}) if nested else ((x,), {})

    with pytest.raises(CannotCompile, match=r"requires a gradient.*pyro\.param"):
        Arguments(*wrapped(zeros(2).requires_grad_()))
    with pytest.raises(CannotCompile, match="torch.as_tensor"):
        Arguments(*wrapped(np.zeros(2)))


def test_the_very_same_arguments():
    x, y = torch.ones(3), torch.ones(3)
    arguments = Arguments((x, y), {})
    assert arguments.are((x, y))
    assert not arguments.are((y, x)) and not arguments.are((x,))
    x.add_(1.0)
    assert arguments.are((x, y))
    x.data = torch.ones(3, dtype=torch.float64)
    assert not arguments.are((x, y))
    y.resize_(2)
    assert not Arguments((x, torch.ones(3)), {}).are((x, y))
    assert not Arguments((x, 1.0), {}).are((x, 1.0))
