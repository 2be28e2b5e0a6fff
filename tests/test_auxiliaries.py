"""Polya-Gamma and CRT variables: against series, quadrature, enumeration and moments of draws."""

import math
from functools import partial

import numpy as np
import pytest
from scipy.special import gammaln

jax = pytest.importorskip("jax")
pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402

from pyro_vi_ext.cavi import auxiliaries  # noqa: E402
from pyro_vi_ext.cavi.auxiliaries import ChineseRestaurantTable, PolyaGamma  # noqa: E402
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64  # noqa: E402

SIZES = [0.3, 1.0, 2.5, 40.0]
TILTS = [0.0, 0.05, 3.0, 20.0]
NUM_DRAWS = 40_000


@pytest.fixture(scope="module", autouse=True)
def doubles():
    with enable_x64(True):
        yield


@pytest.fixture(scope="module")
def expectation():
    """Of a function of draws from PG(b, c), for all sizes and tilts, shape (sizes, tilts); by the
    trapezoidal rule in log omega, which converges geometrically here."""
    b, c = np.array(SIZES)[:, None], np.array(TILTS)
    fn = PolyaGamma(b, c)
    logarithm = np.log(fn.mean)[..., None] + np.linspace(-9, 9, 1001)
    log_prob = jax.jit(lambda x: PolyaGamma(b[..., None], c[:, None]).log_prob(x))
    density = np.exp(np.asarray(log_prob(np.exp(logarithm))) + logarithm)

    def integrate(function):
        return (density * function(np.exp(logarithm))).sum(-1) * 18 / 1000

    return fn, integrate


def theta_series(x):
    """The density of PG(1, 0), by the series that converges fast at small x, and at large x."""
    n, x = np.arange(60), x[:, None]
    sign = (-1.0) ** n
    small = sign * (2 * n + 1) / np.sqrt(2 * np.pi * x**3) * np.exp(-((2 * n + 1) ** 2) / (8 * x))
    large = sign * 4 * np.pi * (n + 0.5) * np.exp(-2 * (n + 0.5) ** 2 * np.pi**2 * x)
    return small.sum(-1), large.sum(-1)


def weights(num=200_000):
    """Of the Gamma variables that a Polya-Gamma variable is the sum of, without tilt."""
    return 1 / (2 * np.pi**2 * (np.arange(num) + 0.5) ** 2)


# --- Polya-Gamma ---------------------------------------------------------------------------------


def test_density_of_size_1_is_that_of_both_theta_series():
    small, large = np.geomspace(0.004, 0.3, 30), np.geomspace(0.1, 8.0, 30)
    log_prob = PolyaGamma(1.0).log_prob
    assert np.asarray(log_prob(small)) == pytest.approx(np.log(theta_series(small)[0]), abs=1e-12)
    assert np.asarray(log_prob(large)) == pytest.approx(np.log(theta_series(large)[1]), abs=1e-12)


def test_density_is_the_alternating_series():
    b, n = np.array([0.1, *SIZES])[:, None], np.arange(200)
    x = b / 4 * np.geomspace(0.05, 0.6, 9)
    terms = gammaln(n + b) - gammaln(n + 1) + np.log(2 * n + b)
    terms = terms[:, None] - (2 * n + b[..., None]) ** 2 / (8 * x[..., None])
    largest = terms.max(-1, keepdims=True)
    series = np.log(((-1.0) ** n * np.exp(terms - largest)).sum(-1)) + largest[..., 0]
    expected = series + (b - 1) * math.log(2) - gammaln(b) - 0.5 * np.log(2 * np.pi * x**3)
    cancelled = np.exp(terms - series[..., None]).sum(-1)
    error = np.abs(np.asarray(PolyaGamma(b).log_prob(x)) - expected)
    assert (error < np.maximum(1e-11, 1e-14 * cancelled)).all()


def test_density_has_the_laplace_transform_mean_and_variance(expectation):
    fn, integrate = expectation
    b, c = np.array(SIZES)[:, None], np.array(TILTS)
    assert integrate(np.ones_like) == pytest.approx(np.ones((4, 4)), abs=1e-11)
    for s in (0.3, 4.0):
        ratio = np.cosh(c / 2) / np.cosh(np.sqrt(c**2 / 4 + s / 2))
        assert integrate(lambda x, s=s: np.exp(-s * x)) == pytest.approx(ratio**b, rel=1e-10)
    mean = integrate(lambda x: x)
    assert np.asarray(fn.mean) == pytest.approx(mean, rel=1e-10)
    variance = integrate(lambda x: (x - mean[..., None]) ** 2)
    assert np.asarray(fn.variance) == pytest.approx(variance, rel=1e-9)


def test_moments_are_stable_at_all_tilts():
    tilts = np.array([0.0, 1e-6, 1e-3, 0.059, 0.061, 1.0, 50.0, 1e4])
    fn = PolyaGamma(3.0, tilts)
    for c, mean, variance in zip(tilts, np.asarray(fn.mean), np.asarray(fn.variance), strict=True):
        w = 2 / ((np.pi * (2 * np.arange(1_000_000) + 1)) ** 2 + c**2)
        tail = np.arctan2(c, 2 * np.pi * len(w)) / (np.pi * c) if c else 0.5 / np.pi**2 / len(w)
        assert mean == pytest.approx(3 * (w.sum() + tail), rel=1e-11)
        assert variance == pytest.approx(3 * (w**2).sum(), rel=1e-11)


def test_log_normalizer_generates_the_moments():
    def log_normalizer(eta):
        return PolyaGamma(2.0, jnp.sqrt(-2 * eta)).log_normalizer

    fn = PolyaGamma(2.0, 1.3)
    assert float(PolyaGamma(2.0).log_normalizer) == pytest.approx(0.0, abs=1e-15)
    assert float(jax.grad(log_normalizer)(fn.tilt)) == pytest.approx(float(fn.mean), rel=1e-12)
    second = float(jax.grad(jax.grad(log_normalizer))(fn.tilt))
    assert second == pytest.approx(float(fn.variance), rel=1e-11)


def deviations(draws, fn, c):
    """Of mean, variance and Laplace transform of draws from those of a distribution, in SE."""
    centred = draws - float(fn.mean)
    laplace = np.cosh(c / 2) / np.cosh(np.sqrt(c**2 / 4 + 1.0)) if c else 1 / np.cosh(1.0)
    rows = [centred, centred**2 - float(fn.variance), np.exp(-2 * draws) - laplace ** float(fn.b)]
    return np.array([abs(r.mean()) / (r.std() / math.sqrt(len(r))) for r in rows])


@pytest.mark.parametrize("b, c", [(1.0, 0.0), (0.3, 3.0), (7.5, 20.0)])
def test_draws_have_the_moments(b, c):
    fn = PolyaGamma(b, c)
    draws = np.asarray(fn.sample(jax.random.PRNGKey(1), (NUM_DRAWS,)))
    assert draws.shape == (NUM_DRAWS,) and (draws > 0).all()
    assert (deviations(draws, fn, c) < 4).all()
    assert deviations(1.05 * draws, fn, c).max() > 4  # the test would see a bias


@pytest.mark.parametrize("c", [0.0, 8.0])
def test_last_gammas_are_replaced_by_one_of_their_moments(c, monkeypatch):
    monkeypatch.setattr(auxiliaries, "NUM_GAMMAS", 2)  # so that it matters
    fn = PolyaGamma(2.0, c)
    draws = np.asarray(fn.sample(jax.random.PRNGKey(3), (NUM_DRAWS,)))
    assert (deviations(draws, fn, c)[:2] < 4).all()


def test_what_replaces_the_last_gammas_is_as_documented():
    w = weights()
    rest = w[20:]
    missing = (rest**2).sum() / (w**2).sum()
    third = 2 * (rest**3).sum() - 2 * (rest**2).sum() ** 2 / rest.sum()
    assert missing == pytest.approx(2.6e-6, rel=0.02)
    assert third / (2 * (w**3).sum()) == pytest.approx(4.3e-10, rel=0.02)


# --- CRT -----------------------------------------------------------------------------------------


def tables_by_convolution(y, r):
    """Probabilities of 0, ..., y tables: of a sum of Bernoulli variables."""
    p = np.ones(1)
    for j in range(y):
        new = r / (r + j)
        p = np.append(p * (1 - new), 0) + np.append(0, p * new)
    return p


@pytest.mark.parametrize("y", [0, 1, 2, 7, 60])
@pytest.mark.parametrize("r", [1e-3, 1.0, 40.0])
def test_tables_are_those_of_seating_guests(y, r):
    fn, values = ChineseRestaurantTable(y, r), np.arange(y + 1)
    expected = tables_by_convolution(y, r)
    assert np.exp(fn.log_prob(values)) == pytest.approx(expected, rel=1e-10, abs=1e-300)
    mean = values @ expected
    assert float(fn.mean) == pytest.approx(mean, rel=1e-11)
    assert float(fn.variance) == pytest.approx((values - mean) ** 2 @ expected, rel=1e-8, abs=1e-13)
    assert float(ChineseRestaurantTable(y, 1.0).log_normalizer) == pytest.approx(0, abs=1e-12)


def test_tables_of_large_counts_are_in_whole_numbers():
    row = [1]
    for n in range(150):
        row = [a + n * b for a, b in zip([0, *row], [*row, 0], strict=True)]
    expected = [math.log(x) if x else -np.inf for x in row]
    fn = ChineseRestaurantTable(150, 1.0)
    found = np.asarray(fn.log_prob(np.arange(151))) + gammaln(151)
    assert found[1:] == pytest.approx(np.array(expected)[1:], rel=1e-13, abs=1e-10)
    assert found[0] == -np.inf


def test_draws_of_tables_have_the_moments():
    fn = ChineseRestaurantTable(jnp.array([0, 1, 5, 30]), jnp.array([2.0, 2.0, 0.5, 3.0]))
    draws = np.asarray(fn.sample(jax.random.PRNGKey(2), (NUM_DRAWS,)))
    assert draws.shape == (NUM_DRAWS, 4) and (draws[:, 0] == 0).all() and (draws[:, 1] == 1).all()
    centred = draws[:, 2:] - np.asarray(fn.mean)[2:]
    for rows in (centred, centred**2 - np.asarray(fn.variance)[2:]):
        errors = rows.std(0) / math.sqrt(NUM_DRAWS)
        assert (np.abs(rows.mean(0)) < 4 * errors).all()
        assert (np.abs(rows.mean(0) + 0.2) > 4 * errors).all()  # the test would see a bias


def test_traced_counts_need_the_largest():
    def log_prob(count, **options):
        return ChineseRestaurantTable(count, 1.0, **options).log_prob(jnp.array(2))

    with pytest.raises(ValueError, match="give max_count"):
        jax.jit(log_prob)(jnp.array([3, 4]))
    found = jax.jit(partial(log_prob, max_count=4))(jnp.array([3, 4]))
    assert np.asarray(found) == pytest.approx(np.log([3 / 6, 11 / 24]), rel=1e-12)
    assert np.isnan(log_prob(jnp.array([3, 4]), max_count=3)).tolist() == [False, True]


# --- both, as NumPyro's distributions ------------------------------------------------------------


@pytest.mark.parametrize(
    "fn",
    [
        PolyaGamma(jnp.array([1.0, 2.0, 3.0]), jnp.zeros((2, 1))),
        ChineseRestaurantTable(jnp.array([1, 2, 3]), jnp.ones((2, 1))),
    ],
)
def test_shapes_and_transformations(fn):
    assert fn.batch_shape == (2, 3) and fn.event_shape == ()
    wide = fn.expand((4, 2, 3)).to_event(1)
    draws = wide.sample(jax.random.PRNGKey(0), (5,))
    assert draws.shape == (5, 4, 2, 3) and wide.log_prob(draws).shape == (5, 4, 2)
    assert fn.support(draws).all()
    back = jax.tree.unflatten(jax.tree.structure(fn), jax.tree.leaves(fn))
    value = draws[0, 0]
    found = np.asarray(jax.jit(lambda d: d.log_prob(value))(back))
    assert found == pytest.approx(np.asarray(fn.log_prob(value)), rel=1e-12)
    with pytest.raises(ValueError, match="parameter"):
        type(fn)(-1.0, 0.0, validate_args=True)


def test_single_precision():
    with enable_x64(False):
        fn = PolyaGamma(jnp.array([0.3, 1.0, 100.0]))
        draws = fn.sample(jax.random.PRNGKey(0), (1000,))
        found = np.asarray(fn.log_prob(draws))
    assert draws.dtype == found.dtype == np.float32
    exact = np.asarray(PolyaGamma(np.array([0.3, 1.0, 100.0])).log_prob(np.asarray(draws, float)))
    assert (np.abs(found - exact) < 2e-4).all()
