"""A graph of tensor operations as one CUDA graph: all its kernels launched at once.

The kernels are recorded once, with the addresses they read and write, and replayed. Parameters and
the optimizer's state keep their addresses; arguments are copied to where the recording has them.
Random numbers are drawn anew in every replay: torch advances its generator by as much.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["CudaGraph"]


class CudaGraph:
    """A function of tensors that is recorded in its first call and replayed from then on.

    What it returns is copied, as the next replay writes to the same memory.

    :param function: of CUDA tensors, without a look at a value, in place where it likes.
    :param mutated: positions of the inputs it writes to: these are used where they are.
    """

    def __init__(self, function: Callable, mutated: list[int]):
        self.function, self.mutated = function, set(mutated)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[torch.Tensor] = []
        self._given: list[int] = []
        self._out: list[torch.Tensor] = []

    def __call__(self, *tensors: torch.Tensor):
        if self._graph is None or self._moved(tensors):
            self._record(tensors)
        for k, tensor in enumerate(tensors):
            if tensor.data_ptr() != self._given[k]:
                self._inputs[k].copy_(tensor)
        self._graph.replay()
        return [tensor.clone() for tensor in self._out]

    def _moved(self, tensors) -> bool:
        return any(tensors[k].data_ptr() != self._given[k] for k in self.mutated)

    def _record(self, tensors) -> None:
        # Arguments get a place of their own, for others are copied there.
        self._inputs = [t if k in self.mutated else t.clone() for k, t in enumerate(tensors)]
        self._given = [t.data_ptr() for t in self._inputs]
        saved = {k: tensors[k].clone() for k in self.mutated}
        rng = torch.cuda.get_rng_state(self._inputs[-1].device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries set themselves up in their first calls
                self.function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for k, value in saved.items():
            tensors[k].copy_(value)
        torch.cuda.set_rng_state(rng, self._inputs[-1].device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.function(*self._inputs)
        self._graph, self._out = graph, list(out)
