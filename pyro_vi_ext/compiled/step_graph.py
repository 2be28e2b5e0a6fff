r"""The whole step as one graph: loss, gradients, and the optimizer's update in place.

.. math:: \ell, g = \mathrm{pass}(\theta), \qquad
    (\theta, s) \leftarrow \begin{cases} U(\theta, s, g) & \ell \text{ and } g \text{ finite} \\
    (\theta, s) & \text{otherwise.}\end{cases}

A step whose loss or gradient is not finite changes no parameter, so that its error can say so.

The loop is the same graph in the body of a ``while_loop``, until so many steps are done or one is
not finite. Everything that a step writes to travels from iteration to iteration in one flat tensor
for each dtype: an iteration costs a few allocations, not a few for each parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vi_ext.compiled.capture import Capture
from pyro_vi_ext.compiled.optimizer_state import OptimizerState
from pyro_vi_ext.compiled.refusal import CannotCompile
from pyro_vi_ext.compiled.stand_ins import stand_ins

__all__ = ["LOOP_STEPS", "StepGraph", "loop_graph", "step_graph"]

#: Steps in one call of a loop; longer runs call it again, without looking at the results.
LOOP_STEPS = 250


@dataclass
class StepGraph:
    """A graph of tensors to tensors.

    :ivar graph: the graph module.
    :ivar inputs: example inputs, the arguments' first.
    :ivar mutated: positions of the inputs that it changes.
    :ivar num_losses: of a step.
    """

    graph: GraphModule
    inputs: list[torch.Tensor]
    mutated: list[int]
    num_losses: int


def step_graph(
    capture: Capture,
    given: Sequence[torch.Tensor],
    optimizer: OptimizerState | None,
    updated: Sequence[torch.Tensor] = (),
    strict: bool = True,
    decompose: bool = True,
) -> StepGraph:
    """The pass, and the update of ``updated`` leaves if the optimizer is in the graph.

    It takes the tensor arguments, ``capture.inputs``, and ``optimizer.tensors``. It returns the
    losses, 1-D, and whether the step is finite; without an optimizer, the gradients too.

    :param updated: the trained leaves in order, then leaves whose gradient is zero.
    :param decompose: whether operations that write without saying so are taken apart; if not,
        ``mutated`` does not have what they write to.
    :param strict: whether an infinite loss is not finite; NaN never is.
    :raises CannotCompile: if two tensors share memory and the step writes to one.
    """
    own = [] if optimizer is None else optimizer.tensors
    missing = [leaf for leaf in updated if not any(leaf is t for t in capture.inputs)]
    inputs = [*given, *capture.inputs, *missing, *own]
    places = {id(tensor): k for k, tensor in enumerate(inputs)}
    num_read = len(given) + len(capture.inputs)
    mutated: list[int] = []
    num_losses = 0

    def step(*tensors):
        nonlocal num_losses
        versions = [tensor._version for tensor in tensors]
        losses, gradients = capture.graph(*tensors[:num_read])
        num_losses = len(losses)
        losses = torch.stack([loss.double() for loss in losses])
        finite = _finite([losses if strict else losses.isnan().logical_not(), *gradients])
        if optimizer is None:
            out = (losses, finite, *gradients)
        else:
            leaves = [tensors[places[id(leaf)]] for leaf in updated]
            idle = [torch.zeros_like(leaf) for leaf in leaves[len(gradients) :]]
            state = tensors[len(tensors) - len(own) :]
            optimizer.update(leaves, [*gradients, *idle], state, finite)
            out = (losses, finite)
        mutated.extend(k for k, tensor in enumerate(tensors) if tensor._version != versions[k])
        return out

    graph = _traced(step, inputs, decompose)
    mutated = sorted({*mutated, *_written_inputs(graph)})
    _check_memory(inputs, mutated, len(given))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs[: len(given)] = stand_ins(mode, given)  # the arguments themselves may go
    return StepGraph(graph, inputs, mutated, num_losses)


def _written_inputs(graph: GraphModule) -> set[int]:
    """Inputs that an operation writes to as a whole; of decomposed ones no tensor tells."""
    places = {n: k for k, n in enumerate(n for n in graph.graph.nodes if n.op == "placeholder")}
    found = set()
    for node in graph.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for argument, value in zip(schema.arguments if schema else (), node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found |= {places[value]} if value in places else set()
    return found


def _finite(tensors) -> torch.Tensor:
    """Whether all elements are finite, or true."""
    flags = [t.all() if t.dtype == torch.bool else t.isfinite().all() for t in tensors]
    return functools.reduce(torch.logical_and, [flag.to(tensors[0].device) for flag in flags])


def _check_memory(inputs: list[torch.Tensor], mutated: list[int], num_given: int) -> None:
    """:raises CannotCompile: if a tensor that is written to lies in the memory of another."""
    places = {k: _place(t) for k, t in enumerate(inputs) if k >= num_given}
    for k in mutated:
        if k < num_given or places[k] is None:
            continue
        device, start, end = places[k]
        for other, place in places.items():
            if other == k or place is None or place[0] != device:
                continue
            if place[1] < end and start < place[2]:
                raise CannotCompile(
                    f"A tensor of shape {tuple(inputs[other].shape)} that model, guide or "
                    "objective use lies in the memory of a parameter or buffer of shape "
                    f"{tuple(inputs[k].shape)} that the step changes. Use that one, or a copy."
                )


def _place(tensor: torch.Tensor):
    """Device, and first and last address; ``None`` without elements."""
    if tensor.numel() == 0 or tensor.layout != torch.strided:
        return None
    start = tensor.data_ptr()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.device, start, start + (last + 1) * tensor.element_size()


def loop_graph(step: StepGraph) -> StepGraph:
    """At most :data:`LOOP_STEPS` steps in a loop.

    It takes the number of steps, an int64 scalar, and then what a step takes. It returns the losses
    of the steps, of shape (LOOP_STEPS, number of losses), how many steps were begun, and whether
    all were finite.
    """
    from torch._higher_order_ops.while_loop import while_loop_op

    count = torch.zeros((), dtype=torch.int64, device=step.inputs[-1].device)
    mutated = set(step.mutated)
    carried = [step.inputs[k] for k in step.mutated]
    packs = _Packs(carried)

    def loop(limit, *tensors):
        constant = [t for k, t in enumerate(tensors) if k not in mutated]
        number = torch.zeros((), dtype=torch.int64, device=limit.device)
        finite = torch.ones((), dtype=torch.bool, device=limit.device)
        shape = (LOOP_STEPS, step.num_losses)
        losses = torch.zeros(shape, dtype=torch.float64, device=limit.device)
        rows = torch.arange(LOOP_STEPS, device=limit.device).unsqueeze(-1)

        def going_on(number, finite, losses, *rest):
            limit = rest[-1]
            return (number < limit) & finite

        def body(number, finite, losses, *rest):
            flat, (rows, *constant, _) = rest[: len(packs)], rest[len(packs) :]
            constant = iter(constant)
            written = iter([tensor.clone() for tensor in packs.unpack(flat)])
            all_ = [next(written if k in mutated else constant) for k in range(len(tensors))]
            loss, finite = step.graph(*all_)
            losses = torch.where(rows == number, loss, losses)
            flat = packs.pack([all_[k] for k in step.mutated])
            return (number + 1, finite, losses, *flat)

        flat = packs.pack([tensors[k] for k in step.mutated])
        number, finite, losses, *flat = while_loop_op(
            going_on, body, (number, finite, losses, *flat), (rows, *constant, limit)
        )
        for k, value in zip(step.mutated, packs.unpack(flat), strict=True):
            tensors[k].copy_(value)
        return losses, number, finite

    inputs = [count, *step.inputs]
    shifted = [k + 1 for k in step.mutated]
    return StepGraph(_traced(loop, inputs), inputs, shifted, step.num_losses)


class _Packs:
    """Tensors in one flat tensor for each dtype and device."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self.shapes = [tensor.shape for tensor in tensors]
        self.groups: dict[tuple, list[int]] = {}
        for k, tensor in enumerate(tensors):
            self.groups.setdefault((tensor.dtype, tensor.device), []).append(k)

    def __len__(self):
        return len(self.groups)

    def pack(self, tensors) -> list[torch.Tensor]:
        return [
            torch.cat([tensors[k].reshape(-1) for k in group]) for group in self.groups.values()
        ]

    def unpack(self, flat) -> list[torch.Tensor]:
        tensors: list = [None] * len(self.shapes)
        for group, vector in zip(self.groups.values(), flat, strict=True):
            sizes = [self.shapes[k].numel() for k in group]
            for k, part in zip(group, vector.split(sizes), strict=True):
                tensors[k] = part.view(self.shapes[k])
        return tensors


#: Operations that write to running statistics without saying so.
_HIDDEN_WRITES = [torch.ops.aten.native_batch_norm]


def _traced(fn, inputs, decompose: bool = True) -> GraphModule:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # slow to import

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with torch.no_grad(), mode:
        taken_apart = get_decompositions(_HIDDEN_WRITES) if decompose else {}
        graph = make_fx(fn, taken_apart)(*stand_ins(mode, inputs))
    for module in graph.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.clear()
    return graph
