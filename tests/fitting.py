"""A model, a guide and targets of fit, for the tests of the training loop and its parts."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import constraints

DATA = torch.linspace(-1.0, 2.0, 10, dtype=torch.float64)


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def guide(x):
    mean = pyro.param("mean", torch.tensor(0.1))
    sd = pyro.param("sd", torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(mean, sd))


def make_svi(model=model, guide=guide, optim=None, loss=None):
    return SVI(model, guide, optim or pyro.optim.Adam({"lr": 0.05}), loss or Trace_ELBO())


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


def parameters():
    return {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}


def assert_same(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def clear(seed=0):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
