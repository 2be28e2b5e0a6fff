"""Where coordinate ascent begins: clusters of the data, random weights, draws of the prior."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pyro_vi_ext.cavi import CAVI
from pyro_vi_ext.cavi.starts import first_moments
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64


@pytest.fixture(autouse=True)
def doubles():
    with enable_x64(True):
        yield


def mixture(x):
    with numpyro.plate("components", 3):
        mu = numpyro.sample("mu", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(jnp.ones(3) / 3))
        numpyro.sample("x", dist.Normal(mu[z], 1.0).to_event(1), obs=x)


def clusters():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(3), 20)
    return np.array([[-9.0, 0.0], [0.0, 9.0], [9.0, 0.0]])[truth] + rng.normal(size=(60, 2)), truth


def start(cavi, key=0, restart=0):
    key = jax.random.PRNGKey(key)
    return first_moments(cavi._draws, cavi.plan, key, restart)


def test_responsibilities_start_at_clusters():
    x, truth = clusters()
    labels = np.asarray(start(CAVI(mixture, x))["z"]["onehot"]).argmax(1)
    assert len({(a, b) for a, b in zip(labels, truth, strict=True)}) == 3


def test_starts_differ_and_repeat_under_a_key():
    x = np.random.default_rng(1).normal(size=(60, 2))
    cavi = CAVI(mixture, x)
    a, b, again = start(cavi, 0, 1), start(cavi, 1, 1), start(cavi, 0, 1)
    assert not np.array_equal(a["z"]["onehot"], b["z"]["onehot"])
    assert np.array_equal(a["z"]["onehot"], again["z"]["onehot"])
    assert not np.array_equal(a["mu"]["x"], b["mu"]["x"])


def test_without_scikit_learn_weights_are_random(monkeypatch):
    """And no start is the symmetric point, in which all components are alike."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    cavi = CAVI(mixture, clusters()[0])
    monkeypatch.setattr(builtins, "__import__", without)
    weights = np.asarray(start(cavi)["z"]["onehot"])
    np.testing.assert_allclose(weights.sum(1), 1.0)
    assert weights.std(1).min() > 0
    result = cavi.run(200, num_restarts=5)
    means = np.asarray(result.posterior["mu"].mean)
    assert np.abs(means[:, None] - means[None]).max(-1)[~np.eye(3, dtype=bool)].min() > 5


def test_fewer_distinct_rows_than_clusters():
    x = np.repeat(np.array([[0.0, 1.0], [2.0, 3.0]]), 5, 0)
    weights = np.asarray(start(CAVI(mixture, x))["z"]["onehot"])
    assert weights.shape == (10, 3) and np.isfinite(weights).all()
