"""Code from graphs: Inductor beside the graph itself, the cache in the process, no compiler.

Two graphs are compiled here, a step and a loop; what else is said of Inductor is said of these.
"""

import functools
import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vi_ext.compiled import backends
from pyro_vi_ext.compiled.backends import check_backend, compiled, has_compiler
from pyro_vi_ext.compiled.step_graph import LOOP_STEPS, loop_graph

from .test_step_graph import Made

pytestmark = pytest.mark.usefixtures("float64")
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")


class Draws(Made):
    """Draws of several kinds, one after another, and a batch norm with its buffers."""

    def model(self, x):
        super().model(x)
        pyro.sample("g", dist.Gamma(2.0, 1.0))
        with pyro.plate("some", 5, subsample_size=3):
            pyro.sample("k", dist.Bernoulli(0.3))

    def guide(self, x):
        super().guide(x)
        rate = pyro.param("rate", torch.tensor(1.5))
        pyro.sample("g", dist.Gamma(2.0, rate))
        with pyro.plate("some", 5, subsample_size=3) as i:
            pyro.sample("k", dist.Bernoulli(0.2 + 0.1 * i))


def run(code, graph, made, calls, *first):
    """Results, what is left behind, and the random state after some calls of code under a seed."""
    made.state.before_steps()
    pyro.set_rng_seed(7)
    inputs = [made.x, *(t.detach() for t in graph.inputs[len(first) + 1 :])]
    with torch.no_grad():
        results = [[t.clone() for t in code(*first, *inputs)] for _ in range(calls)]
    return results, made.tensors(), torch.get_rng_state()


def assert_same(ours, expected):
    for one, other in zip(ours[0], expected[0], strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for a, b in zip(ours[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert torch.equal(ours[2], expected[2])  # as many draws of torch's generator


@needs_compiler
def test_a_compiled_step():
    made = Draws()
    code = compiled("inductor", made.graph.graph, made.graph.inputs)
    ours = run(code, made.graph, made, 5)
    plain = Draws()
    assert_same(ours, run(plain.graph.graph, plain.graph, plain, 5))
    assert len({float(losses) for losses, _ in ours[0]}) == 5  # new draws in each call

    twin, size = Draws(), len(backends._code)  # made again, it is not compiled again
    assert compiled("inductor", twin.graph.graph, twin.graph.inputs) is code
    assert len(backends._code) == size
    assert_same(run(code, twin.graph, twin, 5), ours)


@needs_compiler
def test_a_compiled_loop():
    made = Draws()
    graph = loop_graph(made.graph)
    code = compiled("inductor", graph.graph, graph.inputs)
    limit = torch.tensor(6)
    ours = run(code, graph, made, 1, limit)
    plain = Draws()
    steps = run(plain.graph.graph, plain.graph, plain, 6)
    losses, number, finite = ours[0][0]
    assert losses.shape == (LOOP_STEPS, 1) and number == 6 and finite and limit == 6
    expected = torch.stack([row[0] for row in steps[0]])
    assert_same(([[losses[:6]]], *ours[1:]), ([[expected]], *steps[1:]))
    assert not losses[6:].any()

    shorter = run(code, graph, made, 1, torch.tensor(2))  # any number of steps, from there on
    assert shorter[0][0][1] == 2 and not shorter[0][0][0][2:].any()
    twin = Draws()
    again = loop_graph(twin.graph)
    assert compiled("inductor", again.graph, again.inputs) is code


def draws(x):
    """Of every random operation, most of a tensor that is not contiguous."""
    p, positive = torch.sigmoid(x).t(), torch.exp(x).t()
    return (
        torch.bernoulli(p),
        torch.empty_like(x).bernoulli_(0.3),  # of p's kind Inductor makes another layout
        torch.empty_like(p).bernoulli_(p),
        torch.rand(2, 3),
        torch.rand_like(p),
        torch.empty_like(p).uniform_(-1.0, 1.0),
        torch.randn(2, 3),
        torch.randn_like(p),
        torch.normal(x.t(), positive),
        torch.normal(0.5, positive),
        torch.empty_like(p).normal_(1.0, 2.0),
        torch.empty_like(p).exponential_(0.5),
        torch.empty_like(p).cauchy_(),
        torch.empty_like(p).geometric_(0.3),
        torch.empty_like(p).log_normal_(),
        torch.nn.functional.dropout(x, 0.4),
        torch.poisson(positive),
        torch.binomial(torch.full_like(p, 5.0), p),
        torch.multinomial(p, 2),
        torch.randint(7, (3,)),
        torch.randperm(6),
        torch._standard_gamma(positive),
        torch._sample_dirichlet(positive),
    )


@needs_compiler
def test_draws_are_those_of_torch(monkeypatch):
    monkeypatch.setenv("CI", "true")  # where Inductor takes an unknown operation for a mistake
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    code = compiled("inductor", graph_of(draws, x), [x])
    for seed in range(3):
        pyro.set_rng_seed(seed)
        expected, state = draws(x), torch.get_rng_state()
        pyro.set_rng_seed(seed)
        for one, other in zip(code(x), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        assert torch.equal(torch.get_rng_state(), state)


# --- the cache, with a stand-in for Inductor -----------------------------------------------------


@pytest.fixture
def made_code(monkeypatch):
    """Code that is made of nothing, and a record of what was asked for."""
    asked = []

    def make(graph, inputs):
        asked.append(graph)
        return lambda *tensors: graph(*tensors)

    monkeypatch.setattr(backends, "_inductor", make)
    monkeypatch.setattr(backends, "_code", type(backends._code)())
    return asked


def graph_of(function, *tensors):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="fake")(*tensors)


def test_code_is_kept_by_content(made_code):
    x = torch.ones(3)
    first = compiled("inductor", graph_of(lambda t: t + 1.0, x), [x])
    assert compiled("inductor", graph_of(lambda u: u + 1.0, x), [torch.zeros(3)]) is first
    assert len(made_code) == 1
    others = [
        compiled("inductor", graph_of(lambda t: t + 2.0, x), [x]),
        compiled("inductor", graph_of(lambda t: t + 1.0, x), [x.float()]),
        compiled("inductor", graph_of(lambda t: t + 1.0, x), [torch.ones(6)[::2]]),
        compiled("inductor", graph_of(lambda t: t + 1.0, x), [x]),
    ]
    assert len({first, *others}) == 4 and len(made_code) == 4


def test_settings_that_change_code(made_code, monkeypatch):
    x = torch.ones(3)
    graph = graph_of(lambda t: t + 1.0, x)
    found = [compiled("inductor", graph, [x])]
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "another")
        found.append(compiled("inductor", graph, [x]))
    torch.set_num_threads(2)
    found.append(compiled("inductor", graph, [x]))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    found.append(compiled("inductor", graph, [x]))
    torch.use_deterministic_algorithms(False)
    assert len(set(found)) == 4 and compiled("inductor", graph, [x]) is found[0]


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago(made_code, monkeypatch):
    monkeypatch.setattr(backends, "_KEPT", 3)
    x = torch.ones(3)
    graphs = [graph_of(functools.partial(torch.add, other=float(k)), x) for k in range(4)]
    codes = [compiled("inductor", graph, [x]) for graph in graphs[:3]]
    assert compiled("inductor", graphs[0], [x]) is codes[0]
    compiled("inductor", graphs[3], [x])  # in the place of graphs[1]
    assert compiled("inductor", graphs[0], [x]) is codes[0] and len(made_code) == 4
    assert compiled("inductor", graphs[1], [x]) is not codes[1] and len(backends._code) == 3


def test_eager_is_the_graph(made_code):
    x = torch.ones(3)
    graph = graph_of(lambda t: t + 1.0, x)
    assert compiled("eager", graph, [x]) is graph and not made_code


# --- which backends there are --------------------------------------------------------------------


def test_names_of_backends():
    assert check_backend("eager") == "eager"
    with pytest.raises(ValueError, match="inductor, eager, cudagraphs, got 'jit'"):
        check_backend("jit")


def test_cudagraphs_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        check_backend("cudagraphs")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check_backend("cudagraphs") == "cudagraphs"


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(backends, "has_compiler", lambda: False)
    with pytest.warns(UserWarning, match=r"C\+\+ compiler.*eager"):
        assert check_backend("inductor") == "eager"
    monkeypatch.setattr(backends, "has_compiler", lambda: True)
    assert check_backend("inductor") == "inductor"


def test_no_compiler_is_found(monkeypatch):
    from torch._inductor import config, cpp_builder

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert not has_compiler()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "c++")
    assert has_compiler()


# --- what is not public in torch -----------------------------------------------------------------


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_private_functions_of_torch_are_what_they_were():
    """If one of these fails, this torch differs from those the compiled steps were written for."""
    from torch._higher_order_ops.while_loop import while_loop_op
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._subclasses.fake_tensor import FakeTensorMode

    changed = "torch has changed {}: mend pyro_vi_ext/compiled/{}"
    known = {"model_", "example_inputs_", "config_patches"}
    assert known <= set(parameters(compile_fx)), changed.format("compile_fx", "backends.py")
    for option in ("fallback_random", "size_asserts", "cpp_wrapper"):
        what = f"the option {option} of Inductor"
        assert hasattr(config, option), changed.format(what, "backends.py")
    known = ["cond_fn", "body_fn", "carried_inputs", "additional_inputs"]
    found = parameters(type(while_loop_op).__call__)
    assert [name for name in found if name != "self"][:4] == known, changed.format(
        "while_loop_op", "step_graph.py"
    )
    known = {"shape_env", "allow_non_fake_inputs"}
    assert known <= set(parameters(FakeTensorMode)), changed.format("FakeTensorMode", "capture.py")
    assert "static_shapes" in parameters(FakeTensorMode.from_tensor), changed.format(
        "FakeTensorMode.from_tensor", "capture.py"
    )
    assert callable(get_cpp_compiler) and issubclass(InvalidCxxCompiler, Exception)
