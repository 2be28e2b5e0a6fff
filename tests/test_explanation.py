"""The updates of a mixture read like the textbook's."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pyro_vi_ext.cavi import CAVI
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64


@pytest.fixture(autouse=True)
def doubles():
    with enable_x64(True):
        yield


def lines(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_mixture():
    def model(X):
        pi = numpyro.sample("pi", dist.Dirichlet(2.0 * jnp.ones(3)))
        with numpyro.plate("components", 3):
            mu = numpyro.sample("mu", dist.Normal(0.0, 0.5))
            tau = numpyro.sample("tau", dist.Gamma(3.0, 1.0))
        with numpyro.plate("data", len(X)):
            z = numpyro.sample("z", dist.Categorical(pi))
            numpyro.sample("x", dist.Normal(mu[z], 1 / jnp.sqrt(tau[z])), obs=X)

    x = np.random.default_rng(0).normal(size=8)
    found = lines(CAVI(model, x).explain())
    for expected in (
        "q(mu[i]): Gaussian, i < 3",
        "- 2 (from mu)",
        "+ sum_{n} X[n] E[tau[i]] P(z[n] = i) (from x)",
        "- 0.5 sum_{n} E[tau[i]] P(z[n] = i) (from x)",
        "variance = -1 / (2 eta[mu^2]), mean = eta[mu] variance",
        "+ 0.5 sum_{n} P(z[n] = i) (from x)",
        "- 0.5 sum_{n} X^2[n] P(z[n] = i) (from x)",
        "concentration = eta[log tau] + 1, rate = -eta[tau]",
        "q(z[i]): Categorical, i < 8",
        "+ E[log pi[k]] (from z)",
        "- 0.5 X^2[i] E[tau[k]] (from x)",
        "+ sum_{n} P(z[n] = i) (from z)",
    ):
        assert expected in found, expected


def test_groups_and_joint_axes():
    def model(y, g):
        with numpyro.plate("groups", 2):
            b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(b[g, 0] + b[g, 1], 1.0), obs=y)

    text = CAVI(model, np.arange(4.0), np.array([0, 1, 1, 0])).explain()
    assert "q(b[i, j]): joint Gaussian, i < 2, j < 2" in text
    assert "sum_{n: g[n] = i" in text and "eta[b b']" in text
    assert "j = 0" in text and "j = 1" in text
