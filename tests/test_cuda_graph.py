"""Recording and replaying, where there is a GPU; and on a CPU, that nothing is recorded."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_vi_ext import CompiledSVI
from pyro_vi_ext.compiled.cuda_graph import CudaGraph

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Recorded:
    """Stands for torch.cuda.CUDAGraph: a replay runs the function on the recorded inputs."""

    def __init__(self, graph: CudaGraph):
        self.graph = graph

    def replay(self):
        for place, value in zip(
            self.graph._out, self.graph.function(*self.graph._inputs), strict=True
        ):
            place.copy_(value)


@pytest.fixture
def on_cpu(monkeypatch):
    """A recording without a GPU: inputs are placed as on one."""

    def record(self, tensors):
        self.records = getattr(self, "records", 0) + 1
        self._inputs = [t if k in self.mutated else t.clone() for k, t in enumerate(tensors)]
        self._given = [t.data_ptr() for t in self._inputs]
        saved = [t.clone() for t in self._inputs]
        self._out = list(self.function(*self._inputs))
        for tensor, value in zip(self._inputs, saved, strict=True):
            tensor.copy_(value)
        self._graph = Recorded(self)

    monkeypatch.setattr(CudaGraph, "_record", record)


def step(x, total):
    total.add_(x.sum())
    return [total * 2]


def test_arguments_are_copied_and_state_is_in_place(on_cpu):
    graph, total = CudaGraph(step, [1]), torch.zeros(())
    results = [graph(torch.full((3,), float(k)), total)[0] for k in range(4)]
    assert [r.item() for r in results] == [0.0, 6.0, 18.0, 36.0]  # copies: none changes later
    assert total.item() == 18.0 and graph.records == 1


def test_state_that_has_moved_is_recorded_again(on_cpu):
    graph, total = CudaGraph(step, [1]), torch.zeros(())
    graph(torch.ones(2), total)
    other = torch.ones(())
    assert graph(torch.ones(2), other)[0].item() == 6.0
    assert (total.item(), other.item(), graph.records) == (2.0, 3.0, 2)


def test_without_a_gpu():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            CompiledSVI(None, None, pyro.optim.Adam({}), Trace_ELBO(), backend="cudagraphs")


@needs_cuda
@pytest.mark.parametrize("backend", ["cudagraphs", "inductor", "eager"])
def test_steps_on_a_gpu_are_those_of_svi(backend):
    x = torch.tensor([0.3, -1.2, 0.8], device="cuda")

    def model(x):
        loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 0.5), obs=x)

    found = []
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        options = {} if kind is SVI else {"backend": backend}
        optim = pyro.optim.Adam({"lr": 0.05})
        svi = kind(model, AutoNormal(model), optim, Trace_ELBO(), **options)
        losses = [svi.step(x) for _ in range(20)]
        rest = [svi.step(x) for _ in range(20)] if kind is SVI else svi.run(20, x).tolist()
        found.append(losses + rest + [v.item() for v in pyro.get_param_store().values()])
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-5, atol=0)
