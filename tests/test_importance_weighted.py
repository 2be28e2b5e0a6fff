"""The estimators against the exact gradient, by quadrature over noise and enumeration of bits."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import RenyiELBO
from torch.distributions import constraints

from pyro_vi_ext import ImportanceWeightedELBO
from pyro_vi_ext.importance_weighted import Weights

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.7, -0.4], dtype=torch.float64)
NUM_DATA = len(X)


# --- a pair in which everything depends on everything ----------------------------------------
#
# z1 is reparameterised, b is a bit that depends on z1, z2 is reparameterised and depends on both.
# `shared` is a parameter of model and guide alike. One unit per datum.


def parameters():
    pyro.clear_param_store()
    start = {"shared": 0.4, "loc": 0.3, "log_scale": -0.2, "logit": 0.2, "slope": 0.7, "shift": 0.5}
    return {name: pyro.param(name, torch.tensor(value)) for name, value in start.items()}


def model_factors(p, z1, b, z2, x):
    return (
        dist.Normal(0.0, 1.0).log_prob(z1)
        + dist.Bernoulli(0.4).log_prob(b)
        + dist.Normal(p["shared"] * z1, 0.8).log_prob(z2)
        + dist.Normal(z2 + b * p["shared"], 0.6).log_prob(x)
    )


def guide_sites(p, x):
    """Parameters of each conditional of the guide as functions of what is upstream."""
    return {
        "z1": lambda: (p["loc"] * x + p["shared"], p["log_scale"].exp()),
        "b": lambda z1: p["logit"] + p["slope"] * z1,
        "z2": lambda z1, b: (p["slope"] * z1 + p["shift"] * b, (p["log_scale"] + 0.1).exp()),
    }


def model(x, mask=None):
    shared = pyro.param("shared")
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Bernoulli(0.4))
        z2 = pyro.sample("z2", dist.Normal(shared * z1, 0.8))
        pyro.sample("x", dist.Normal(z2 + b * shared, 0.6), obs=x)


def guide(x, mask=None):
    p = {name: pyro.param(name) for name in ("shared", "loc", "log_scale", "logit", "slope")}
    p["shift"] = pyro.param("shift")
    with pyro.plate("data", len(x)):
        sites = guide_sites(p, x)
        z1 = pyro.sample("z1", dist.Normal(*sites["z1"]()))
        b = pyro.sample("b", dist.Bernoulli(logits=sites["b"](z1)))
        pyro.sample("z2", dist.Normal(*sites["z2"](z1, b)))


def exact_bound(p, num_particles, nodes=9, masked=()):
    """E[L] summed over the data: Gauss-Hermite over each particle's noise, all values of the bits.

    :param masked: latents whose prior and guide densities are masked out.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    points = torch.as_tensor(points)
    weights = torch.as_tensor(weights / weights.sum())
    e1, e2, b = torch.meshgrid(points, points, torch.tensor([0.0, 1.0]), indexing="ij")
    w1, w2, _ = torch.meshgrid(weights, weights, torch.ones(2), indexing="ij")
    e1, e2, b, w = e1.reshape(-1), e2.reshape(-1), b.reshape(-1), (w1 * w2).reshape(-1)
    total = 0.0
    for x in X:
        sites = guide_sites(p, x)
        loc, scale = sites["z1"]()
        z1 = loc + scale * e1
        logit = sites["b"](z1)
        mean, sd = sites["z2"](z1, b)
        z2 = mean + sd * e2
        log_q = {
            "z1": dist.Normal(loc, scale).log_prob(z1),
            "b": dist.Bernoulli(logits=logit).log_prob(b),
            "z2": dist.Normal(mean, sd).log_prob(z2),
        }
        log_p = {
            "z1": dist.Normal(0.0, 1.0).log_prob(z1),
            "b": dist.Bernoulli(0.4).log_prob(b),
            "z2": dist.Normal(p["shared"] * z1, 0.8).log_prob(z2),
        }
        log_w = dist.Normal(z2 + b * p["shared"], 0.6).log_prob(x)
        log_w = log_w + sum(log_p[n] - log_q[n] for n in log_q if n not in masked)
        prob = w * log_q["b"].exp()  # of each node: noise by quadrature, bits by enumeration
        if num_particles == 1:
            total = total + (prob * log_w).sum()
        else:
            pair = torch.logaddexp(log_w[:, None], log_w[None, :]) - math.log(2)
            total = total + (prob[:, None] * prob[None, :] * pair).sum()
    return total


def gradient_draws(objective, model, guide, params, num_draws, *args):
    """num_draws independent gradients of the loss, one row each."""
    rows = []
    for _ in range(num_draws):
        loss = objective.differentiable_loss(model, guide, *args)
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        rows.append([0.0 if g is None else g.item() for g in grads])
    return torch.tensor(rows)


def z_scores(rows, exact):
    return (rows.mean(0) - exact) / (rows.std(0) / len(rows) ** 0.5 + 1e-12)


def replicated(num):
    """`num` independent copies of the data in an outer plate: many draws in one call."""
    return X.expand(num, NUM_DATA)


def model_many(x):
    with pyro.plate("copies", len(x), dim=-2):
        model(x[0])


def guide_many(x):
    with pyro.plate("copies", len(x), dim=-2):
        guide(x[0])


def many_gradients(objective, num_draws, model=model_many, guide=guide_many, copies=200):
    """Batches of means over `copies` independent copies, as rows."""
    params = parameters()
    rows = gradient_draws(objective, model, guide, params, num_draws, replicated(copies))
    return rows / copies


def exact_gradient(num_particles, **kwargs):
    params = parameters()
    bound = exact_bound(params, num_particles, **kwargs)
    return -torch.stack(torch.autograd.grad(bound, list(params.values()))), -bound.item()


@pytest.mark.parametrize("gradient", ["pathwise", "dreg"])
def test_gradient_is_that_of_the_exact_bound(gradient):
    exact, _ = exact_gradient(2)
    rows = many_gradients(ImportanceWeightedELBO(2, gradient), 400)
    assert z_scores(rows, exact).abs().max() < 4
