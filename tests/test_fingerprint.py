"""Fingerprints of graphs: what makes two graphs the same, and how a difference is told."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vi_ext.compiled.fingerprint import RecordLines, check_same_operations, fingerprint
from pyro_vi_ext.compiled.refusal import CannotCompile


def graph_of(function):
    return make_fx(function, tracing_mode="fake")(torch.ones(3), torch.ones(3))


def print_of(function):
    return fingerprint(graph_of(function))


def test_fingerprints():
    same = print_of(lambda x, y: x + 2.0 * y)
    assert same == print_of(lambda a, b: a + 2.0 * b)
    others = [
        lambda x, y: x + 3.0 * y,
        lambda x, y: y + 2.0 * x,
        lambda x, y: x - 2.0 * y,
        lambda x, y: x + 2 * y,
        lambda x, y: (x + 2.0 * y,),
        lambda x, y: (x + 2.0 * y).sum(),
    ]
    assert len({same, *map(print_of, others)}) == 7


def test_a_number_that_is_not_one_is_equal_to_itself():
    assert print_of(lambda x, y: x * torch.nan) == print_of(lambda x, y: x * torch.nan)


def test_literals_are_compared_by_value():
    """A list of the code is a tensor that the graph holds."""
    first = print_of(lambda x, y: x + torch.tensor([1.0, 2.0, 3.0]))
    assert first == print_of(lambda x, y: x + torch.tensor([1.0, 2.0, 3.0]))
    assert first != print_of(lambda x, y: x + torch.tensor([1.0, 2.0, 4.0]))
    assert first != print_of(lambda x, y: x + torch.tensor([1, 2, 3]))


def loop_of(step):
    """A graph with graphs in it."""
    from torch._higher_order_ops.while_loop import while_loop_op

    more, body = (
        make_fx(f)(torch.ones(3), torch.ones(3)) for f in (lambda x, y: x.sum() < 9, step)
    )
    root = torch.nn.Module()
    root.more, root.body = more, body
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    args = (graph.get_attr("more"), graph.get_attr("body"), (x,), (y,))
    graph.output(graph.call_function(while_loop_op, args))
    return torch.fx.GraphModule(root, graph)


def test_a_graph_in_a_graph():
    first = fingerprint(loop_of(lambda x, y: (x + y,)))
    assert first == fingerprint(loop_of(lambda a, b: (a + b,)))
    assert first != fingerprint(loop_of(lambda x, y: (x + y + 1.0,)))


def test_the_same_operations_pass():
    check_same_operations(graph_of(lambda x, y: x + y), graph_of(lambda a, b: a + b))


def test_a_difference_is_shown_at_its_line():
    def other(x, y):
        with RecordLines():
            return x * y + 3.0

    with pytest.raises(
        CannotCompile, match=r"aten\.add.*2\.0.* in one, .*3\.0.* in the other"
    ) as e:
        check_same_operations(graph_of(lambda x, y: x * y + 2.0), graph_of(other))
    assert "test_fingerprint.py" in str(e.value) and "return x * y + 3.0" in str(e.value)


def test_more_operations_than_in_the_other():
    def longer(x, y):
        x + y
        return x + y

    with pytest.raises(CannotCompile, match="Two calls"):
        check_same_operations(graph_of(lambda x, y: x + y), graph_of(longer))
