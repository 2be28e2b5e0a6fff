r"""Log-densities as polynomials in statistics: one rule for each distribution.

.. math::

    \log \mathcal N(x \mid \mu, \tau^{-1}) = \tfrac12 \log \tau - \tfrac12 \tau (x - \mu)^2
        - \tfrac12 \log 2\pi, \quad \ldots

Values and parameters are symbolic arrays; a rule returns one with the shape of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from scipy.special import gammaln

from pyro_vi_ext.cavi.algebra import Algebra, broadcast, broadcast_in_dim, concrete
from pyro_vi_ext.cavi.symbolic import Expr, NotRepresentable

__all__ = ["DENSITIES", "Density", "density_of"]


@dataclass(frozen=True)
class Density:
    """A rule: which attributes of a distribution it needs, and its log-density.

    :ivar names: the attributes; of a tuple among them, the first that there is.
    :ivar log_density: (algebra, value, parameters) -> symbolic array.
    """

    names: tuple[str | tuple[str, ...], ...]
    log_density: Callable

    def parameters(self, fn) -> dict:
        result = {}
        for name in self.names:
            choices = (name,) if isinstance(name, str) else name
            # Lazy attributes may be computed by what has no closed form, a Cholesky factor for one.
            found = next((n for n in choices if vars(fn).get(n) is not None), choices[0])
            result[found] = getattr(fn, found)
        return result


DENSITIES: dict[str, Density] = {}


def rule(*kinds: str, names: Sequence[str]):
    def decorate(function):
        for kind in kinds:
            DENSITIES[kind] = Density(tuple(names), function)
        return function

    return decorate


def density_of(fn) -> Density | None:
    return DENSITIES.get(type(fn).__name__)


def together(*xs: Expr) -> list[Expr]:
    """Arrays broadcast to their common shape."""
    shape = np.broadcast_shapes(*(x.shape for x in xs))
    return [broadcast(x, shape) for x in xs]


def known(function: Callable, *xs: Expr) -> Expr:
    """A function of known arrays of one shape."""
    if not all(x.is_known() for x in xs):
        raise NotRepresentable("a latent where only a known number has a closed form")
    return Expr.of(function(*(concrete(x) for x in xs)))


def by_label(algebra: Algebra, function: Callable, x: Expr, what: str) -> Expr:
    """A function of an array that is known, or known given discrete latents."""
    if x.is_known():
        return Expr.of(function(concrete(x)))

    def inner(y: Expr) -> Expr:
        if not y.is_known():
            return by_label(algebra, function, y, what)
        return Expr.of(function(concrete(y))).relabelled_like(y)

    return algebra.by_label(inner, [x], what)


@rule("Normal", names=("loc", "scale"))
def normal(algebra, x, p):
    x, loc, scale = together(x, p["loc"], p["scale"])
    return _normal(algebra, x - loc, algebra.power(scale, -2.0))


def _normal(algebra, difference, precision):
    square = algebra.power(difference, 2.0)
    half = algebra.log(precision).scaled(0.5) - (precision * square).scaled(0.5)
    return half - Expr.of(0.5 * math.log(2 * math.pi))


@rule(
    "MultivariateNormal",
    names=("loc", ("precision_matrix", "covariance_matrix", "scale_tril")),
)
def multivariate_normal(algebra, x, p):
    if "precision_matrix" in p:
        precision = p["precision_matrix"]
    elif "covariance_matrix" in p:
        precision = known(np.linalg.inv, p["covariance_matrix"])
    else:
        precision = known(lambda s: np.linalg.inv(s @ np.swapaxes(s, -1, -2)), p["scale_tril"])
    x, loc = together(x, p["loc"])
    dim = x.shape[-1]
    shape = np.broadcast_shapes(x.shape[:-1], precision.shape[:-2])
    difference, last = broadcast(x - loc, (*shape, dim)), len(shape)
    square = (*shape, dim, dim)
    left = broadcast_in_dim(difference, square, range(last + 1))
    right = broadcast_in_dim(difference, square, (*range(last), last + 1))
    products = left * broadcast(precision, square) * right
    log_det = broadcast(algebra.logdet(precision), shape)
    half = log_det.scaled(0.5) - products.sum([last, last + 1]).scaled(0.5)
    return half - Expr.of(0.5 * dim * math.log(2 * math.pi))


@rule("Wishart", names=("concentration", "rate_matrix"))
def wishart(algebra, x, p):
    dim = x.shape[-1]
    nu, rate = p["concentration"], p["rate_matrix"]
    shape = np.broadcast_shapes(x.shape[:-2], nu.shape, rate.shape[:-2])
    wide = (*shape, dim, dim)

    def normalizer(nu, rate):
        powers = nu / 2 * (dim * math.log(2) - np.linalg.slogdet(rate)[1])
        return powers + multigammaln_of(nu / 2, dim)

    degrees = broadcast(known(lambda nu: (nu - dim - 1) / 2, nu), shape)
    trace = (broadcast(rate, wide) * broadcast(x, wide)).sum([len(shape), len(shape) + 1])
    log_det = broadcast(algebra.logdet(x), shape)
    return degrees * log_det - trace.scaled(0.5) - broadcast(known(normalizer, nu, rate), shape)


def multigammaln_of(a, dim: int):
    """Logarithm of the multivariate gamma function of an array."""
    terms = [gammaln(a - 0.5 * i) for i in range(dim)]
    return sum(terms) + dim * (dim - 1) / 4 * math.log(math.pi)


@rule("LogNormal", names=("loc", "scale"))
def log_normal(algebra, x, p):
    x, loc, scale = together(x, p["loc"], p["scale"])
    log_x = algebra.log(x)
    return _normal(algebra, log_x - loc, algebra.power(scale, -2.0)) - log_x


@rule("Gamma", names=("concentration", "rate"))
def gamma(algebra, x, p):
    x, a, b = together(x, p["concentration"], p["rate"])
    normalizer = by_label(algebra, gammaln, a, "the log-gamma function of a concentration")
    return a * algebra.log(b) - normalizer + (a - Expr.of(1.0)) * algebra.log(x) - b * x


@rule("InverseGamma", names=("concentration", "rate"))
def inverse_gamma(algebra, x, p):
    x, a, b = together(x, p["concentration"], p["rate"])
    normalizer = by_label(algebra, gammaln, a, "the log-gamma function of a concentration")
    inverse = algebra.power(x, -1.0)
    return a * algebra.log(b) - normalizer - (a + Expr.of(1.0)) * algebra.log(x) - b * inverse


@rule("Exponential", names=("rate",))
def exponential(algebra, x, p):
    x, rate = together(x, p["rate"])
    return algebra.log(rate) - rate * x


@rule("Beta", names=("concentration1", "concentration0"))
def beta(algebra, x, p):
    x, a, b = together(x, p["concentration1"], p["concentration0"])
    normalizer = known(lambda a, b: gammaln(a) + gammaln(b) - gammaln(a + b), a, b)
    one = Expr.of(1.0)
    powers = (a - one) * algebra.log(x) + (b - one) * algebra.log(one - x)
    return powers - normalizer


@rule("Dirichlet", names=("concentration",))
def dirichlet(algebra, x, p):
    x, a = together(x, p["concentration"])
    normalizer = known(lambda a: gammaln(a).sum(-1) - gammaln(a.sum(-1)), a)
    return ((a - Expr.of(1.0)) * algebra.log(x)).sum([-1 + len(x.labels)]) - normalizer


def log_probability(algebra: Algebra, probs: Expr) -> Expr:
    """Logarithms; of known zeros that of the smallest number, as -inf times 0 would be nan."""
    if _has_continuous(probs):
        return algebra.log(probs)
    return by_label(algebra, lambda y: np.log(np.maximum(y, _limits().tiny)), probs, "a logarithm")


def log_success_and_failure(algebra: Algebra, probs: Expr) -> tuple[Expr, Expr]:
    """log p and log(1 - p); known probabilities are kept from 0 and 1 as NumPyro does."""
    if _has_continuous(probs):
        return algebra.log(probs), algebra.log(Expr.of(1.0) - probs)
    limits = _limits()

    def clamped(y):
        return np.clip(y, limits.tiny, 1.0 - limits.eps)

    success = by_label(algebra, lambda y: np.log(clamped(y)), probs, "a logarithm")
    return success, by_label(algebra, lambda y: np.log1p(-clamped(y)), probs, "a logarithm")


def _has_continuous(x: Expr) -> bool:
    return any(atom.stat[0] != "onehot" for term in x.terms for atom in term.atoms)


def _limits():
    return jnp.finfo(jnp.result_type(float))


@rule("BernoulliProbs", names=("probs",))
def bernoulli(algebra, x, p):
    x, probs = together(x, p["probs"])
    success, failure = log_success_and_failure(algebra, probs)
    return x * success + (Expr.of(1.0) - x) * failure


@rule("BernoulliLogits", names=("logits",))
def bernoulli_logits(algebra, x, p):
    x, logits = together(x, p["logits"])
    rest = by_label(algebra, lambda y: np.logaddexp(0.0, y), logits, "logits")
    return x * logits - rest


@rule("CategoricalProbs", names=("probs",))
def categorical(algebra, x, p):
    probs = p["probs"]
    num = probs.shape[-1]
    chosen, log_p = together(algebra.categories(x, num), log_probability(algebra, probs))
    return (chosen * log_p).sum([len(chosen.labels) - 1])


@rule("CategoricalLogits", names=("logits",))
def categorical_logits(algebra, x, p):
    logits = p["logits"]

    def normalized(y):
        largest = y.max(-1, keepdims=True)
        log_p = y - largest - np.log(np.exp(y - largest).sum(-1, keepdims=True))
        return np.maximum(log_p, np.log(_limits().tiny))

    chosen, log_p = together(algebra.categories(x, logits.shape[-1]), known(normalized, logits))
    return (chosen * log_p).sum([len(chosen.labels) - 1])


@rule("BinomialProbs", names=("probs", "total_count"))
def binomial(algebra, x, p):
    x, probs, n = together(x, p["probs"], p["total_count"])
    coefficient = known(lambda n, x: gammaln(n + 1) - gammaln(x + 1) - gammaln(n - x + 1), n, x)
    success, failure = log_success_and_failure(algebra, probs)
    return coefficient + x * success + (n - x) * failure


@rule("MultinomialProbs", names=("probs", "total_count"))
def multinomial(algebra, x, p):
    x, probs = together(x, p["probs"])
    coefficient = known(lambda x: gammaln(x.sum(-1) + 1) - gammaln(x + 1).sum(-1), x)
    return coefficient + (x * log_probability(algebra, probs)).sum([len(x.labels) - 1])


@rule("Poisson", names=("rate",))
def poisson(algebra, x, p):
    x, rate = together(x, p["rate"])
    return x * algebra.log(rate) - rate - known(lambda x: gammaln(x + 1), x)


@rule("Unit", names=("log_factor",))
def unit(algebra, x, p):
    shape = np.broadcast_shapes(p["log_factor"].shape, x.shape[:-1])
    return broadcast(p["log_factor"], shape)
