"""CAVI of NumPyro models: against updates derived by hand, exact evidences and Monte Carlo.

The updates by hand are NumPy and share nothing with the library. They start from the factors after
its first sweep, go through the sites in the order of the model, and write every term of the bound.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.stats as st
from scipy.special import digamma, gammaln, log_softmax, multigammaln, softmax

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from numpyro.contrib.control_flow import scan  # noqa: E402
from numpyro.infer.util import log_density  # noqa: E402

from pyro_vi_ext.cavi.coordinate_ascent import CAVI  # noqa: E402
from pyro_vi_ext.cavi.derivation import NotConjugateError  # noqa: E402
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64  # noqa: E402

NUM_STEPS, NUM_SWEEPS = 31, 2001  # compared one by one; at convergence
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def doubles():
    # Without NumPyro's validation: it compiles dozens of small functions for each distribution.
    with enable_x64(True), dist.distribution.validation_enabled(False):
        yield


# --- expectations by hand ------------------------------------------------------------------------


def mean(gamma):
    return gamma["concentration"] / gamma["rate"]


def mean_log(gamma):
    return digamma(gamma["concentration"]) - np.log(gamma["rate"])


def dirichlet_log(q):
    a = q["concentration"]
    return digamma(a) - digamma(a.sum(-1, keepdims=True))


def outer(q):
    """E[x x'] of joint rows."""
    return q["covariance"] + q["loc"][..., :, None] * q["loc"][..., None, :]


def joint(precision, linear):
    covariance = np.linalg.inv(precision)
    return {"loc": np.einsum("...ij,...j->...i", covariance, linear), "covariance": covariance}


def scalar(precision, linear):
    return {"loc": linear / precision, "covariance": 1 / precision}


def log_normal_density(log_tau, tau, square):
    """E log N(x | m, 1/tau), summed, with E (x - m)^2."""
    return 0.5 * (log_tau - np.log(2 * np.pi) - tau * square).sum()


def kl_gamma(q, a, b):
    """KL of Gamma(q) from Gamma(a, b), summed."""
    prior = a * np.log(b) - gammaln(a) + (a - 1) * mean_log(q) - b * mean(q)
    return -(prior + st.gamma(q["concentration"], scale=1 / q["rate"]).entropy()).sum()


def kl_dirichlet(q, a):
    """KL of rows from Dirichlet(a, ..., a)."""
    rows, log_p = np.atleast_2d(q["concentration"]), np.atleast_2d(dirichlet_log(q))
    k = rows.shape[-1]
    prior = gammaln(k * a) - k * gammaln(a) + (a - 1) * log_p.sum(-1)
    return -(prior + [st.dirichlet(row).entropy() for row in rows]).sum()


def entropy_normal(q):
    return 0.5 * np.log(2 * np.pi * np.e * q["covariance"]).sum()


def entropy_joint(q):
    return 0.5 * np.linalg.slogdet(2 * np.pi * np.e * q["covariance"])[1].sum()


def labels(log_p):
    return {"logits": log_softmax(log_p, -1)}


def probabilities(q):
    return softmax(q["logits"], -1)


# --- models, their updates and bounds ------------------------------------------------------------


@dataclass
class Case:
    """A model, one sweep over its factors by hand, and the bound by hand."""

    model: Callable
    args: tuple
    sweep: Callable
    bound: Callable


CASES = {}


def case(*args):
    """Registers a builder: data -> model, sweep, bound."""

    def decorate(builder):
        CASES[builder.__name__] = Case(args=args, **builder(*args))
        return builder

    return decorate


def precision(tau):
    return 1 / jnp.sqrt(tau)


CLUSTERS = RNG.normal(size=(30, 2)) * 0.7 + 3.0 * np.eye(3)[np.arange(30) % 3][:, :2]


@case(CLUSTERS, 3)
def diagonal_mixture(X, K):
    def model(X, K):
        pi = numpyro.sample("pi", dist.Dirichlet(jnp.full(K, 1.5)))
        with numpyro.plate("components", K):
            mu = numpyro.sample("mu", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
            tau = numpyro.sample("tau", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("data", len(X)):
            z = numpyro.sample("z", dist.Categorical(pi))
            numpyro.sample("x", dist.Normal(mu[z], precision(tau[z])).to_event(1), obs=X)

    def squares(q):
        return (X[:, None] - q["mu"]["loc"]) ** 2 + q["mu"]["covariance"]

    def log_p(q):
        fit = mean_log(q["tau"]) - np.log(2 * np.pi) - mean(q["tau"]) * squares(q)
        return dirichlet_log(q["pi"]) + 0.5 * fit.sum(-1)

    def sweep(q):
        r = probabilities(q["z"])
        q["pi"] = {"concentration": 1.5 + r.sum(0)}
        tau, n = mean(q["tau"]), r.sum(0)[:, None]
        q["mu"] = scalar(1 / 9 + n * tau, tau * (r.T @ X))
        rate = 1 + 0.5 * np.einsum("nk,nkd->kd", r, squares(q))
        q["tau"] = {"concentration": 2 + n / 2 + 0 * rate, "rate": rate}
        q["z"] = labels(log_p(q))

    def bound(q):
        r, square = probabilities(q["z"]), q["mu"]["loc"] ** 2 + q["mu"]["covariance"]
        prior = log_normal_density(-np.log(9), 1 / 9, square) + entropy_normal(q["mu"])
        data = (r * log_p(q)).sum() + st.entropy(r, axis=-1).sum()
        return data + prior - kl_gamma(q["tau"], 2.0, 1.0) - kl_dirichlet(q["pi"], 1.5)

    return {"model": model, "sweep": sweep, "bound": bound}


@case(CLUSTERS, 3)
def full_mixture(X, K):
    nu0, rate0 = 4.0, np.array([[1.0, 0.3], [0.3, 2.0]])

    def model(X, K):
        pi = numpyro.sample("pi", dist.Dirichlet(jnp.full(K, 1.5)))
        with numpyro.plate("components", K):
            scale = numpyro.sample("scale", dist.Wishart(nu0, rate_matrix=jnp.asarray(rate0)))
            mu = numpyro.sample("mu", dist.MultivariateNormal(jnp.zeros(2), 9 * jnp.eye(2)))
        with numpyro.plate("data", len(X)):
            z = numpyro.sample("z", dist.Categorical(pi))
            numpyro.sample("x", dist.MultivariateNormal(mu[z], precision_matrix=scale[z]), obs=X)

    def mean_scale(q):
        nu, rate = q["scale"].values()
        return nu[:, None, None] * np.linalg.inv(rate)

    def log_det(q):
        nu, rate = q["scale"].values()
        terms = digamma((nu[:, None] - np.arange(2)) / 2).sum(-1)
        return terms + 2 * math.log(2) - np.linalg.slogdet(rate)[1]

    def products(q):
        difference = X[:, None] - q["mu"]["loc"]
        return difference[..., None] * difference[..., None, :] + q["mu"]["covariance"]

    def log_p(q):
        square = np.einsum("kij,nkij->nk", mean_scale(q), products(q))
        return dirichlet_log(q["pi"]) + 0.5 * (log_det(q) - 2 * np.log(2 * np.pi) - square)

    def sweep(q):
        r = probabilities(q["z"])
        q["pi"] = {"concentration": 1.5 + r.sum(0)}
        rate = rate0 + np.einsum("nk,nkij->kij", r, products(q))
        q["scale"] = {"concentration": nu0 + r.sum(0), "rate_matrix": rate}
        lam = mean_scale(q)
        linear = np.einsum("kij,kj->ki", lam, r.T @ X)
        q["mu"] = joint(np.eye(2) / 9 + r.sum(0)[:, None, None] * lam, linear)
        q["z"] = labels(log_p(q))

    def bound(q):
        r, (nu, rate), log_dets = probabilities(q["z"]), q["scale"].values(), log_det(q)
        total = (r * log_p(q)).sum() + st.entropy(r, axis=-1).sum() - kl_dirichlet(q["pi"], 1.5)
        normalizer = nu0 * math.log(2) - nu0 / 2 * np.linalg.slogdet(rate0)[1]
        normalizer += multigammaln(nu0 / 2, 2)
        total += ((nu0 - 3) / 2 * log_dets - 0.5 * (mean_scale(q) * rate0).sum((-1, -2))).sum()
        pairs = zip(nu, rate, strict=True)
        total += sum(st.wishart(n, np.linalg.inv(b)).entropy() - normalizer for n, b in pairs)
        square = np.einsum("kii->k", outer(q["mu"]))
        prior = log_normal_density(-2 * np.log(9) - np.log(2 * np.pi), 1 / 9, square)
        return total + prior + entropy_joint(q["mu"])

    return {"model": model, "sweep": sweep, "bound": bound}


DOCUMENT = np.repeat(np.arange(4), 12)
WORD = np.where(RNG.random(48) < 0.8, DOCUMENT + 1, RNG.integers(0, 6, 48))


@case(DOCUMENT, WORD)
def lda(document, word):
    def model(document, word):
        with numpyro.plate("documents", 4):
            theta = numpyro.sample("theta", dist.Dirichlet(jnp.full(3, 0.5)))
        with numpyro.plate("topics", 3):
            phi = numpyro.sample("phi", dist.Dirichlet(jnp.full(6, 0.7)))
        with numpyro.plate("words", len(word)):
            z = numpyro.sample("z", dist.Categorical(theta[document]))
            numpyro.sample("w", dist.Categorical(phi[z]), obs=word)

    def log_p(q):
        return dirichlet_log(q["theta"])[document] + dirichlet_log(q["phi"])[:, word].T

    def sweep(q):
        r = probabilities(q["z"])
        q["theta"] = {"concentration": 0.5 + np.eye(4)[document].T @ r}
        q["phi"] = {"concentration": 0.7 + r.T @ np.eye(6)[word]}
        q["z"] = labels(log_p(q))

    def bound(q):
        r = probabilities(q["z"])
        total = (r * log_p(q)).sum() + st.entropy(r, axis=-1).sum()
        return total - kl_dirichlet(q["theta"], 0.5) - kl_dirichlet(q["phi"], 0.7)

    return {"model": model, "sweep": sweep, "bound": bound}


DESIGN = RNG.normal(size=(15, 3))
RESPONSE = DESIGN @ [1.0, -2.0, 0.5] + 0.5 * RNG.normal(size=15)


@case(DESIGN, RESPONSE)
def linear_regression(X, y):
    def model(X, y):
        w = numpyro.sample("w", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        tau = numpyro.sample("tau", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(X @ w, precision(tau)), obs=y)

    def square(q):
        return ((y - X @ q["w"]["loc"]) ** 2).sum() + np.sum(X.T @ X * q["w"]["covariance"])

    def sweep(q):
        tau = mean(q["tau"])
        q["w"] = joint(np.eye(3) / 4 + tau * X.T @ X, tau * X.T @ y)
        q["tau"] = {"concentration": 2 + len(y) / 2, "rate": 1 + square(q) / 2}

    def bound(q):
        n = len(y)
        data = 0.5 * (n * mean_log(q["tau"]) - n * np.log(2 * np.pi) - mean(q["tau"]) * square(q))
        prior = log_normal_density(-np.log(4), 1 / 4, np.diag(outer(q["w"])))
        return data + prior + entropy_joint(q["w"]) - kl_gamma(q["tau"], 2.0, 1.0)

    return {"model": model, "sweep": sweep, "bound": bound}


def bilinear_square(x, w, z):
    """E (x - w z')^2, of rows w of D and rows z of N, shape (N, D)."""
    fit = z["loc"] @ w["loc"].T
    second = np.einsum("dij,nij->nd", outer(w), outer(z))
    return x**2 - 2 * x * fit + second


PLANE = RNG.normal(size=(12, 2)) @ RNG.normal(size=(2, 4)) + 0.3 * RNG.normal(size=(12, 4)) + 1.0


@case(PLANE)
def ppca(X):
    def model(X):
        with numpyro.plate("columns", 4):
            w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
        tau = numpyro.sample("tau", dist.Gamma(2.0, 1.0))
        with numpyro.plate("rows", len(X)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            numpyro.sample("x", dist.Normal(z @ w.T + mu, precision(tau)).to_event(1), obs=X)

    def square(q):
        centred = bilinear_square(X - q["mu"]["loc"], q["w"], q["z"])
        return centred + q["mu"]["covariance"]

    def sweep(q):
        tau, z = mean(q["tau"]), q["z"]
        one = np.eye(2) + tau * outer(z).sum(0)
        linear = tau * (X - q["mu"]["loc"]).T @ z["loc"]
        q["w"] = joint(np.broadcast_to(one, (4, 2, 2)), linear)
        residual = (X - z["loc"] @ q["w"]["loc"].T).sum(0)
        q["mu"] = scalar(1 / 9 + tau * len(X) * np.ones(4), tau * residual)
        q["tau"] = {"concentration": 2 + X.size / 2, "rate": 1 + square(q).sum() / 2}
        tau = mean(q["tau"])
        one = np.eye(2) + tau * outer(q["w"]).sum(0)
        linear = tau * (X - q["mu"]["loc"]) @ q["w"]["loc"]
        q["z"] = joint(np.broadcast_to(one, (len(X), 2, 2)), linear)

    def bound(q):
        total = log_normal_density(mean_log(q["tau"]), mean(q["tau"]), square(q))
        for name in ("w", "z"):
            second = np.diagonal(outer(q[name]), axis1=1, axis2=2)
            total += log_normal_density(0.0, 1.0, second) + entropy_joint(q[name])
        second = q["mu"]["loc"] ** 2 + q["mu"]["covariance"]
        total += log_normal_density(-np.log(9), 1 / 9, second) + entropy_normal(q["mu"])
        return total - kl_gamma(q["tau"], 2.0, 1.0)

    return {"model": model, "sweep": sweep, "bound": bound}


@case(PLANE)
def factor_analysis_with_ard(X):
    def model(X):
        with numpyro.plate("factors", 3):
            alpha = numpyro.sample("alpha", dist.Gamma(1.0, 1.0))
        with numpyro.plate("columns", 4):
            w = numpyro.sample("w", dist.Normal(jnp.zeros(3), precision(alpha)).to_event(1))
            psi = numpyro.sample("psi", dist.Gamma(2.0, 1.0))
        with numpyro.plate("rows", len(X)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            numpyro.sample("x", dist.Normal(z @ w.T, precision(psi)).to_event(1), obs=X)

    def second(q):
        return np.diagonal(outer(q), axis1=1, axis2=2)

    def sweep(q):
        z = q["z"]
        rate = 1 + second(q["w"]).sum(0) / 2
        q["alpha"] = {"concentration": 1 + 4 / 2 + 0 * rate, "rate": rate}
        psi = mean(q["psi"])[:, None]
        one = np.diag(mean(q["alpha"])) + psi[..., None] * outer(z).sum(0)
        q["w"] = joint(one, psi * (X.T @ z["loc"]))
        rate = 1 + bilinear_square(X, q["w"], z).sum(0) / 2
        q["psi"] = {"concentration": 2 + len(X) / 2 + 0 * rate, "rate": rate}
        psi = mean(q["psi"])
        one = np.eye(3) + np.einsum("d,dij->ij", psi, outer(q["w"]))
        q["z"] = joint(np.broadcast_to(one, (len(X), 3, 3)), X * psi @ q["w"]["loc"])

    def bound(q):
        square = bilinear_square(X, q["w"], q["z"])
        total = log_normal_density(mean_log(q["psi"]), mean(q["psi"]), square)
        total += log_normal_density(mean_log(q["alpha"]), mean(q["alpha"]), second(q["w"]))
        total += log_normal_density(0.0, 1.0, second(q["z"]))
        total += entropy_joint(q["w"]) + entropy_joint(q["z"])
        return total - kl_gamma(q["alpha"], 1.0, 1.0) - kl_gamma(q["psi"], 2.0, 1.0)

    return {"model": model, "sweep": sweep, "bound": bound}


COUNTS = RNG.poisson(np.array([1.0, 9.0])[np.arange(25) % 2])


@case(COUNTS)
def poisson_mixture(x):
    def model(x):
        pi = numpyro.sample("pi", dist.Dirichlet(jnp.full(2, 1.5)))
        with numpyro.plate("components", 2):
            rate = numpyro.sample("rate", dist.Gamma(2.0, 0.5))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Categorical(pi))
            numpyro.sample("x", dist.Poisson(rate[z]), obs=x)

    def log_p(q):
        fit = x[:, None] * mean_log(q["rate"]) - mean(q["rate"]) - gammaln(x + 1)[:, None]
        return dirichlet_log(q["pi"]) + fit

    def sweep(q):
        r = probabilities(q["z"])
        q["pi"] = {"concentration": 1.5 + r.sum(0)}
        q["rate"] = {"concentration": 2 + r.T @ x, "rate": 0.5 + r.sum(0)}
        q["z"] = labels(log_p(q))

    def bound(q):
        r = probabilities(q["z"])
        total = (r * log_p(q)).sum() + st.entropy(r, axis=-1).sum()
        return total - kl_dirichlet(q["pi"], 1.5) - kl_gamma(q["rate"], 2.0, 0.5)

    return {"model": model, "sweep": sweep, "bound": bound}


GROUP = np.arange(24) % 4
DOSE = RNG.normal(size=24)
OUTCOME = np.array([1.0, -1, 0, 2])[GROUP] + np.array([0.5, 1, 1.5, 0])[GROUP] * DOSE
OUTCOME = OUTCOME + 0.4 * RNG.normal(size=24)


@case(GROUP, DOSE, OUTCOME)
def varying_slopes(group, x, y):
    rows = np.stack([np.ones_like(x), x], -1)

    def model(group, x, y):
        m = numpyro.sample("m", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        tau = numpyro.sample("tau", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
        noise = numpyro.sample("noise", dist.Gamma(2.0, 1.0))
        with numpyro.plate("groups", 4):
            ab = numpyro.sample("ab", dist.Normal(m, precision(tau)).to_event(1))
        with numpyro.plate("data", len(y)):
            fit = ab[group, 0] + ab[group, 1] * x
            numpyro.sample("y", dist.Normal(fit, precision(noise)), obs=y)

    def deviation(q):
        """E (ab - m)^2, shape (4, 2)."""
        own = np.diagonal(q["ab"]["covariance"], axis1=1, axis2=2)
        return (q["ab"]["loc"] - q["m"]["loc"]) ** 2 + own + q["m"]["covariance"]

    def square(q):
        fit = (rows * q["ab"]["loc"][group]).sum(-1)
        return (y - fit) ** 2 + np.einsum("ni,nij,nj->n", rows, q["ab"]["covariance"][group], rows)

    def sweep(q):
        tau = mean(q["tau"])
        q["m"] = scalar(1 / 9 + 4 * tau, tau * q["ab"]["loc"].sum(0))
        rate = 1 + deviation(q).sum(0) / 2
        q["tau"] = {"concentration": 2 + 4 / 2 + 0 * rate, "rate": rate}
        q["noise"] = {"concentration": 2 + len(y) / 2, "rate": 1 + square(q).sum() / 2}
        tau, noise, own = mean(q["tau"]), mean(q["noise"]), np.eye(4)[group]
        gram = np.einsum("ng,ni,nj->gij", own, rows, rows)
        linear = tau * q["m"]["loc"] + noise * own.T @ (rows * y[:, None])
        q["ab"] = joint(np.diag(tau) + noise * gram, linear)

    def bound(q):
        total = log_normal_density(mean_log(q["noise"]), mean(q["noise"]), square(q))
        total += log_normal_density(mean_log(q["tau"]), mean(q["tau"]), deviation(q))
        second = q["m"]["loc"] ** 2 + q["m"]["covariance"]
        total += log_normal_density(-np.log(9), 1 / 9, second)
        total += entropy_normal(q["m"]) + entropy_joint(q["ab"])
        return total - kl_gamma(q["tau"], 2.0, 1.0) - kl_gamma(q["noise"], 2.0, 1.0)

    return {"model": model, "sweep": sweep, "bound": bound}


ROW, COLUMN = (axis.ravel()[:-2] for axis in np.indices((5, 4)))
CELL = RNG.normal(size=5)[ROW] + 2 * RNG.normal(size=4)[COLUMN] + 0.5 * RNG.normal(size=18) + 3.0


@case(ROW, COLUMN, CELL)
def crossed_effects(i, j, y):
    def model(i, j, y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau_u = numpyro.sample("tau_u", dist.Gamma(2.0, 1.0))
        tau_v = numpyro.sample("tau_v", dist.Gamma(2.0, 1.0))
        noise = numpyro.sample("noise", dist.Gamma(2.0, 1.0))
        with numpyro.plate("rows", 5):
            u = numpyro.sample("u", dist.Normal(0.0, precision(tau_u)))
        with numpyro.plate("columns", 4):
            v = numpyro.sample("v", dist.Normal(0.0, precision(tau_v)))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(mu + u[i] + v[j], precision(noise)), obs=y)

    def second(q):
        return q["loc"] ** 2 + q["covariance"]

    def square(q):
        residual = y - q["mu"]["loc"] - q["u"]["loc"][i] - q["v"]["loc"][j]
        spread = q["mu"]["covariance"] + q["u"]["covariance"][i] + q["v"]["covariance"][j]
        return residual**2 + spread

    def sweep(q):
        noise, u, v = mean(q["noise"]), q["u"], q["v"]
        residual = y - u["loc"][i] - v["loc"][j]
        q["mu"] = scalar(1 / 25 + len(y) * noise, noise * residual.sum())
        q["tau_u"] = {"concentration": 2 + 5 / 2, "rate": 1 + second(u).sum() / 2}
        q["tau_v"] = {"concentration": 2 + 4 / 2, "rate": 1 + second(v).sum() / 2}
        q["noise"] = {"concentration": 2 + len(y) / 2, "rate": 1 + square(q).sum() / 2}
        noise = mean(q["noise"])
        for name, other, at, n in (("u", v["loc"][j], i, 5), ("v", None, j, 4)):
            other = q["u"]["loc"][i] if other is None else other
            residual = y - q["mu"]["loc"] - other
            linear = noise * np.bincount(at, residual, n)
            q[name] = scalar(mean(q[f"tau_{name}"]) + noise * np.bincount(at), linear)

    def bound(q):
        total = log_normal_density(mean_log(q["noise"]), mean(q["noise"]), square(q))
        total += log_normal_density(-np.log(25), 1 / 25, second(q["mu"]))
        total += sum(entropy_normal(q[name]) for name in ("mu", "u", "v"))
        for name in ("u", "v"):
            tau = q[f"tau_{name}"]
            total += log_normal_density(mean_log(tau), mean(tau), second(q[name]))
        return total - sum(kl_gamma(q[n], 2.0, 1.0) for n in ("tau_u", "tau_v", "noise"))

    return {"model": model, "sweep": sweep, "bound": bound}


EFFECT = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
ERROR = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])


def schools(prior, to_scale):
    def model(y, sigma):
        mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        v = numpyro.sample("v", prior(2.0, 30.0))
        with numpyro.plate("schools", 8):
            theta = numpyro.sample("theta", dist.Normal(mu, to_scale(v)))
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    # 1 / InverseGamma(a, b) is Gamma(a, b): one update serves both, and KL is invariant.
    def deviation(q):
        spread = q["theta"]["covariance"] + q["mu"]["covariance"]
        return (q["theta"]["loc"] - q["mu"]["loc"]) ** 2 + spread

    def sweep(q):
        tau = mean(q["v"])
        q["mu"] = scalar(1 / 100 + 8 * tau, tau * q["theta"]["loc"].sum())
        q["v"] = {"concentration": 2 + 8 / 2, "rate": 30 + deviation(q).sum() / 2}
        tau = mean(q["v"])
        linear = tau * q["mu"]["loc"] + EFFECT / ERROR**2
        q["theta"] = scalar(tau + 1 / ERROR**2, linear)

    def bound(q):
        theta, mu = q["theta"], q["mu"]
        square = (EFFECT - theta["loc"]) ** 2 + theta["covariance"]
        total = log_normal_density(-2 * np.log(ERROR), ERROR**-2.0, square)
        total += log_normal_density(mean_log(q["v"]), mean(q["v"]), deviation(q))
        total += log_normal_density(-np.log(100), 1 / 100, mu["loc"] ** 2 + mu["covariance"])
        return total + entropy_normal(theta) + entropy_normal(mu) - kl_gamma(q["v"], 2.0, 30.0)

    return {"model": model, "sweep": sweep, "bound": bound}


@case(EFFECT, ERROR)
def eight_schools_variance(y, sigma):
    return schools(dist.InverseGamma, jnp.sqrt)


@case(EFFECT, ERROR)
def eight_schools_precision(y, sigma):
    return schools(dist.Gamma, precision)


HEAVY = 1.0 + RNG.standard_t(3, size=20)


@case(HEAVY)
def student_t(y):
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = numpyro.sample("tau", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(y)):
            weight = numpyro.sample("weight", dist.Gamma(1.5, 1.5))
            numpyro.sample("y", dist.Normal(mu, precision(tau * weight)), obs=y)

    def square(q):
        return (y - q["mu"]["loc"]) ** 2 + q["mu"]["covariance"]

    def sweep(q):
        weight = mean(q["weight"])
        tau = mean(q["tau"])
        q["mu"] = scalar(1 / 100 + tau * weight.sum(), tau * (weight @ y))
        q["tau"] = {"concentration": 2 + len(y) / 2, "rate": 1 + weight @ square(q) / 2}
        rate = 1.5 + mean(q["tau"]) * square(q) / 2
        q["weight"] = {"concentration": 2.0 + 0 * rate, "rate": rate}

    def bound(q):
        log_precision = mean_log(q["tau"]) + mean_log(q["weight"])
        total = log_normal_density(log_precision, mean(q["tau"]) * mean(q["weight"]), square(q))
        second = q["mu"]["loc"] ** 2 + q["mu"]["covariance"]
        total += log_normal_density(-np.log(100), 1 / 100, second) + entropy_normal(q["mu"])
        return total - kl_gamma(q["tau"], 2.0, 1.0) - kl_gamma(q["weight"], 1.5, 1.5)

    return {"model": model, "sweep": sweep, "bound": bound}


# --- the checks ----------------------------------------------------------------------------------


SLOW_TO_COMPILE = {
    "diagonal_mixture",
    "lda",
    "factor_analysis_with_ard",
    "varying_slopes",
    "crossed_effects",
}


def cases(slow):
    return [pytest.param(n, marks=[pytest.mark.slow] if n in slow else []) for n in CASES]


def numbers(params):
    return jax.tree.map(lambda x: np.array(x, dtype=float), params)


def assert_close(got, want, tolerance=1e-8):
    assert set(got) == set(want)
    for site in want:
        assert set(got[site]) == set(want[site])
        for name in want[site]:
            np.testing.assert_allclose(
                got[site][name], want[site][name], rtol=tolerance, atol=tolerance, err_msg=site
            )


@pytest.fixture(scope="module")
def fitted():
    """The derived updates of each model, made once, its first sweep, and a run from there."""
    found = {}

    def of(name):
        if name not in found:
            own = CASES[name]
            cavi = CAVI(own.model, *own.args)
            first = cavi.run(num_steps=1, rng_key=jax.random.PRNGKey(3))
            found[name] = cavi, first, cavi.run(num_steps=NUM_STEPS, tol=0, state=first.state)
        return found[name]

    return of


@pytest.mark.parametrize("name", cases(SLOW_TO_COMPILE))
def test_sweeps_and_bounds_are_those_derived_by_hand(fitted, name):
    own, (_, first, result) = CASES[name], fitted(name)
    assert result.losses.shape == (NUM_STEPS,) and result.losses.dtype == np.float64
    q, bounds = numbers(first.params), []
    assert -first.losses[-1] == pytest.approx(own.bound(q), rel=1e-8)
    for _ in range(NUM_STEPS):
        own.sweep(q)
        bounds.append(own.bound(q))
    np.testing.assert_allclose(-result.losses, bounds, rtol=1e-8)
    assert_close(numbers(result.params), q)


@pytest.mark.parametrize("name", cases(SLOW_TO_COMPILE))
def test_both_converge_to_the_same_optimum(fitted, name):
    own, (cavi, _, result) = CASES[name], fitted(name)
    more = cavi.run(num_steps=NUM_SWEEPS, tol=0, state=result.state)
    q = numbers(result.params)
    for _ in range(NUM_SWEEPS):
        own.sweep(q)
    assert_close(numbers(more.params), q)
    assert -more.losses[-1] == pytest.approx(own.bound(q), rel=1e-10)
    assert np.diff(more.losses)[-1] == pytest.approx(0.0, abs=1e-9)  # it has converged


@pytest.mark.parametrize("name", cases(SLOW_TO_COMPILE))
def test_bound_never_falls(fitted, name):
    losses = np.append(fitted(name)[1].losses, fitted(name)[2].losses)
    assert np.diff(losses).max() < 1e-9 * np.abs(losses).max()
    assert losses[-1] < losses[0]


def monte_carlo(cavi, result, own, num_draws=4000):
    """Mean and standard error of log p(x, z) - log q(z) over draws of the returned posterior."""

    def one(key):
        values, log_q = {}, 0.0
        for name, factor in result.posterior.items():
            key, own_key = jax.random.split(key)
            drawn = factor.sample(own_key)
            log_q += factor.log_prob(drawn).sum()
            axes = cavi.plan.factors[name].axes
            values[name] = axes.from_rows(drawn) if drawn.shape != axes.shape else drawn
        return log_density(own.model, own.args, {}, values)[0] - log_q

    draws = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.PRNGKey(0), num_draws)))
    return draws.mean(), draws.std(ddof=1) / num_draws**0.5


@pytest.mark.parametrize("name", cases(set(CASES) - {"student_t", "poisson_mixture"}))
def test_bound_is_a_monte_carlo_mean_of_the_posterior(fitted, name):
    cavi, _, result = fitted(name)
    estimate, error = monte_carlo(cavi, result, CASES[name])
    assert 0 < error < 0.1
    assert abs(-result.losses[-1] - estimate) < 4 * error


def test_a_biased_bound_is_rejected_by_monte_carlo(fitted):
    cavi, _, result = fitted("linear_regression")
    estimate, error = monte_carlo(cavi, result, CASES["linear_regression"])
    assert abs(-result.losses[-1] + 8 * error - estimate) > 4 * error


# --- one factor: the bound is the evidence -------------------------------------------------------


def single(prior, likelihood):
    """A model of one latent whose observations are independent given it."""

    def model(x):
        z = numpyro.sample("z", prior())
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", likelihood(z), obs=x)

    return model


def log_beta(a, b):
    return gammaln(a) + gammaln(b) - gammaln(a + b)


HEADS = np.array([0, 1, 1, 0, 1, 1, 1])
FEW = np.array([2, 0, 5, 1])
REALS = np.array([0.3, -1.2, 2.5, 0.9])
PLUS = np.array([0.3, 1.2, 2.5, 0.9])
DIE = np.array([0, 2, 2, 1, 2, 0])
PAIRS = RNG.normal(size=(6, 2))


def beta_bernoulli():
    model = single(lambda: dist.Beta(2.0, 3.0), dist.Bernoulli)
    return model, (HEADS,), log_beta(2 + 5, 3 + 2) - log_beta(2, 3)


def beta_binomial():
    model = single(lambda: dist.Beta(2.0, 3.0), lambda z: dist.Binomial(6, z))
    ways = (gammaln(7) - gammaln(FEW + 1) - gammaln(7 - FEW)).sum()
    evidence = ways + log_beta(2 + FEW.sum(), 3 + (6 - FEW).sum()) - log_beta(2, 3)
    return model, (FEW,), evidence


def gamma_evidence(a, b, shape, total, constant):
    """Gamma(a, b) prior times z^shape exp(-z total) times a constant."""
    return (
        a * np.log(b) - gammaln(a) + gammaln(a + shape) - (a + shape) * np.log(b + total) + constant
    )


def gamma_poisson():
    model = single(lambda: dist.Gamma(2.0, 0.7), dist.Poisson)
    return model, (FEW,), gamma_evidence(2.0, 0.7, FEW.sum(), 4, -gammaln(FEW + 1).sum())


def gamma_exponential():
    model = single(lambda: dist.Gamma(2.0, 0.7), dist.Exponential)
    return model, (PLUS,), gamma_evidence(2.0, 0.7, 4, PLUS.sum(), 0.0)


def gamma_of_a_known_shape():
    model = single(lambda: dist.Exponential(0.7), lambda z: dist.Gamma(1.5, z))
    constant = 0.5 * np.log(PLUS).sum() - 4 * gammaln(1.5)
    return model, (PLUS,), gamma_evidence(1.0, 0.7, 6.0, PLUS.sum(), constant)


def precision_of_a_normal():
    model = single(lambda: dist.Gamma(2.0, 0.7), lambda z: dist.Normal(0.5, precision(z)))
    total, constant = ((REALS - 0.5) ** 2).sum() / 2, -2 * np.log(2 * np.pi)
    return model, (REALS,), gamma_evidence(2.0, 0.7, 2.0, total, constant)


def variance_of_a_normal():
    model = single(lambda: dist.InverseGamma(2.0, 0.7), lambda z: dist.Normal(0.5, jnp.sqrt(z)))
    return model, (REALS,), precision_of_a_normal()[2]


def normal_normal():
    model = single(lambda: dist.Normal(1.0, 2.0), lambda z: dist.Normal(z, 0.5))
    covariance = 4.0 + 0.25 * np.eye(4)
    return model, (REALS,), st.multivariate_normal(np.ones(4), covariance).logpdf(REALS)


def log_normal_log_normal():
    prior = lambda: dist.LogNormal(1.0, 2.0)  # noqa: E731
    model = single(prior, lambda z: dist.LogNormal(jnp.log(z), 0.5))
    covariance, log_x = 4.0 + 0.25 * np.eye(4), np.log(PLUS)
    evidence = st.multivariate_normal(np.ones(4), covariance).logpdf(log_x) - log_x.sum()
    return model, (PLUS,), evidence


def joint_log_normal():
    """Products of two logarithms: a joint Gaussian of them."""

    def model(X, y):
        z = numpyro.sample("z", dist.LogNormal(0.0, 1.5).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(X @ jnp.log(z), 0.5).to_event(1), obs=y)

    covariance = 1.5**2 * DESIGN @ DESIGN.T + 0.25 * np.eye(15)
    return (
        model,
        (DESIGN, RESPONSE),
        st.multivariate_normal(np.zeros(15), covariance).logpdf(RESPONSE),
    )


def dirichlet_categorical():
    a = np.array([0.5, 1.0, 2.0])
    model = single(lambda: dist.Dirichlet(jnp.asarray(a)), dist.Categorical)
    counts = np.bincount(DIE)
    evidence = (gammaln(a + counts) - gammaln(a)).sum()
    return model, (DIE,), evidence + gammaln(a.sum()) - gammaln(a.sum() + len(DIE))


def dirichlet_multinomial():
    def model(x):
        z = numpyro.sample("z", dist.Dirichlet(jnp.array([0.5, 1.0, 2.0])))
        numpyro.sample("x", dist.Multinomial(6, z), obs=x)

    counts = np.bincount(DIE)
    ways = gammaln(7) - gammaln(counts + 1).sum()
    return model, (counts,), dirichlet_categorical()[2] + ways


def regression_of_known_noise():
    def model(X, y):
        w = numpyro.sample("w", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(X @ w, 0.5), obs=y)

    covariance = 4 * DESIGN @ DESIGN.T + 0.25 * np.eye(15)
    return (
        model,
        (DESIGN, RESPONSE),
        st.multivariate_normal(np.zeros(15), covariance).logpdf(RESPONSE),
    )


def regression_with_a_gaussian_prior():
    scale = np.array([[2.0, 0, 0], [0.5, 1.0, 0], [-0.3, 0.2, 0.7]])

    def model(X, y):
        w = numpyro.sample("w", dist.MultivariateNormal(jnp.ones(3), scale_tril=jnp.asarray(scale)))
        numpyro.sample("y", dist.Normal(X @ w, 0.5).to_event(1), obs=y)

    covariance = DESIGN @ scale @ scale.T @ DESIGN.T + 0.25 * np.eye(15)
    exact = st.multivariate_normal(DESIGN.sum(-1), covariance).logpdf(RESPONSE)
    return model, (DESIGN, RESPONSE), exact


def regression_of_two_responses():
    """A matrix of weights with a joint axis that is not the last."""

    def model(X, y):
        w = numpyro.sample("w", dist.Normal(0.0, 2.0).expand([3, 2]).to_event(2))
        numpyro.sample("y", dist.Normal(X @ w, 0.5).to_event(2), obs=y)

    Y = np.stack([RESPONSE, RESPONSE**2 - 1], -1)
    covariance = 4 * DESIGN @ DESIGN.T + 0.25 * np.eye(15)
    exact = st.multivariate_normal(np.zeros(15), covariance).logpdf(Y.T).sum()
    return model, (DESIGN, Y), exact


def wishart_precision():
    nu, rate = 4.0, np.array([[1.0, 0.3], [0.3, 2.0]])

    def model(x):
        z = numpyro.sample("z", dist.Wishart(nu, rate_matrix=jnp.asarray(rate)))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(2), precision_matrix=z), obs=x)

    def log_normalizer(nu, rate):
        return multigammaln(nu / 2, 2) + nu * np.log(2) - nu / 2 * np.linalg.slogdet(rate)[1]

    exact = log_normalizer(nu + 6, rate + PAIRS.T @ PAIRS) - log_normalizer(nu, rate)
    return model, (PAIRS,), exact - 6 * np.log(2 * np.pi)


def labels_of_known_components():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
            numpyro.sample("x", dist.Normal(jnp.array([-1.0, 0.0, 2.0])[z], 0.5), obs=x)

    p = st.norm(np.array([-1.0, 0.0, 2.0]), 0.5).pdf(REALS[:, None]) @ [0.2, 0.3, 0.5]
    return model, (REALS,), np.log(p).sum()


def a_forbidden_label():
    """Known probability zero: never chosen, and no nan."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Categorical(jnp.array([0.0, 0.3, 0.7])))
            numpyro.sample("x", dist.Normal(jnp.array([-1.0, 0.0, 2.0])[z], 0.5), obs=x)

    p = st.norm(np.array([0.0, 2.0]), 0.5).pdf(REALS[:, None]) @ [0.3, 0.7]
    return model, (REALS,), np.log(p).sum()


def a_masked_label():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(2.0 * z, 0.5).mask(np.arange(4) > 0), obs=x)

    p = st.norm(np.array([0.0, 2.0]), 0.5).pdf(REALS[1:, None]) @ [0.7, 0.3]
    return model, (REALS,), np.log(p).sum()


def a_factor_in_a_plate():
    def model():
        z = numpyro.sample("z", dist.Gamma(2.0, 0.7))
        with numpyro.plate("data", 7):
            numpyro.factor("f", -z)

    return model, (), gamma_evidence(2.0, 0.7, 0, 7, 0.0)


EXACT = [
    beta_bernoulli, beta_binomial, gamma_poisson, gamma_exponential, gamma_of_a_known_shape,
    precision_of_a_normal, variance_of_a_normal, normal_normal, log_normal_log_normal,
    joint_log_normal, dirichlet_categorical, dirichlet_multinomial, regression_of_known_noise,
    regression_with_a_gaussian_prior, regression_of_two_responses, wishart_precision,
    labels_of_known_components, a_forbidden_label, a_masked_label, a_factor_in_a_plate,
]  # fmt: skip


@pytest.mark.parametrize(
    "build",
    [pytest.param(f, marks=[pytest.mark.slow] if i % 2 else []) for i, f in enumerate(EXACT)],
    ids=lambda f: f.__name__,
)
def test_bound_of_one_factor_is_the_evidence(build):
    """A mean-field posterior of one block is the posterior: reached in one sweep."""
    model, args, evidence = build()
    result = CAVI(model, *args).run(num_steps=1)
    np.testing.assert_allclose(-result.losses, evidence, rtol=1e-10, atol=1e-10)


# --- refusals ------------------------------------------------------------------------------------

X, Y = DESIGN[:, :2], (RESPONSE > 0).astype(int)


def weights():
    return numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def observe(name, fn, value):
    with numpyro.plate("data", len(value)):
        return numpyro.sample(name, fn, obs=value)


def logistic_regression():
    observe("y", dist.Bernoulli(logits=X @ weights()), Y)


def poisson_regression():
    observe("y", dist.Poisson(jnp.exp(X @ weights())), Y)


def squared_mean():
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    observe("y", dist.Normal(m**2, 1.0), RESPONSE)


def relu_unit():
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    observe("y", dist.Normal(jax.nn.relu(m * X[:, 0]), 1.0), RESPONSE)


def latent_gamma_shape():
    a = numpyro.sample("a", dist.Gamma(1.0, 1.0))
    observe("y", dist.Gamma(a, 1.0), RESPONSE**2)


def half_cauchy_scale():
    s = numpyro.sample("s", dist.HalfCauchy(1.0))
    observe("y", dist.Normal(0.0, s), RESPONSE)


def gamma_on_a_standard_deviation():
    s = numpyro.sample("s", dist.Gamma(1.0, 1.0))
    observe("y", dist.Normal(0.0, s), RESPONSE)


def non_centred_scale():
    tau = numpyro.sample("tau", dist.Gamma(1.0, 1.0))
    with numpyro.plate("schools", 8):
        eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(eta * precision(tau), ERROR), obs=EFFECT)


def ising_in_a_plate():
    with numpyro.plate("spins", 6):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
    spin = 2 * z - 1
    numpyro.factor("energy", 0.3 * (spin[1:] * spin[:-1]).sum())


def random_walk_by_scan():
    def step(before, y):
        now = numpyro.sample("state", dist.Normal(before, 1.0))
        numpyro.sample("y", dist.Normal(now, 1.0), obs=y)
        return now, None

    scan(step, 0.0, jnp.asarray(RESPONSE))


def summed_out_mixture():
    mu = weights()
    mixture = dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), dist.Normal(mu, 1.0))
    observe("y", mixture, RESPONSE)


def a_python_if():
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    observe("y", dist.Normal(m if m > 0 else 0.0, 1.0), RESPONSE)


def no_latents():
    observe("y", dist.Normal(0.0, 1.0), RESPONSE)


REFUSED = [
    (logistic_regression, r"Site 'y' \(BernoulliLogits\): .* because of logits"),
    (poisson_regression, r"Site 'y' \(Poisson\): its rate .* because of exp"),
    (squared_mean, r"Site 'y': its log-density has m\^4, .* latent 'm' \(Normal\)"),
    (relu_unit, r"Site 'y' \(Normal\): its loc .* because of max"),
    (latent_gamma_shape, r"Site 'y' \(Gamma\): .* log-gamma function of a concentration"),
    (half_cauchy_scale, r"[Ss]ite 's' .*HalfCauchy"),
    (gamma_on_a_standard_deviation, r"Site 'y': .* has s\^-2, .* latent 's' \(Gamma\)"),
    (non_centred_scale, r"Site 'y': .* has tau\^-0.5, .* latent 'tau' \(Gamma\)"),
    (ising_in_a_plate, r"Site 'energy': .* has \[z = k\] x \[z = k\], .* latent 'z'"),
    (random_walk_by_scan, r"because of scan"),
    (summed_out_mixture, r"Site 'y' .*MixtureSameFamily"),
    (a_python_if, r"looks at .* in Python"),
    (no_latents, r"no latent sites"),
]


@pytest.mark.parametrize("model, message", REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_refusals_name_the_site_and_the_reason(model, message):
    with pytest.raises(NotConjugateError, match=message):
        CAVI(model)
