"""What a run returns: marginals, draws and the density of q, of factors written by hand."""

import math

import numpy as np
import pytest
import scipy.stats as st

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
import numpyro.distributions as dist  # noqa: E402

from pyro_vi_ext.cavi import CAVIResult, MeanField  # noqa: E402
from pyro_vi_ext.cavi.factor import Factor  # noqa: E402
from pyro_vi_ext.cavi.families import FAMILIES, GaussianAxes  # noqa: E402
from pyro_vi_ext.cavi.gaussian_block import GaussianBlock  # noqa: E402
from pyro_vi_ext.cavi.gaussian_layout import Member, Precision  # noqa: E402
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def doubles():
    with enable_x64(True), dist.distribution.validation_enabled(False):
        yield


LOC, SCALE, NU, RATE = np.array([0.5, -1.0]), np.array([2.0, 0.5]), np.array([6.0, 9.0]), 3.0
PROBS = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])


@pytest.fixture(scope="module")
def q():
    """mu, tau: Normal-Gammas; w: a joint Gaussian; z: labels."""
    block = GaussianBlock((Member("mu", (2,), (0,)),), (2,), Precision("tau", "Gamma", (2,), (0,)))
    w = Factor("w", "Normal", FAMILIES["Normal"], GaussianAxes((2, 3), (0,)))
    axes = GaussianAxes((2,))
    z = Factor("z", "CategoricalProbs", FAMILIES["CategoricalProbs"], axes, 3)
    params = {
        "mu, tau": {
            "loc": LOC[:, None, None],
            "covariance": SCALE[:, None, None],
            "concentration": NU,
            "rate_matrix": np.full((2, 1, 1), RATE),
        },
        "w": {"loc": np.ones((2, 3)), "covariance": np.tile([[2.0, 0.5], [0.5, 1.0]], (3, 1, 1))},
        "z": {"logits": np.log(PROBS)},
    }
    params = jax.tree.map(jnp.asarray, params)
    return MeanField({factor.name: factor for factor in (block, w, z)}, params)


@pytest.fixture(scope="module")
def draws(q):
    return q.sample(jax.random.PRNGKey(0), (2, 2_000))


def log_block(mu, tau):
    gamma = st.gamma(NU / 2, scale=2 / RATE).logpdf(tau)
    return (gamma + st.norm(LOC, np.sqrt(SCALE / tau)).logpdf(mu)).sum(-1)


def log_w(w):
    normal = st.multivariate_normal([1.0, 1.0], [[2.0, 0.5], [0.5, 1.0]])
    return normal.logpdf(np.moveaxis(w, -2, -1)).sum(-1)


def log_z(z):
    return np.log(np.where(z == 0, PROBS[:, 0], np.where(z == 1, PROBS[:, 1], PROBS[:, 2]))).sum(-1)


SHAPES = {"mu": (2,), "tau": (2,), "w": (2, 3), "z": (2,)}


def test_draws_and_their_density_have_the_shapes_of_the_model(q, draws):
    assert {name: value.shape for name, value in draws.items()} == {
        name: (2, 2_000, *own) for name, own in SHAPES.items()
    }
    assert draws["z"].dtype.kind == "i"
    some = {name: np.asarray(value)[:, :3] for name, value in draws.items()}
    expected = log_block(some["mu"], some["tau"]) + log_w(some["w"]) + log_z(some["z"])
    assert expected.shape == (2, 3)
    np.testing.assert_allclose(q.log_density(some), expected, rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (5,), 5])
def test_sample_shapes(q, shape):
    values = q.sample(jax.random.PRNGKey(1), shape)
    first = (shape,) if isinstance(shape, int) else shape
    assert {name: value.shape[: len(first)] for name, value in values.items()} == dict.fromkeys(
        SHAPES, first
    )
    values = {name: np.asarray(value) for name, value in values.items()}
    expected = log_block(values["mu"], values["tau"]) + log_w(values["w"]) + log_z(values["z"])
    found = q.log_density(values)
    assert found.shape == first
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_draws_of_a_block_are_joint(draws):
    """E[tau (mu - m)^2] is the variance given tau = 1; mu and w have the moments of marginals."""
    num = 4_000
    tau, mu, w, z = (np.asarray(draws[n]).reshape(num, *SHAPES[n]) for n in ("tau", "mu", "w", "z"))

    def agrees(x, expected):
        error = x.std(0) / math.sqrt(num)
        return (np.abs(x.mean(0) - expected) < 4 * error).all()

    assert agrees(tau * (mu - LOC) ** 2, SCALE)
    assert not agrees(np.roll(tau, 1, 0) * (mu - LOC) ** 2, SCALE)  # not joint
    assert agrees(tau, NU / RATE) and agrees(mu, LOC) and agrees(w, 1.0)
    assert agrees(np.eye(3)[z], PROBS)


def test_factors_are_drawn_independently():
    factors = [Factor(n, "Normal", FAMILIES["Normal"], GaussianAxes(())) for n in ("a", "b")]
    one = {"loc": jnp.zeros(()), "covariance": jnp.ones(())}
    draws = MeanField({f.name: f for f in factors}, {"a": one, "b": one}).sample(
        jax.random.PRNGKey(0), (1_000,)
    )
    product = np.asarray(draws["a"] * draws["b"])
    assert abs(product.mean()) < 4 * product.std() / math.sqrt(1_000)


def test_marginals(q):
    found = q.posterior
    assert list(found) == ["mu", "tau", "w", "z"]
    x = np.array([0.3, 0.4])
    expected = st.t(NU, LOC, np.sqrt(SCALE * RATE / NU)).logpdf(x)
    np.testing.assert_allclose(found["mu"].log_prob(x), expected, rtol=1e-11)
    expected = st.gamma(NU / 2, scale=2 / RATE).logpdf(x)
    np.testing.assert_allclose(found["tau"].log_prob(x), expected, rtol=1e-11)
    assert (found["w"].batch_shape, found["w"].event_shape) == ((3,), (2,))
    np.testing.assert_allclose(found["z"].probs, PROBS, rtol=1e-11)


def test_the_density_of_some_factors(q, draws):
    some = {name: np.asarray(value)[1, :5] for name, value in draws.items()}
    block = {name: some[name] for name in ("tau", "mu")}
    np.testing.assert_allclose(q.log_density(block), log_block(some["mu"], some["tau"]), rtol=1e-11)
    one = {"w": some["w"], "z": some["z"]}
    np.testing.assert_allclose(q.log_density(one), log_w(some["w"]) + log_z(some["z"]), rtol=1e-11)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"nope": 1.0}, "Site 'nope' is none of q: found mu, tau, w, z"),
        ({"mu": np.ones(2)}, "Give 'tau' too: it has a joint factor with 'mu'"),
        ({"w": np.ones((2, 3)), "tau": np.ones(2)}, "Give 'mu' too"),
        ({}, "needs values of one site at least"),
        ({"w": np.ones((3, 2))}, r"Site 'w' has shape \(2, 3\), found \(3, 2\)"),
        ({"w": np.ones(3)}, r"Site 'w' has shape \(2, 3\), found \(3,\)"),
        ({"w": np.ones((5, 2, 3)), "z": np.ones((4, 2), int)}, "different sample shapes"),
        ({"w": np.ones((5, 2, 3)), "z": np.ones(2, int)}, "different sample shapes"),
    ],
)
def test_values_that_are_refused(q, values, message):
    with pytest.raises(ValueError, match=message):
        q.log_density(values)


def test_the_result_of_a_run(q):
    result = CAVIResult(q.factors, q.params, np.array([3.0, 2.5]), {}, np.array([-2.5]))
    assert result.bound == -2.5
    assert repr(result) == (
        "CAVIResult(bound=-2.500000 nats, 2 sweeps; mu: StudentT, tau: Gamma, "
        "w: MultivariateNormal, z: CategoricalLogits)"
    )
    assert repr(q).startswith("MeanField(mu: StudentT, tau: Gamma")
