"""Augmented models: their marginals are the models that were, their CAVI that written by hand."""

from dataclasses import dataclass

import numpy as np
import pytest
from scipy.special import digamma, expit, gammaln, logsumexp

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from numpyro import handlers  # noqa: E402

from pyro_vi_ext.cavi.augmentations import CRTReparam, PolyaGammaReparam  # noqa: E402
from pyro_vi_ext.cavi.coordinate_ascent import CAVI  # noqa: E402
from pyro_vi_ext.cavi.derivation import NotConjugateError  # noqa: E402
from pyro_vi_ext.cavi.stochastic import StochasticCAVI  # noqa: E402
from pyro_vi_ext.models import negative_binomial_numpyro as nb  # noqa: E402
from pyro_vi_ext.models.negative_binomial import load_mites  # noqa: E402

RNG = np.random.default_rng(0)
NUM_ROWS = 24
X = np.stack([np.ones(NUM_ROWS), RNG.normal(size=NUM_ROWS)], 1)
PSI = X @ [0.3, -1.2]
TRIALS = RNG.integers(1, 6, NUM_ROWS)
COUNTS = RNG.binomial(TRIALS, expit(PSI))
GROUP = np.arange(NUM_ROWS) % 3
SIZE = 2.5  # known total count of the negative binomial
PRECISION = 0.25


@pytest.fixture(scope="module", autouse=True)
def doubles():
    # Without NumPyro's validation: it compiles dozens of small functions for each distribution.
    with nb.enable_x64(True), dist.distribution.validation_enabled(False):
        yield


def augmented(model, site="y"):
    return handlers.reparam(model, config={site: PolyaGammaReparam()})


def tabled(model):
    return handlers.reparam(model, config={"y": CRTReparam()})


# --- likelihoods with logits, and what their Polya-Gamma variables are ---------------------------


@dataclass
class Likelihood:
    """A distribution with logits, data, the sizes b and the log-coefficients of the data."""

    make: object
    y: np.ndarray
    b: np.ndarray
    constant: np.ndarray


def log_choose(n, y):
    return gammaln(n + 1) - gammaln(y + 1) - gammaln(n - y + 1)


BINARY = (COUNTS > 0).astype(int)
ONE = np.ones(NUM_ROWS)
LIKELIHOODS = {
    "Bernoulli": Likelihood(lambda psi: dist.Bernoulli(logits=psi), BINARY, ONE, 0 * ONE),
    "Binomial": Likelihood(
        lambda psi: dist.Binomial(TRIALS, logits=psi), COUNTS, TRIALS, log_choose(TRIALS, COUNTS)
    ),
    "NegativeBinomial": Likelihood(
        lambda psi: dist.NegativeBinomialLogits(SIZE, psi),
        COUNTS,
        COUNTS + SIZE,
        gammaln(COUNTS + SIZE) - gammaln(SIZE) - gammaln(COUNTS + 1),
    ),
}


def regression(make):
    def model(X, y):
        w = numpyro.sample("w", dist.Normal(0.0, PRECISION**-0.5).expand([2]).to_event(1))
        with numpyro.plate("data", len(X)):
            numpyro.sample("y", make(X @ w), obs=y)

    return model


BERNOULLI = regression(LIKELIHOODS["Bernoulli"].make)


def log_likelihoods(case, psi):
    return case.constant + case.y * psi - case.b * np.logaddexp(0, psi)


def log_evidence(case):
    """By the trapezoidal rule in both weights; the integrand vanishes at the ends."""
    grid = np.linspace(-12, 12, 801)
    w = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    log_joint = -0.5 * PRECISION * (w**2).sum(-1) + np.log(PRECISION / (2 * np.pi))
    for n in range(NUM_ROWS):
        row = Likelihood(None, case.y[n], case.b[n], case.constant[n])
        log_joint = log_joint + log_likelihoods(row, w @ X[n])
    return logsumexp(log_joint) + 2 * np.log(grid[1] - grid[0])


def mean_omega(b, c):
    return b * np.tanh(c / 2) / (2 * c)


def jaakkola_jordan(case, c, num):
    """Coordinate ascent on their bound from given c: weights, then c. The bound after each."""
    bounds = []
    for _ in range(num):
        omega = mean_omega(case.b, c)
        covariance = np.linalg.inv(PRECISION * np.eye(2) + X.T @ (omega[:, None] * X))
        loc = covariance @ (X.T @ (case.y - case.b / 2))
        psi = X @ loc
        square = np.einsum("ni,ij,nj->n", X, covariance, X) + psi**2
        c = np.sqrt(square)
        inner = case.constant + (case.y - case.b / 2) * psi
        inner -= case.b * (
            np.log1p(np.exp(-c)) + c / 2 + np.tanh(c / 2) / (4 * c) * (square - c**2)
        )
        kl = PRECISION * (np.trace(covariance) + loc @ loc) - 2 - 2 * np.log(PRECISION)
        kl = 0.5 * (kl - np.linalg.slogdet(covariance)[1])
        bounds.append(inner.sum() - kl)
    return np.array(bounds), {"loc": loc, "covariance": covariance}, c


SLOW = pytest.mark.slow
BY_HAND = [
    "Bernoulli",
    pytest.param("Binomial", marks=SLOW),
    pytest.param("NegativeBinomial", marks=SLOW),
]


@pytest.mark.parametrize("name", BY_HAND)
def test_regression_is_that_of_jaakkola_and_jordan(name):
    case = LIKELIHOODS[name]
    cavi = CAVI(augmented(regression(case.make)), X, case.y)
    first = cavi.run(num_steps=1)
    result = cavi.run(num_steps=30, tol=0.0)
    bounds, weights, c = jaakkola_jordan(case, np.asarray(first.params["y_omega"]["c"]), 29)
    assert -result.losses[1:] == pytest.approx(bounds, abs=1e-9)
    for key, value in weights.items():
        assert np.asarray(result.params["w"][key]) == pytest.approx(value, abs=1e-9)
    assert np.asarray(result.params["y_omega"]["c"]) == pytest.approx(c, abs=1e-9)
    assert np.asarray(result.params["y_omega"]["b"]) == pytest.approx(case.b, abs=1e-13)
    assert np.asarray(result.posterior["y_omega"].mean) == pytest.approx(mean_omega(case.b, c))
    assert (np.diff(result.losses) <= 1e-11).all()
    assert result.bound < log_evidence(case)


# --- marginals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_without_omega_the_model_is_what_it_was(name):
    case = LIKELIHOODS[name]
    model = augmented(lambda psi: numpyro.sample("y", case.make(psi), obs=case.y))
    psi = np.linspace(-7, 7, NUM_ROWS)
    logarithm = np.linspace(-9, 4, 1201)  # of omega: trapezoidal rule

    def term(omega):
        seeded = handlers.substitute(handlers.seed(model, 0), {"y_omega": omega})
        trace = handlers.trace(seeded).get_trace(psi)
        return sum(site["fn"].log_prob(site["value"]) for site in trace.values())

    log_joint = jax.jit(jax.vmap(term))(np.exp(logarithm)[:, None] * np.ones(NUM_ROWS))
    found = logsumexp(np.asarray(log_joint) + logarithm[:, None], 0) + np.log(13 / 1200)
    assert found == pytest.approx(log_likelihoods(case, psi), abs=1e-10)


def test_without_tables_the_model_is_what_it_was():
    y, r, p = np.arange(9), np.geomspace(0.05, 20, 9), np.linspace(0.1, 0.9, 9)
    expected = gammaln(y + r) - gammaln(r) - gammaln(y + 1) + y * np.log(p) + r * np.log1p(-p)
    for fn in (
        dist.NegativeBinomialProbs(r, p),
        dist.NegativeBinomialLogits(r, np.log(p) - np.log1p(-p)),
    ):
        model = tabled(lambda fn=fn: numpyro.sample("y", fn, obs=y))

        def term(tables, model=model):
            seeded = handlers.substitute(handlers.seed(model, 0), {"y_tables": tables})
            trace = handlers.trace(seeded).get_trace()
            return sum(site["fn"].log_prob(site["value"]) for site in trace.values())

        tables = np.arange(9)[:, None] * np.ones(9, int)
        found = logsumexp(np.stack([term(row) for row in tables]), 0)
        assert found == pytest.approx(expected, abs=1e-12)


# --- negative binomials by tables ----------------------------------------------------------------


def negative_binomial(y, a=0.01):
    r = numpyro.sample("r", dist.Gamma(a, a))
    p = numpyro.sample("p", dist.Beta(a, a))
    with numpyro.plate("leaves", len(y)):
        numpyro.sample("y", dist.NegativeBinomialProbs(r, p), obs=y)


def test_tables_give_the_updates_by_hand():
    """Against models.negative_binomial_numpyro.cavi: the same fixed point and the same bound, that
    with the tables in q; and against its updates in our order (r, p, tables), at every sweep."""
    y = np.asarray(load_mites(), float)
    cavi = CAVI(tabled(negative_binomial), y)
    result = cavi.run(num_steps=400, tol=0.0)
    expected = nb.cavi(y)
    for site, names in {
        "r": ("concentration", "rate"),
        "p": ("concentration1", "concentration0"),
    }.items():
        for name in names:
            found = float(getattr(result.posterior[site], name))
            assert found == pytest.approx(getattr(expected.posterior[site], name), rel=1e-10)
    assert result.bound == pytest.approx(-expected.losses[-1], abs=1e-10)
    assert np.asarray(result.posterior["y_tables"].mean) == pytest.approx(
        expected.tables, rel=1e-10
    )
    assert (np.diff(result.losses) <= 1e-9).all()

    assert "concentration = exp(eta[y_tables])" in cavi.explain()

    first = cavi.run(num_steps=1)
    p = {k: float(v) for k, v in first.params["p"].items()}
    tables = np.asarray(first.posterior["y_tables"].mean)
    for n in range(1, 6):
        log_p, log_q = (
            digamma(p[k]) - digamma(sum(p.values())) for k in ("concentration1", "concentration0")
        )
        shape, rate = 0.01 + tables.sum(), 0.01 - len(y) * log_q
        mean, log_r = shape / rate, digamma(shape) - np.log(rate)
        p = {"concentration1": 0.01 + y.sum(), "concentration0": 0.01 + len(y) * mean}
        log_p, log_q = (digamma(v) - digamma(sum(p.values())) for v in p.values())
        e = np.exp(log_r)
        tables = e * (digamma(y + e) - digamma(e))
        kl = (shape - 0.01) * log_r - shape + 0.01 * mean - gammaln(shape) + gammaln(0.01)
        kl += shape * np.log(rate) - 0.01 * np.log(0.01)
        kl += (p["concentration1"] - 0.01) * log_p + (p["concentration0"] - 0.01) * log_q
        kl += 2 * gammaln(0.01) - gammaln(0.02)
        kl += gammaln(sum(p.values())) - sum(gammaln(v) for v in p.values())
        bound = (gammaln(y + e) - gammaln(e) - gammaln(y + 1) + y * log_p + mean * log_q).sum() - kl
        assert -result.losses[n] == pytest.approx(bound, abs=1e-9)


@pytest.mark.slow
def test_other_data_reach_a_compiled_model():
    counts = np.asarray(load_mites(), int)[:40]
    cavi = CAVI(tabled(negative_binomial), counts)
    cavi.run(num_steps=1)
    other = counts[::-1] + 3
    found, fresh = cavi.update(other).run(), CAVI(tabled(negative_binomial), other).run()
    assert found.bound == pytest.approx(fresh.bound, abs=1e-11)
    assert np.asarray(found.params["y_tables"]["count"]).tolist() == other.tolist()


# --- other models: their fixed points ------------------------------------------------------------


def second(q):
    return np.asarray(q["covariance"]) + np.einsum("...i,...j->...ij", q["loc"], q["loc"])


@pytest.mark.slow
def test_hierarchy_is_at_its_fixed_point():
    def model(X, group, y):
        tau = numpyro.sample("tau", dist.Gamma(2.0, 1.0))
        with numpyro.plate("groups", 3):
            a = numpyro.sample("a", dist.Normal(0.0, 1 / jnp.sqrt(tau)))
        w = numpyro.sample("w", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        with numpyro.plate("data", len(X)):
            numpyro.sample("y", dist.Bernoulli(logits=a[group] + X @ w), obs=y)

    result = CAVI(augmented(model), X, GROUP, BINARY).run(num_steps=2000, tol=1e-13)
    q = jax.tree.map(np.asarray, result.params)
    tau = q["tau"]["concentration"] / q["tau"]["rate"]
    omega = np.asarray(result.posterior["y_omega"].mean)
    psi, a = X @ q["w"]["loc"], q["a"]["loc"]
    precision = tau + np.bincount(GROUP, omega)
    linear = np.bincount(GROUP, BINARY - 0.5 - omega * psi)
    assert 1 / q["a"]["covariance"] == pytest.approx(precision, rel=1e-6)
    assert a == pytest.approx(linear / precision, abs=1e-6)
    covariance = np.linalg.inv(0.25 * np.eye(2) + X.T @ (omega[:, None] * X))
    assert q["w"]["covariance"] == pytest.approx(covariance, abs=1e-6)
    loc = covariance @ (X.T @ (BINARY - 0.5 - omega * a[GROUP]))
    assert q["w"]["loc"] == pytest.approx(loc, abs=1e-6)
    square = np.einsum("ni,ij,nj->n", X, covariance, X) + (psi + a[GROUP]) ** 2
    assert q["y_omega"]["c"] ** 2 == pytest.approx(square + q["a"]["covariance"][GROUP], abs=1e-6)
    assert (np.diff(result.losses) <= 1e-11).all()


@pytest.mark.slow
def test_mixture_of_regressions_is_at_its_fixed_point():
    def model(X, n, y):
        pi = numpyro.sample("pi", dist.Dirichlet(jnp.array([3.0, 2.0])))
        w = numpyro.sample("w", dist.Normal(0.0, 2.0).expand([2, 2]).to_event(2))
        with numpyro.plate("data", len(X)):
            z = numpyro.sample("z", dist.Categorical(pi))
            numpyro.sample("y", dist.Binomial(n, logits=(w[z] * X).sum(-1)), obs=y)

    n = 4 * TRIALS
    y = RNG.binomial(n, expit(np.where(GROUP > 0, 2.0, -2.0) * X[:, 1]))
    result = CAVI(augmented(model), X, n, y).run(num_steps=3000, tol=1e-13)
    q = jax.tree.map(np.asarray, result.params)
    kappa, omega = y - n / 2, np.asarray(result.posterior["y_omega"].mean)
    square = np.einsum("ni,kij,nj->nk", X, second(q["w"]), X)
    log_pi = digamma(q["pi"]["concentration"]) - digamma(q["pi"]["concentration"].sum())
    logits = log_pi + kappa[:, None] * (X @ q["w"]["loc"].T) - 0.5 * omega[:, None] * square
    z = np.exp(logits - logsumexp(logits, -1, keepdims=True))
    assert np.exp(q["z"]["logits"]) == pytest.approx(z, abs=1e-5)
    assert q["y_omega"]["c"] ** 2 == pytest.approx((z * square).sum(-1), abs=1e-5)
    assert q["pi"]["concentration"] == pytest.approx([3.0, 2.0] + z.sum(0), abs=1e-5)
    assert (np.diff(result.losses) <= 1e-9).all()


# --- plates, masks, scales, shapes ---------------------------------------------------------------


def weighted(X, y, mask=None, scale=None):
    w = numpyro.sample("w", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    with numpyro.plate("data", len(X)):
        fn = dist.Bernoulli(logits=X @ w)
        if scale is not None:
            with handlers.scale(scale=scale):
                return numpyro.sample("y", fn, obs=y)
        numpyro.sample("y", fn if mask is None else fn.mask(mask), obs=y)


def same(found, expected):
    assert found.bound == pytest.approx(expected.bound, abs=1e-9)
    for key, value in expected.params["w"].items():
        assert np.asarray(found.params["w"][key]) == pytest.approx(np.asarray(value), abs=1e-6)


@pytest.mark.slow
def test_masked_observations_are_as_left_out():
    there = np.arange(NUM_ROWS) % 4 > 0
    missing = np.where(there, BINARY, np.nan)
    found = CAVI(augmented(weighted), X, missing, mask=there).run(tol=1e-12)
    same(found, CAVI(augmented(weighted), X[there], BINARY[there]).run(tol=1e-12))
    untilted = np.asarray(found.params["y_omega"]["c"])[~there]
    assert untilted.tolist() == [0.0] * (~there).sum()  # its prior


@pytest.mark.slow
def test_scaled_site_is_as_so_many_copies():
    found = CAVI(augmented(weighted), X, BINARY, scale=2.0).run(tol=1e-12)
    twice = np.concatenate([X, X]), np.concatenate([BINARY, BINARY])
    same(found, CAVI(augmented(weighted), *twice).run(tol=1e-12))
    assert np.asarray(found.params["y_omega"]["b"]) == pytest.approx(ONE)


@pytest.mark.slow
def test_subsampled_plate_is_as_so_many_copies():
    def model(X, y):
        w = numpyro.sample("w", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        with numpyro.plate("data", 2 * len(X), subsample_size=len(X)):
            numpyro.sample("y", dist.Bernoulli(logits=X @ w), obs=y)

    found = CAVI(augmented(model), X, BINARY).run(tol=1e-12)
    same(found, CAVI(augmented(weighted), X, BINARY, scale=2.0).run(tol=1e-12))


@pytest.mark.slow
def test_minibatches_reach_the_optimum_of_all_rows():
    case = LIKELIHOODS["Binomial"]
    cavi = CAVI(augmented(regression(case.make)), X, case.y)
    steps = StochasticCAVI(cavi, "data", batch_size=NUM_ROWS // 2, delay=10.0)
    found, expected = steps.run(num_steps=2000), cavi.run(tol=1e-12)
    # Steps of size rho leave a variance of order rho; the bound is flat at its maximum.
    assert expected.bound - 1e-3 < found.bound < expected.bound
    rows = [3, 5]
    assert np.asarray(found.local(rows).posterior["y_omega"].b).tolist() == case.b[rows].tolist()


@pytest.mark.slow
def test_event_axes_are_as_rows():
    def model(X, y):
        w = numpyro.sample("w", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        with numpyro.plate("rows", 12):
            logits = (X @ w).reshape(12, 2)
            mask = jnp.arange(24).reshape(12, 2) > 3
            numpyro.sample("y", dist.Bernoulli(logits=logits).mask(mask).to_event(1), obs=y)

    found = CAVI(augmented(model), X, BINARY.reshape(12, 2)).run(tol=1e-12)
    same(found, CAVI(augmented(weighted), X[4:], BINARY[4:]).run(tol=1e-12))
    assert found.posterior["y_omega"].batch_shape == (12, 2)


@pytest.mark.slow
def test_single_precision():
    with nb.enable_x64(False):
        result = CAVI(augmented(BERNOULLI), X.astype(np.float32), BINARY).run(num_steps=20)
    expected = CAVI(augmented(BERNOULLI), X, BINARY).run(num_steps=20)
    assert result.bound == pytest.approx(expected.bound, abs=1e-4)


# --- refusals ------------------------------------------------------------------------------------


def latent_logits(make, data=BINARY, **options):
    def model():
        psi = numpyro.sample("psi", dist.Normal(0.0, 1.0))
        numpyro.sample("y", make(psi), obs=data, **options)

    return model


def latent_size():
    r = numpyro.sample("r", dist.Gamma(1.0, 1.0))
    psi = numpyro.sample("psi", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.NegativeBinomialLogits(r, psi), obs=COUNTS)


def masked_by_a_handler():
    psi = numpyro.sample("psi", dist.Normal(0.0, 1.0))
    with handlers.mask(mask=BINARY > 0):
        numpyro.sample("y", dist.Bernoulli(logits=psi).expand([NUM_ROWS]), obs=BINARY)


def of_a_gamma():
    rate = numpyro.sample("rate", dist.Gamma(1.0, 1.0))
    numpyro.sample("y", dist.Bernoulli(logits=rate), obs=BINARY)


def bernoulli(psi):
    return dist.Bernoulli(logits=psi)


REFUSED = {
    "probs": (
        augmented(latent_logits(lambda psi: dist.Bernoulli(jax.nn.sigmoid(psi)))),
        ValueError,
        "Site 'y': PolyaGammaReparam is for .* logits=..., and it is a BernoulliProbs",
    ),
    "normal": (
        augmented(latent_logits(lambda psi: dist.Normal(psi, 1.0))),
        ValueError,
        "Site 'y': PolyaGammaReparam is for .* and it is a Normal",
    ),
    "tables": (
        tabled(latent_logits(bernoulli)),
        ValueError,
        "Site 'y': CRTReparam is for NegativeBinomialProbs",
    ),
    "latent": (augmented(latent_logits(bernoulli, None)), ValueError, "Site 'y' is not observed"),
    "nan": (
        augmented(latent_logits(bernoulli, np.array([0.0, np.nan]))),
        ValueError,
        r"Site 'y' has observations outside .* BernoulliLogits, or NaN. Mask .*\.mask",
    ),
    "support": (
        augmented(latent_logits(bernoulli, np.array([0, 2]))),
        ValueError,
        "Site 'y' has observations outside",
    ),
    "handler": (augmented(masked_by_a_handler), ValueError, "'y' is masked by handlers.mask"),
    "no trials": (
        augmented(
            latent_logits(lambda psi: dist.Binomial(np.array([0, 1]), logits=psi), np.array([0, 1]))
        ),
        NotConjugateError,
        "Site 'y_omega' .* its b, which is not",
    ),
    "size": (augmented(latent_size), NotConjugateError, "Site 'y' .* lgamma of a continuous"),
    "size and logits": (tabled(latent_size), NotConjugateError, "Site 'y' .* of a continuous"),
    "tanh": (
        augmented(latent_logits(lambda psi: bernoulli(jnp.tanh(psi)))),
        NotConjugateError,
        "Site 'y' .* tanh of a continuous",
    ),
    "gamma": (
        augmented(of_a_gamma),
        NotConjugateError,
        r"Site 'y': .* rate\^2, .* 'rate' \(Gamma\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_site(name):
    model, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        CAVI(model)
