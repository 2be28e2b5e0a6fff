"""What a graph computes, in a form that can be compared: the key of a cache, a check of a record.

Two graphs have one fingerprint if they apply the same operations to the same things in the same
order, whatever their nodes are called.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vi_ext.compiled.refusal import CannotCompile, user_line
from pyro_vi_ext.compiled.value_reads import REMEDY

__all__ = ["RecordLines", "check_same_operations", "fingerprint"]


def fingerprint(graph: GraphModule) -> tuple:
    """The graph, operation by operation."""
    numbers: dict[Node, int] = {}
    lines = []
    for node in graph.graph.nodes:
        numbers[node] = len(numbers)
        if node.op == "get_attr":
            value = getattr(graph, node.target)
            what = _literal(value) if isinstance(value, torch.Tensor) else fingerprint(value)
        else:
            what = "" if node.op == "placeholder" else str(node.target)
        lines.append((node.op, what, _plain(node.args, numbers), _plain(node.kwargs, numbers)))
    return tuple(lines)


def _literal(tensor: torch.Tensor) -> tuple:
    return str(tensor.dtype), tuple(tensor.shape), str(tensor.tolist())


def _plain(value, numbers):
    if isinstance(value, Node):
        return "%", numbers[value]
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item, numbers) for item in value)
    if isinstance(value, dict):
        return tuple((key, _plain(item, numbers)) for key, item in value.items())
    return repr(value)  # a float that is not a number is equal to itself too


def check_same_operations(first: GraphModule, second: GraphModule) -> None:
    """Whether two records of one pass are the same, operation by operation.

    :param second: made under :class:`RecordLines`, so that a difference is shown at its line.
    :raises CannotCompile: with the first operation that differs.
    """
    nodes = list(second.graph.nodes)
    one, other = fingerprint(first), fingerprint(second)
    for k, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            raise CannotCompile(
                "Two calls with the same arguments differ in what they compute"
                f"{_line_of(nodes[k])}: {_show(a)} in one, {_show(b)} in the other. It depends on "
                "the value of a parameter, on random numbers that are not torch's, or on a state "
                f"of Python. {REMEDY}"
            )
    if len(one) != len(other):
        raise CannotCompile(
            f"Two calls with the same arguments make {len(one)} and {len(other)} operations. "
            f"{REMEDY}"
        )


def _show(line: tuple) -> str:
    op, what, args, _ = line
    shown = [str(a) for a in args if not (isinstance(a, tuple) and a[:1] == ("%",))]
    return f"{what}({', '.join(shown)})" if what else op


class RecordLines(TorchDispatchMode):
    """Writes the user's line beside each operation of a record."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        recording = get_proxy_mode()
        if recording is not None:
            next(iter(reversed(recording.tracer.graph.nodes))).meta["line"] = user_line()
        return out


def _line_of(node: Node) -> str:
    line = node.meta.get("line")
    return f" at {line}" if line else ""
