"""The factor of one site: layouts, weights, and an exponential family whatever the family is."""

import math

import numpy as np
import pytest
import scipy.stats as st

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
import numpyro.distributions as dist  # noqa: E402

from pyro_vi_ext.cavi.factor import Factor  # noqa: E402
from pyro_vi_ext.cavi.families import FAMILIES, GaussianAxes  # noqa: E402
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def doubles():
    with enable_x64(True), dist.distribution.validation_enabled(False):
        yield


def factor(kind, shape, joint=(), num_values=0, weight=1.0):
    return Factor("s", kind, FAMILIES[kind], GaussianAxes(shape, joint), num_values, weight)


COVARIANCE = np.array([[[2.0, 0.5], [0.5, 1.0]], [[1.0, -0.3], [-0.3, 0.5]], [[1, 0], [0, 3.0]]])
LOC = np.arange(6.0).reshape(2, 3) / 5
RATES = np.array([[[2.0, 0.5], [0.5, 1.0]], [[1.0, -0.3], [-0.3, 0.5]]])
POSITIVE = np.array([[0.5, 1.5], [2.0, 0.3], [0.7, 0.9]])
LOGITS = np.log([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])


def gaussian(x):  # the joint axis is the first
    rows = zip(x.T, LOC.T, COVARIANCE, strict=True)
    return sum(st.multivariate_normal(m, c).logpdf(v) for v, m, c in rows)


def wishart(x):
    rows = zip(x, (4.0, 5.5), RATES, strict=True)
    return sum(st.wishart(nu, np.linalg.inv(rate)).logpdf(t) for t, nu, rate in rows)


def dirichlet(x):
    return sum(st.dirichlet(a).logpdf(p) for a, p in zip(POSITIVE + 1, x, strict=True))


def spd(x):
    return x @ np.swapaxes(x, -1, -2) + 0.1 * np.eye(2)


CASES = {
    "joint-gaussian": (
        factor("Normal", (2, 3), (0,)),
        {"loc": LOC, "covariance": COVARIANCE},
        lambda x: x,
        gaussian,
    ),
    "gaussian": (
        factor("Normal", (2, 3)),
        {"loc": LOC, "covariance": 1 + LOC},
        lambda x: x,
        lambda x: st.norm(LOC, np.sqrt(1 + LOC)).logpdf(x).sum(),
    ),
    "log-normal": (
        factor("LogNormal", (2, 3), (0,)),
        {"loc": LOC, "covariance": COVARIANCE},
        np.exp,
        lambda x: gaussian(np.log(x)) - np.log(x).sum(),
    ),
    "gamma": (
        factor("Gamma", (3, 2)),
        {"concentration": 1 + POSITIVE, "rate": POSITIVE},
        np.exp,
        lambda x: st.gamma(1 + POSITIVE, scale=1 / POSITIVE).logpdf(x).sum(),
    ),
    "inverse-gamma": (
        factor("InverseGamma", (3, 2)),
        {"concentration": 1 + POSITIVE, "rate": POSITIVE},
        np.exp,
        lambda x: st.invgamma(1 + POSITIVE, scale=POSITIVE).logpdf(x).sum(),
    ),
    "beta": (
        factor("Beta", (3, 2)),
        {"concentration1": 1 + POSITIVE, "concentration0": POSITIVE},
        lambda x: 1 / (1 + np.exp(-x)),
        lambda x: st.beta(1 + POSITIVE, POSITIVE).logpdf(x).sum(),
    ),
    "dirichlet": (
        factor("Dirichlet", (3, 2)),
        {"concentration": 1 + POSITIVE},
        lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
        dirichlet,
    ),
    "wishart": (
        factor("Wishart", (2, 2, 2)),
        {"concentration": np.array([4.0, 5.5]), "rate_matrix": RATES},
        spd,
        wishart,
    ),
    "categorical": (
        factor("CategoricalProbs", (2,), num_values=3, weight=2.5),
        {"logits": LOGITS},
        lambda x: (x > 0).astype(int) + (x > 1),
        lambda x: LOGITS[[0, 1], x].sum(),
    ),
    "bernoulli": (
        factor("BernoulliProbs", (2,), num_values=2),
        {"logits": np.log([[0.2, 0.8], [0.6, 0.4]])},
        lambda x: (x > 0).astype(int),
        lambda x: np.log([[0.2, 0.8], [0.6, 0.4]])[[0, 1], x].sum(),
    ),
}
slow = pytest.mark.slow
DEFAULT = ("joint-gaussian", "categorical")
NAMES = [pytest.param(name, marks=() if name in DEFAULT else slow) for name in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_density_update_moments_and_entropy_agree(name):
    """log q(z) = <eta, t(z)> - A with the q of SciPy; eta and A are found from its values.

    Then the update of eta is q, <eta, E[t]> + H is A there, and stationary.
    """
    f, q, support, by_hand = CASES[name]
    rng = np.random.default_rng(0)
    values = jnp.stack([support(rng.normal(size=f.axes.shape)) for _ in range(80)])
    expected = np.array([by_hand(v) for v in values])
    q, sizes = jax.tree.map(jnp.asarray, q), {}
    statistics = jax.jit(jax.vmap(lambda v: f.statistics({"s": v})))(values)
    rows = [np.asarray(statistics[key], float).reshape(len(values), -1) for key in f.keys]
    design = np.column_stack([*rows, -np.ones(len(values))])
    solution = np.linalg.lstsq(design, expected, rcond=1e-11)[0]
    np.testing.assert_allclose(design @ solution, expected, rtol=1e-8, atol=1e-8)
    eta, start = {}, 0
    for key in f.keys:
        sizes[key] = statistics[key].shape[1:]
        count = math.prod(sizes[key])
        eta[key] = solution[start : start + count].reshape(sizes[key])
        start += count

    @jax.jit
    def run(q, eta):
        def normalizer(q):
            moments = f.moments(q)
            return sum(jnp.vdot(eta[k], moments[k]) for k in eta) + f.entropy(q) / f.weight

        log_q = jax.vmap(lambda v: f.log_density(q, {"s": v}))(values)
        updated = f.update({key: f.weight * g for key, g in eta.items()})
        value, gradient = jax.value_and_grad(normalizer)(q)
        return log_q, updated, f.moments(q), value, gradient, f.is_proper(q)

    log_q, updated, moments, value, gradient, proper = run(q, eta)
    assert bool(proper) and {key: moments[key].shape for key in moments} == sizes
    np.testing.assert_allclose(log_q, expected, rtol=1e-11)
    for key, parameter in q.items():
        np.testing.assert_allclose(updated[key], parameter, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(gradient[key], 0, atol=1e-6)
    assert float(value) == pytest.approx(solution[-1], rel=1e-8, abs=1e-8)


@slow
@pytest.mark.parametrize("name", CASES)
def test_draws(name):
    """Of the shape of the site, whatever its joint axes are, and with the moments."""
    f, q, _, _ = CASES[name]
    q, num = jax.tree.map(jnp.asarray, q), 20_000

    @jax.jit
    def run(keys):
        draws = jax.vmap(lambda key: f.draw(q, key))(keys)
        return draws, jax.vmap(f.statistics)(draws), f.moments(q)

    draws, statistics, moments = run(jax.random.split(jax.random.PRNGKey(0), num))
    assert draws["s"].shape[1:] == f.shape_of("s") == f.axes.shape and set(draws) == {"s"}
    for key in f.keys:
        error = np.maximum(statistics[key].std(0), 1e-12) / math.sqrt(num)
        assert (np.abs(statistics[key].mean(0) - moments[key]) < 4.5 * error).all(), key


def test_the_interface():
    f, q, _, _ = CASES["joint-gaussian"]
    assert f.sites == ("s",) and f.keys == ("x", "xx") and f.num_values == 0
    marginal = f.marginals(jax.tree.map(jnp.asarray, q))["s"]
    assert (marginal.batch_shape, marginal.event_shape) == ((3,), (2,))
    assert not bool(f.is_proper({"loc": LOC, "covariance": -COVARIANCE}))
    f, q, _, _ = CASES["bernoulli"]
    marginal = f.marginals(jax.tree.map(jnp.asarray, q))["s"]
    np.testing.assert_allclose(marginal.probs, [0.8, 0.4], rtol=1e-12)
