"""One pass of model, guide and objective as a graph of tensor operations.

Nothing of Pyro is replaced or written again: the unmodified ``loss_and_grads`` of the objective
runs once on tensors without values (``make_fx`` in fake mode), and every operation it makes, the
backward pass with it, is recorded. Random numbers are not drawn, and no parameter or buffer
changes. In the record, tensors that exist outside of the pass are made inputs, whatever they are:
parameters, buffers, data in a closure. What is left are shapes, numbers and literals of the code.

The pass is recorded twice, the second time with other values in all parameters, and both records
must be the same operation by operation: what depends on Python's random numbers, on a counter, or
on the value of a parameter gives itself away.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vi_ext.compiled.arguments import Arguments
from pyro_vi_ext.compiled.as_it_was import as_it_was, perturbed
from pyro_vi_ext.compiled.fingerprint import RecordLines, check_same_operations
from pyro_vi_ext.compiled.refusal import CannotCompile, causes, explain
from pyro_vi_ext.compiled.stand_ins import stand_ins
from pyro_vi_ext.compiled.value_reads import REMEDY, ValueReads, without_values
from pyro_vi_ext.compiled.written import Written

__all__ = ["Capture", "capture"]


@dataclass
class Capture:
    """The graph of a pass, and the tensors that it reads.

    :ivar graph: a graph module whose placeholders are the tensor arguments, then ``inputs``, and
        which returns the losses (a tuple of scalars) and the gradients (a tuple of tensors).
    :ivar inputs: the tensors outside of the pass that it uses, parameters among them.
    :ivar trained: names of the leaves that have a gradient, in the order of the gradients.
    :ivar leaves: all leaves of the pass by their names in the parameter store.
    :ivar scalar: whether the loss is one number and not a tuple.
    :ivar constants: tensors whose values are part of the graph, with their versions.
    """

    graph: GraphModule
    inputs: list[torch.Tensor]
    trained: list[str]
    leaves: dict[str, torch.Tensor]
    scalar: bool
    constants: list[tuple[torch.Tensor, int]] = field(default_factory=list)


def capture(
    evaluate: Callable, leaves: dict[str, torch.Tensor], arguments: Arguments, modules: dict
) -> Capture:
    """The graph of ``evaluate(*args, **kwargs)``, which returns a loss and adds to ``.grad``.

    :param evaluate: returns a scalar tensor or a tuple of them.
    :param leaves: the parameters by name, unconstrained.
    :param arguments: the arguments of the call.
    :param modules: whose buffers and parameters the pass may not replace.
    :raises CannotCompile: if the pass reads values, replaces tensors, or is not the same twice.
    """
    unseen = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    with as_it_was(leaves, modules) as replaced:
        first = _record(evaluate, unseen, arguments)
        if replaced():
            raise CannotCompile(
                f"The pass puts a new tensor in the place of {replaced()}, which a graph cannot "
                "do. Update it in place (tensor.copy_, tensor.mul_); with TraceGraph_ELBO, use no "
                "decaying average baseline."
            )
        with perturbed(leaves.values()):
            second = _record(evaluate, unseen, arguments, lines=True)
    _compare(first, second)
    for node in first.graph.graph.nodes:
        node.meta.clear()
    inputs = [*first.inputs, *first.literals]
    return Capture(first.graph, inputs, first.trained, leaves, first.scalar, first.constants)


@dataclass
class _Record:
    graph: GraphModule
    inputs: list[torch.Tensor]
    literals: list[torch.Tensor]
    trained: list[str]
    scalar: bool
    constants: list


def _record(
    evaluate, leaves: dict[str, torch.Tensor], arguments: Arguments, lines: bool = False
) -> _Record:
    trained: list[str] = []
    scalar = True
    written = Written()
    reads = ValueReads(leaves.values(), written)

    def run(*tensors):
        nonlocal scalar
        args, kwargs = arguments.rebuild(tensors)
        for leaf in leaves.values():
            leaf.grad = None
        with reads, written, RecordLines() if lines else contextlib.nullcontext():
            losses = evaluate(*args, **kwargs)
        scalar = not isinstance(losses, tuple)
        losses = (losses,) if scalar else losses
        losses = tuple(torch.as_tensor(loss).detach() for loss in losses)
        gradients = []
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                trained.append(name)
                gradients.append(leaf.grad)
                leaf.grad = None
        return losses, tuple(gradients)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        written.put_back(),
        _without_mkldnn(),
        _naming_the_line(),
        without_values(),
        mode,
    ):
        given = stand_ins(mode, arguments.tensors)
        versions = [tensor._version for tensor in given]
        graph = make_fx(run)(*given)
    if any(t._version != version for t, version in zip(given, versions, strict=True)):
        raise CannotCompile("Model, guide or objective write into an argument. Copy it first.")
    inputs, literals = _lift(graph)
    if any(isinstance(tensor, FakeTensor) for tensor in inputs):
        raise CannotCompile(
            "Model, guide or objective keep a tensor of one call for the next one. Keep it in a "
            "buffer of a module and update that in place."
        )
    return _Record(graph, inputs, literals, trained, scalar, reads.constants)


@contextlib.contextmanager
def _without_mkldnn():
    """Without the library's recurrent networks, which have no graph."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TF32 acceleration")  # of others' hardware
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@contextlib.contextmanager
def _naming_the_line():
    """Turns what tracing raises into refusals with the user's line."""
    try:
        yield
    except Exception as error:
        for cause in causes(error):
            if isinstance(cause, CannotCompile):
                raise cause from None
            if isinstance(cause, NotImplementedError) and not str(cause).startswith("aten"):
                raise CannotCompile(str(cause)) from error
            for kind, (reason, remedy) in _REASONS.items():
                if isinstance(cause, kind):
                    raise explain(cause, reason, remedy) from error
        reason = f"The pass fails on tensors without values ({type(error).__name__}: {error})"
        raise explain(error, reason, "Plain SVI may take it.") from error


_REASONS = {
    DataDependentOutputException: ("The value of a tensor is read", REMEDY),
    DynamicOutputShapeException: (
        "The shape of a tensor depends on values (indexing by a mask, nonzero, unique)",
        "Use torch.where or poutine.mask instead, or compute it once outside of model and guide.",
    ),
}


# --- from constants to inputs ----------------------------------------------------------------


def _lift(graph: GraphModule) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Turn tensors of the graph into placeholders, or into operations if they are one number.

    Returns the tensors that exist outside of the pass, which come first, and the literals.
    """
    nodes = graph.graph
    held = [node for node in nodes.nodes if node.op == "get_attr"]
    outside = [node for node in held if not _is_literal(node)]
    literals = [node for node in held if _is_literal(node)]
    for node in list(literals):
        value = getattr(graph, node.target)
        if value.numel() == 1:
            with nodes.inserting_before(node):
                full = torch.ops.aten.full.default
                how = {"dtype": value.dtype, "device": value.device}
                new = nodes.call_function(full, (list(value.shape), value.item()), how)
            node.replace_all_uses_with(new)
            nodes.erase_node(node)
            literals.remove(node)

    placeholders = [node for node in nodes.nodes if node.op == "placeholder"]
    last = placeholders[-1] if placeholders else None
    lifted: dict[int, Node] = {}
    tensors: list[torch.Tensor] = []
    for node in (*outside, *literals):
        tensor = getattr(graph, node.target)
        if not isinstance(tensor, torch.Tensor):
            raise CannotCompile(
                f"The pass uses a {type(tensor).__name__} of its own. Draw from torch's global "
                "generator, and hold state in tensors."
            )
        if id(tensor) not in lifted:
            with nodes.inserting_after(last) if last else nodes.inserting_before():
                last = lifted[id(tensor)] = nodes.placeholder(f"input_{len(tensors)}")
            tensors.append(tensor)
        node.replace_all_uses_with(lifted[id(tensor)])
        nodes.erase_node(node)
    nodes.lint()
    graph.recompile()
    num_outside = len({getattr(graph, node.target) for node in outside})
    return tensors[:num_outside], tensors[num_outside:]


def _is_literal(node: Node) -> bool:
    """Whether a constant is a number of the code, ``torch.tensor(0.5)``, made in the pass."""
    return bool(node.users) and all(
        user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users
    )


# --- two records of one pass -----------------------------------------------------------------


def _compare(first: _Record, second: _Record) -> None:
    if first.trained != second.trained:
        changed = sorted(set(first.trained) ^ set(second.trained))
        raise CannotCompile(
            f"Parameter '{changed[0]}' has a gradient in one call and none in another with other "
            f"values. {REMEDY}"
        )
    for a, b in zip(first.inputs, second.inputs, strict=False):
        if a is not b:
            raise CannotCompile(
                "A tensor is made anew in every call by other means than tensor operations "
                f"(shape {tuple(b.shape)}, from NumPy perhaps). Make it once outside of model and "
                "guide, or give it as an argument."
            )
    for a, b in zip(first.literals, second.literals, strict=False):
        if a.shape != b.shape or not torch.equal(a, b):
            raise CannotCompile(
                "A tensor is made of other numbers in each of two calls with the same arguments "
                f"(shape {tuple(b.shape)}). {REMEDY}"
            )
    check_same_operations(first.graph, second.graph)
