"""Pairs with exact posteriors, and how to read what from_pyro_svi makes of them."""

import pyro
import pyro.distributions as dist
import torch

from pyro_vi_ext import from_pyro_svi

X = torch.tensor([0.3, -1.2, 0.8, 1.9, -0.4, 0.1, 2.2, -0.7, 0.5, -1.6], dtype=torch.float64)
N = len(X)
OBSERVED = torch.arange(N) % 3 != 1


def export(*args, **kwargs):
    kwargs.setdefault("format", "datatree")
    kwargs.setdefault("seed", 1)
    kwargs.setdefault("num_draws", 50)
    return from_pyro_svi(*args, **kwargs)


def tensor(data, group, name):
    """A variable without its chain, as a tensor."""
    values = data[group][name]
    return torch.as_tensor(values.values[0] if "chain" in values.dims else values.values)


def stats(data, name):
    return tensor(data, "sample_stats", name)


def assert_constant(data, value, tolerance=1e-10):
    """Every log-weight is the log evidence."""
    log_weight = stats(data, "log_weight")
    assert (log_weight - value).abs().max() < tolerance, (log_weight[:3], value)


def hierarchy(x, batch=None):
    """mu global, z local: x_i ~ N(z_i, 1/2), z_i ~ N(mu, 1), mu ~ N(0, 1)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.deterministic("shifted", z + 1)
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])


def hierarchy_posterior(x, batch=None):
    precision = 1 + len(x) / 1.25
    mu = pyro.sample("mu", dist.Normal(x.sum() / 1.25 / precision, precision**-0.5))
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        pyro.sample("z", dist.Normal((mu + 4 * x[index]) / 5, 5**-0.5))


def hierarchy_evidence(x):
    cov = 1.25 * torch.eye(len(x)) + 1.0
    return dist.MultivariateNormal(torch.zeros(len(x)), cov).log_prob(x)


def hand_computed(data, x):
    """log p and log q of the hierarchy, from the exported draws alone."""
    mu, z = tensor(data, "posterior", "mu"), tensor(data, "posterior", "z")
    log_lik = dist.Normal(z, 0.5).log_prob(x)
    log_p = dist.Normal(0.0, 1.0).log_prob(mu) + log_lik.sum(1)
    log_p = log_p + dist.Normal(mu[:, None], 1.0).log_prob(z).sum(1)
    precision = 1 + len(x) / 1.25
    log_q = dist.Normal(x.sum() / 1.25 / precision, precision**-0.5).log_prob(mu)
    log_q = log_q + dist.Normal((mu[:, None] + 4 * x) / 5, 5**-0.5).log_prob(z).sum(1)
    return log_lik, log_p, log_q


def plain(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def plain_guide(x):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
