"""The model/guide pairs that benchmarks/compiled.py times, all in float32.

Every function returns a :class:`Pair` that starts from the same parameters each time it is called
with the same seed; the twins in JAX (compiled_peers.py) start there too.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from torch import nn

from pyro_vi_ext import ImportanceWeightedELBO, SemiImplicitELBO, TraceRELAX_ELBO
from pyro_vi_ext.guides import AutoSemiImplicit
from pyro_vi_ext.models.bernoulli_vae import BernoulliVAE
from pyro_vi_ext.models.images import binarize, load_images
from pyro_vi_ext.models.negative_binomial import load_mites, negative_binomial

_number = itertools.count()

GROUPS, PER_GROUP = 1000, 5
HIDDEN, LATENT, BATCH = 64, 8, 100


@dataclass
class Pair:
    """What a contestant trains; ``start`` is what a twin needs to start at the same parameters."""

    model: Any
    guide: Any
    args: tuple
    objective: Any
    lr: float
    run_steps: int = 1000  # of a call of run, fewer where a step is long
    start: dict = field(default_factory=dict)


# --- eight schools, not centred ------------------------------------------------------------------

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


def schools_model(y, sigma):
    zero = y.new_zeros(())  # on the device of the data
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(zero + 5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(zero, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def eight_schools(guide_class, device):
    start = {"mu": torch.tensor(0.0), "tau": torch.tensor(1.0), "eta": torch.zeros(8)}
    start = {name: value.to(device) for name, value in start.items()}
    guide = guide_class(schools_model, init_loc_fn=init_to_value(values=start))
    data = torch.tensor(EFFECTS, device=device), torch.tensor(ERRORS, device=device)
    return Pair(schools_model, guide, data, Trace_ELBO(), 0.01, start=start)


# --- variational autoencoder, 64-64-8-64-64 ------------------------------------------------------


def vae_networks(device):
    """Encoder (location and logarithm of the scale) and decoder (logits)."""
    encoder = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT))
    decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 64))
    return encoder.to(device), decoder.to(device)


def vae_data(device):
    """Zeros and ones from a linear decoder of as many latents."""
    logits = 2.0 * torch.randn(BATCH, LATENT) @ torch.randn(LATENT, 64)
    return torch.bernoulli(logits.sigmoid()).to(device)


def vae(objective, device, run_steps=1000):
    x = vae_data(device)
    encoder, decoder = vae_networks(device)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    start = {"encoder": encoder, "decoder": decoder}
    return Pair(model, guide, (x,), objective, 1e-3, run_steps, start)


# --- hierarchical regression ---------------------------------------------------------------------


def regression_model(x, y):
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(2), 5.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(x.new_ones(2)).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_ones(())))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        a = pyro.sample("a", dist.Normal(mu[..., 0], tau[..., 0]))
        b = pyro.sample("b", dist.Normal(mu[..., 1], tau[..., 1]))
        with pyro.plate("observations", len(x), dim=-2):
            pyro.sample("y", dist.Normal(a + b * x, sigma), obs=y)


def hierarchical_regression(device):
    x = torch.randn(PER_GROUP, GROUPS)
    a, b = 1.0 + 0.5 * torch.randn(GROUPS), -2.0 + 0.7 * torch.randn(GROUPS)
    y = a + b * x + 0.3 * torch.randn_like(x)
    start = {
        "mu": torch.zeros(2),
        "tau": torch.ones(2),
        "sigma": torch.tensor(1.0),
        "a": torch.zeros(GROUPS),
        "b": torch.zeros(GROUPS),
    }
    start = {name: value.to(device) for name, value in start.items()}
    guide = AutoNormal(regression_model, init_loc_fn=init_to_value(values=start))
    data = x.to(device), y.to(device)
    return Pair(regression_model, guide, data, Trace_ELBO(), 0.01, start=start)


# --- pairs of this package's objectives ----------------------------------------------------------


def mites(device):
    guide = AutoSemiImplicit(negative_binomial)
    objective = SemiImplicitELBO(num_particles=50, num_mixing_particles=100)
    x = load_mites(dtype=torch.float32).to(device)
    guide(x)  # makes its networks
    return Pair(negative_binomial, guide.to(device), (x,), objective, 1e-3, run_steps=100)


def bernoulli_vae(device):
    images = load_images().x_train
    x = binarize(images[:BATCH]).to(device)
    pair = BernoulliVAE(images.shape[1], (200,), data_mean=images.mean(0)).to(device)
    # Several are alive at once, and a name belongs to one of them.
    objective = TraceRELAX_ELBO(hidden_dims=(200, 200), name=f"relax_{next(_number)}")
    return Pair(pair.model, pair.guide, (x,), objective, 1e-3, run_steps=100)


PAIRS = {
    "eight schools": lambda device: eight_schools(AutoNormal, device),
    "eight schools, MVN": lambda device: eight_schools(AutoMultivariateNormal, device),
    "VAE": lambda device: vae(Trace_ELBO(), device),
    "mites, semi-implicit": mites,
    "Bernoulli VAE, RELAX": bernoulli_vae,
    "VAE, DReG": lambda device: vae(ImportanceWeightedELBO(50, gradient="dreg"), device, 100),
    "regression": hierarchical_regression,
}


def make_pair(name, seed, device):
    """The pair of that name, its data and first parameters drawn from the seed."""
    pyro.set_rng_seed(seed)
    with pyro.get_param_store().scope():  # leaves nothing in the store of another pair
        return PAIRS[name](device)
