r"""The factors of a mean-field posterior: natural parameters in, moments and entropy out.

.. math::

    q_i(z_i) \propto \exp \langle \eta_i, t_i(z_i) \rangle, \qquad
    \eta_i = \frac{\partial F}{\partial\, \mathbb{E}[t_i]}, \qquad
    \mathbb{E}[t_i] = \nabla A_i(\eta_i),

with F the expected log joint, multilinear in the :math:`\mathbb{E}[t_i]`. Which family a latent has
is decided by its prior; which statistics are allowed, by the family.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import digamma, gammaln

__all__ = ["FAMILIES", "Family", "GaussianAxes"]


@dataclass(frozen=True)
class GaussianAxes:
    """Which axes of a Gaussian latent have a joint covariance; the others are independent.

    :ivar shape: shape of the latent.
    :ivar joint: its joint axes, increasing.
    """

    shape: tuple[int, ...]
    joint: tuple[int, ...] = ()

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(a for a in range(len(self.shape)) if a not in self.joint)

    @property
    def size(self) -> int:
        return math.prod(self.shape[a] for a in self.joint)

    def to_rows(self, x):
        """(\\*shape) to (\\*batch, size)."""
        x = jnp.transpose(x, (*self.batch, *self.joint))
        return x.reshape(*x.shape[: len(self.batch)], self.size)

    def from_rows(self, x):
        sizes = [self.shape[a] for a in (*self.batch, *self.joint)]
        order = [(*self.batch, *self.joint).index(a) for a in range(len(self.shape))]
        return jnp.transpose(x.reshape(sizes), order)

    def to_matrices(self, xx):
        """(\\*shape, \\*joint) to (\\*batch, size, size)."""
        rank = len(self.shape)
        second = range(rank, rank + len(self.joint))
        xx = jnp.transpose(xx, (*self.batch, *self.joint, *second))
        return xx.reshape(*xx.shape[: len(self.batch)], self.size, self.size)

    def from_matrices(self, xx):
        sizes = [self.shape[a] for a in self.joint]
        xx = xx.reshape(*[self.shape[a] for a in self.batch], *sizes, *sizes)
        axes = [*self.batch, *self.joint]
        order = [axes.index(a) for a in range(len(self.shape))]
        return jnp.transpose(xx, (*order, *range(len(axes), len(axes) + len(self.joint))))


@dataclass(frozen=True)
class Family:
    """A family of factors. Functions take and return dicts of arrays.

    :ivar keys: its statistics.
    :ivar update: natural parameters (gradients by statistic) -> parameters.
    :ivar moments: parameters -> expected statistics.
    :ivar entropy: parameters -> entropy of each element.
    :ivar distribution: parameters -> a NumPyro distribution.
    :ivar is_proper: parameters -> whether all are valid.
    :ivar statistics: a value -> its statistics.
    """

    keys: tuple[str, ...]
    update: Callable
    moments: Callable
    entropy: Callable
    distribution: Callable
    is_proper: Callable
    statistics: Callable


def _positive(*names):
    def is_proper(q, factor):
        return jnp.all(jnp.array([jnp.all(q[n] > 0) & jnp.all(jnp.isfinite(q[n])) for n in names]))

    return is_proper


# Gaussian: natural parameters of x and of x x'.


def _gaussian_update(g, factor):
    if not factor.axes.joint:
        scale = -0.5 / g["xx"]
        return {"loc": g["x"] * scale, "covariance": scale}
    axes = factor.axes
    matrix = axes.to_matrices(g["xx"])
    precision = -(matrix + jnp.swapaxes(matrix, -1, -2))
    covariance = jnp.linalg.inv(precision)
    loc = jnp.einsum("...ij,...j->...i", covariance, axes.to_rows(g["x"]))
    return {"loc": axes.from_rows(loc), "covariance": covariance}


def _gaussian_moments(q, factor):
    axes, loc = factor.axes, q["loc"]
    if not axes.joint:
        return {"x": loc, "xx": q["covariance"] + loc**2}
    rows = axes.to_rows(loc)
    second = q["covariance"] + rows[..., :, None] * rows[..., None, :]
    return {"x": loc, "xx": axes.from_matrices(second)}


def _gaussian_entropy(q, factor):
    constant = 0.5 * (1 + math.log(2 * math.pi))
    if not factor.axes.joint:
        return constant + 0.5 * jnp.log(q["covariance"])
    _, log_det = jnp.linalg.slogdet(q["covariance"])
    return constant * factor.axes.size + 0.5 * log_det


def _gaussian_distribution(q, factor):
    axes = factor.axes
    if not axes.joint:
        return dist.Normal(q["loc"], jnp.sqrt(q["covariance"]))
    return dist.MultivariateNormal(axes.to_rows(q["loc"]), q["covariance"])


def _gaussian_proper(q, factor):
    covariance = q["covariance"]
    scale = jnp.linalg.cholesky(covariance) if factor.axes.joint else jnp.sqrt(covariance)
    positive = jnp.all(jnp.isfinite(scale)) & (factor.axes.joint != () or jnp.all(covariance > 0))
    return positive & jnp.all(jnp.isfinite(q["loc"]))


def _gaussian_statistics(x, factor):
    axes = factor.axes
    if not axes.joint:
        return {"x": x, "xx": x**2}
    rows = axes.to_rows(x)
    return {"x": x, "xx": axes.from_matrices(rows[..., :, None] * rows[..., None, :])}


GAUSSIAN = Family(
    ("x", "xx"),
    _gaussian_update,
    _gaussian_moments,
    _gaussian_entropy,
    _gaussian_distribution,
    _gaussian_proper,
    _gaussian_statistics,
)


def _log_normal_distribution(q, factor):
    if not factor.axes.joint:
        return dist.LogNormal(q["loc"], jnp.sqrt(q["covariance"]))
    logarithm = _gaussian_distribution(q, factor)
    return dist.TransformedDistribution(logarithm, dist.transforms.ExpTransform())


# The density of x = exp(w) is that of w divided by x: one more log x in the natural parameters.
LOG_NORMAL = Family(
    ("x", "xx"),
    lambda g, f: _gaussian_update({"x": g["x"] + 1.0, "xx": g["xx"]}, f),
    _gaussian_moments,
    lambda q, f: _gaussian_entropy(q, f) + f.axes.to_rows(q["loc"]).sum(-1),
    _log_normal_distribution,
    _gaussian_proper,
    lambda x, f: _gaussian_statistics(jnp.log(x), f),
)


# Gamma and its reciprocal.


def _gamma_entropy(q, factor):
    a, b = q["concentration"], q["rate"]
    return a - jnp.log(b) + gammaln(a) + (1 - a) * digamma(a)


GAMMA = Family(
    ("log", "pow1"),
    lambda g, f: {"concentration": g["log"] + 1.0, "rate": -g["pow1"]},
    lambda q, f: {
        "log": digamma(q["concentration"]) - jnp.log(q["rate"]),
        "pow1": q["concentration"] / q["rate"],
    },
    _gamma_entropy,
    lambda q, f: dist.Gamma(q["concentration"], q["rate"]),
    _positive("concentration", "rate"),
    lambda x, f: {"log": jnp.log(x), "pow1": x},
)

INVERSE_GAMMA = Family(
    ("log", "pow-1"),
    lambda g, f: {"concentration": -g["log"] - 1.0, "rate": -g["pow-1"]},
    lambda q, f: {
        "log": jnp.log(q["rate"]) - digamma(q["concentration"]),
        "pow-1": q["concentration"] / q["rate"],
    },
    lambda q, f: (
        q["concentration"]
        + jnp.log(q["rate"])
        + gammaln(q["concentration"])
        - (1 + q["concentration"]) * digamma(q["concentration"])
    ),
    lambda q, f: dist.InverseGamma(q["concentration"], q["rate"]),
    _positive("concentration", "rate"),
    lambda x, f: {"log": jnp.log(x), "pow-1": 1.0 / x},
)


# Probabilities.


def _beta_entropy(q, factor):
    a, b = q["concentration1"], q["concentration0"]
    inner = (a - 1) * digamma(a) + (b - 1) * digamma(b) - (a + b - 2) * digamma(a + b)
    return gammaln(a) + gammaln(b) - gammaln(a + b) - inner  # JAX's betaln errs by up to 7e-7


BETA = Family(
    ("log", "log1m"),
    lambda g, f: {"concentration1": g["log"] + 1.0, "concentration0": g["log1m"] + 1.0},
    lambda q, f: {
        "log": digamma(q["concentration1"]) - digamma(q["concentration1"] + q["concentration0"]),
        "log1m": digamma(q["concentration0"]) - digamma(q["concentration1"] + q["concentration0"]),
    },
    _beta_entropy,
    lambda q, f: dist.Beta(q["concentration1"], q["concentration0"]),
    _positive("concentration1", "concentration0"),
    lambda x, f: {"log": jnp.log(x), "log1m": jnp.log1p(-x)},
)


def _dirichlet_entropy(q, factor):
    a = q["concentration"]
    total = a.sum(-1)
    normalizer = gammaln(a).sum(-1) - gammaln(total)
    inner = ((a - 1) * digamma(a)).sum(-1)
    return normalizer + (total - a.shape[-1]) * digamma(total) - inner


DIRICHLET = Family(
    ("log",),
    lambda g, f: {"concentration": g["log"] + 1.0},
    lambda q, f: {
        "log": digamma(q["concentration"]) - digamma(q["concentration"].sum(-1, keepdims=True))
    },
    _dirichlet_entropy,
    lambda q, f: dist.Dirichlet(q["concentration"]),
    _positive("concentration"),
    lambda x, f: {"log": jnp.log(x)},
)


def _discrete_entropy(q, factor):
    log_p = jax.nn.log_softmax(q["logits"], -1)
    p = jnp.exp(log_p)
    return -jnp.where(p > 0, p * log_p, 0.0).sum(-1)


def _discrete_distribution(q, factor):
    if factor.kind.startswith("Bernoulli"):
        return dist.Bernoulli(logits=q["logits"][..., 1] - q["logits"][..., 0])
    return dist.Categorical(logits=q["logits"])


DISCRETE = Family(
    ("onehot",),
    lambda g, f: {"logits": jax.nn.log_softmax(g["onehot"], -1)},
    lambda q, f: {"onehot": jax.nn.softmax(q["logits"], -1)},
    _discrete_entropy,
    _discrete_distribution,
    lambda q, f: ~jnp.any(jnp.isnan(q["logits"])),
    lambda x, f: {"onehot": jax.nn.one_hot(x, f.num_values)},
)

# Matrices.


def _wishart_update(g, factor):
    matrix = g["pow1"]
    dim = matrix.shape[-1]
    return {
        "concentration": 2 * g["logdet"] + dim + 1,
        "rate_matrix": -(matrix + jnp.swapaxes(matrix, -1, -2)),
    }


def _wishart_moments(q, factor):
    nu, rate = q["concentration"], q["rate_matrix"]
    dim = rate.shape[-1]
    halves = (nu[..., None] - jnp.arange(dim)) / 2
    log_det = digamma(halves).sum(-1) + dim * math.log(2) - jnp.linalg.slogdet(rate)[1]
    return {"logdet": log_det, "pow1": nu[..., None, None] * jnp.linalg.inv(rate)}


def _wishart_entropy(q, factor):
    nu, rate = q["concentration"], q["rate_matrix"]
    dim = rate.shape[-1]
    halves = (nu[..., None] - jnp.arange(dim)) / 2
    log_gamma = gammaln(halves).sum(-1) + dim * (dim - 1) / 4 * math.log(math.pi)
    log_det = jnp.linalg.slogdet(rate)[1]
    normalizer = nu * dim / 2 * math.log(2) + log_gamma - nu / 2 * log_det
    return normalizer - (nu - dim - 1) / 2 * _wishart_moments(q, factor)["logdet"] + nu * dim / 2


WISHART = Family(
    ("logdet", "pow1"),
    _wishart_update,
    _wishart_moments,
    _wishart_entropy,
    lambda q, f: dist.Wishart(q["concentration"], rate_matrix=q["rate_matrix"]),
    lambda q, f: (
        jnp.all(q["concentration"] > q["rate_matrix"].shape[-1] - 1)
        & jnp.all(jnp.isfinite(jnp.linalg.cholesky(q["rate_matrix"])))
    ),
    lambda x, f: {"logdet": jnp.linalg.slogdet(x)[1], "pow1": x},
)

FAMILIES = {
    "Wishart": WISHART,
    "Normal": GAUSSIAN,
    "MultivariateNormal": GAUSSIAN,
    "LogNormal": LOG_NORMAL,
    "Gamma": GAMMA,
    "Exponential": GAMMA,
    "InverseGamma": INVERSE_GAMMA,
    "Beta": BETA,
    "Dirichlet": DIRICHLET,
    "BernoulliProbs": DISCRETE,
    "BernoulliLogits": DISCRETE,
    "CategoricalProbs": DISCRETE,
    "CategoricalLogits": DISCRETE,
}
