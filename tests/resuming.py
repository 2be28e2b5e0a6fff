"""Runs that are interrupted and resumed: fresh targets, and all that must come out the same."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset

from pyro_vi_ext.checkpoint import get_rng_state, load_checkpoint
from pyro_vi_ext.training import fit

from .fitting import assert_same

STEPS = 10


def data():
    return torch.linspace(-1.0, 2.0, 10)


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def guide(x):
    mean = pyro.param("mean", torch.tensor(0.1))
    sd = pyro.param("sd", lambda: 0.5 + torch.rand(()), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(mean, sd))
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    pyro.sample("scale", dist.LogNormal(weights[0], weights[1]))


def svi(make_optim, guide=guide, model=model, make_loss=Trace_ELBO):
    def make():
        own = AutoNormal(model) if guide is AutoNormal else guide
        return SVI(model, own, make_optim(), make_loss())

    return make


def adam():
    return pyro.optim.Adam({"lr": 0.05})


class Noisy(Dataset):
    """Data that are random each time they are read, by all generators there are."""

    def __init__(self, generator=None):
        self.generator = generator

    def __len__(self):
        return 10

    def __getitem__(self, i):
        noise = torch.randn(()) + random.random() + np.random.random()
        noise = noise + torch.randn((), generator=self.generator)
        return data()[i] + 0.01 * noise


# Each scenario makes fresh objects: (target, args, options of fit).


def with_svi(make):
    return lambda: (make(), (data(),), {})


def with_loader(**options):
    def make():
        if options.get("generator"):
            generator = torch.Generator().manual_seed(5)
            loader = DataLoader(Noisy(generator), **{**options, "generator": generator})
        else:
            loader = DataLoader(Noisy(), **options)
        return SVI(model, guide, adam(), Trace_ELBO()), (loader,), {}

    return make


def module():
    target = Trace_ELBO(num_particles=2, vectorize_particles=True)(model, AutoNormal(model))
    options = {
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, 50),
    }
    return target, (data(),), options


function_guide = with_svi(svi(adam))


def train(make, **options):
    """Train fresh objects, and return everything that a resumed run must repeat."""
    target, args, more = make()
    result = fit(target, *args, **{"num_steps": STEPS, "progress": False, **more, **options})
    net = target if isinstance(target, torch.nn.Module) else getattr(target, "net", None)
    generators = [a.generator.get_state() for a in args if getattr(a, "generator", None)]
    return {
        "losses": result.losses,
        "store": {n: p.clone() for n, p in pyro.get_param_store().named_parameters()},
        "net": {k: v.clone() for k, v in net.state_dict().items()} if net else None,
        "rng": get_rng_state(),
        "generators": generators,
    }


def fresh(seed):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)


def interrupt_at(when):
    def callback(step, loss):
        if step == when:
            raise KeyboardInterrupt

    return callback


def check_resumed(make, when, tmp_path):
    """A run interrupted after step `when` and resumed repeats the uninterrupted one."""
    path = tmp_path / "sub" / "run.pt"
    fresh(3)
    expected = train(make, checkpoint=tmp_path / "whole.pt")
    fresh(3)
    with pytest.raises(KeyboardInterrupt):
        train(make, checkpoint=path, checkpoint_every=1000, callback=interrupt_at(when))
    assert load_checkpoint(path)["step"] == when
    fresh(77)  # a new process: other random states, empty store, fresh objects
    found = train(make, checkpoint=path)
    assert_same(found, expected)
    assert_same(load_checkpoint(path), load_checkpoint(tmp_path / "whole.pt"))
    fresh(78)  # nothing left to do: all is restored all the same
    assert_same(train(make, checkpoint=path), expected)


def check_refused(make, match, tmp_path):
    """The checkpoint ``a`` in a folder is not that of the target."""
    fresh(0)
    with pytest.raises(ValueError, match=match):
        train(make, checkpoint=tmp_path / "a")
