"""From a graph to code: as it is, through Inductor, or as a captured CUDA graph.

Code is kept by the graph it was made from, in the process: the same model, guide, objective,
optimizer and shapes are compiled once, whoever asks again. Across processes Inductor's own cache on
disk takes the place of the C++ compiler.

``torch._inductor.compile_fx.compile_fx`` is not a public function. It is called directly because
what ``torch.compile`` puts around it costs more than a small model's step; shapes and types are
checked by :mod:`~pyro_vi_ext.compiled.program`. tests/test_backends.py says when it has changed.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from pyro_vi_ext.compiled.cuda_graph import CudaGraph
from pyro_vi_ext.compiled.fingerprint import fingerprint
from pyro_vi_ext.compiled.stand_ins import stand_ins

__all__ = ["BACKENDS", "check_backend", "compiled", "has_compiler"]

BACKENDS = ("inductor", "eager", "cudagraphs")

_code: OrderedDict[tuple, Callable] = OrderedDict()
_KEPT = 64


def check_backend(name: str) -> str:
    """The name of a backend that can be used here.

    :raises ValueError: for another name, and for ``"cudagraphs"`` without CUDA.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}.")
    if name == "cudagraphs" and not torch.cuda.is_available():
        raise ValueError("backend='cudagraphs' needs a CUDA device. Use 'inductor' on a CPU.")
    if name == "inductor" and not has_compiler():
        warnings.warn(
            "Inductor needs a C++ compiler and found none: the graph runs operation by operation "
            "(backend='eager'), which is slower. Install one (g++ or clang++), or set CXX to it.",
            stacklevel=3,
        )
        return "eager"
    return name


def has_compiler() -> bool:
    """Whether Inductor finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError):
        return False
    return True


def compiled(backend: str, graph: GraphModule, inputs: list, mutated=()) -> Callable:
    """A function of the inputs that runs the graph, in place where the graph is.

    :param mutated: positions of the inputs that the graph writes to.
    """
    if backend == "eager":
        return graph
    if backend == "cudagraphs":
        return CudaGraph(graph, list(mutated))  # has addresses, and so is nobody else's
    kinds = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
    threads = torch.get_num_threads()
    key = (backend, threads, _settings(), kinds, fingerprint(graph))
    if key in _code:
        _code.move_to_end(key)
        return _code[key]
    _code[key] = _inductor(graph, inputs)
    while len(_code) > _KEPT:
        _code.popitem(last=False)
    return _code[key]


def _inductor(graph: GraphModule, inputs: list) -> Callable:
    from torch._inductor import config  # slow to import
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    on_cpu = all(tensor.device.type == "cpu" for tensor in inputs)
    # Random numbers are torch's own, drawn one after another as the steps of a plain SVI draw them.
    options = {"fallback_random": True, "size_asserts": False, "cpp_wrapper": on_cpu}
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with torch.no_grad(), config.patch(options):
        examples = stand_ins(mode, inputs)
        code = compile_fx(graph, examples, config_patches=options, decompositions=_decompositions())
    # Around it is a switch for torch.compile, which has nothing to look at in here.
    return getattr(code, "_torchdynamo_orig_callable", code)


def _decompositions() -> dict:
    """Inductor's, but for Bernoulli draws, of which it makes others than torch in float64.

    They are calls of torch's kernel instead. Inductor makes such a call by itself for what it does
    not know, but where the variable CI is set it takes it for an oversight: so it is told here.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import lowerings, make_fallback

    table = dict(select_decomp_table())  # depends on fallback_random
    bernoulli = torch.ops.aten.bernoulli.default
    table.pop(bernoulli, None)
    if bernoulli not in lowerings:
        make_fallback(bernoulli, warn=False, override_decomp=True)
    return table


def _settings() -> tuple:
    return torch.are_deterministic_algorithms_enabled(), os.environ.get("CXX")
