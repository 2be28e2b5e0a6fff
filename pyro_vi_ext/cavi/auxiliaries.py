r"""Auxiliary variables that make likelihoods conditionally conjugate: Polya-Gamma and CRT.

.. math:: p(z; b, \eta) = h(z; b)\, e^{\eta z - A(b, \eta)}

for a base density h of known size b: each distribution has its ``tilt`` :math:`\eta` and its
``log_normalizer`` A, which is 0 at no tilt of the base. What they are for is in
:mod:`.augmentations`.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import digamma, gammaln, polygamma
from numpyro.distributions import constraints
from numpyro.distributions.util import promote_shapes, validate_sample
from numpyro.util import not_jax_tracer

__all__ = ["ChineseRestaurantTable", "PolyaGamma"]

NUM_GAMMAS = 20  # of the sum that a draw of a Polya-Gamma variable is
NUM_NODES = 64  # of the quadrature that its density is


class PolyaGamma(dist.Distribution):
    r"""The Polya-Gamma distribution.

    .. math:: \mathrm{PG}(\omega; b, c) = \cosh^b(c/2)\, e^{-c^2 \omega / 2}\,
        \mathrm{PG}(\omega; b, 0), \qquad
        \mathbb{E}_{\mathrm{PG}(b, 0)} e^{-s \omega} = \cosh^{-b} \sqrt{s / 2}

    ``log_prob`` inverts this Laplace transform on a contour through its saddle point. In float64
    its error is that of rounding for b >= 0.3, at any :math:`\omega`, 3e-12 at b = 0.1 and 1e-6 at
    b = 0.02. A draw is the sum of 20 weighted Gamma variables (equation 2 of the paper) and, for
    all the others, one of their mean and variance: the mean and variance of a draw are exact, and
    its third cumulant is, at c = 0, to 4e-10. (With their mean alone, 3e-6 of the variance would be
    missing.)

    :param b: positive, any shape.
    :param c: tilt, real.

    Reference: Polson, Scott and Windle 2013, arXiv:1205.0310.

    Example:

    >>> from pyro_vi_ext.cavi.auxiliaries import PolyaGamma
    >>> round(float(PolyaGamma(1.0, 2.0).mean), 4), round(float(PolyaGamma(1.0).log_prob(0.25)), 4)
    (0.1904, 0.604)
    """

    arg_constraints = {"b": constraints.positive, "c": constraints.real}
    support = constraints.positive

    def __init__(self, b, c=0.0, *, validate_args=None):
        b, c = jnp.asarray(b, float), jnp.asarray(c, float)
        self.b, self.c = promote_shapes(b, c)
        super().__init__(jnp.broadcast_shapes(b.shape, c.shape), validate_args=validate_args)

    def sample(self, key, sample_shape=()):
        shape = tuple(sample_shape) + self.batch_shape
        k = jnp.arange(NUM_GAMMAS).reshape(-1, *[1] * len(self.batch_shape))
        weight = 2 / ((math.pi * (2 * k + 1)) ** 2 + self.c**2)
        mean = self.mean - self.b * weight.sum(0)
        variance = self.variance - self.b * (weight**2).sum(0)
        spread = jnp.maximum(variance / mean, 1e-6 * mean)  # a difference of rounded numbers

        def with_rest(x, rest):
            x = jnp.broadcast_to(x, (NUM_GAMMAS, *self.batch_shape))
            return jnp.expand_dims(jnp.append(x, rest[None], 0), [1 + a for a in lead])

        lead = range(len(sample_shape))
        concentration = with_rest(self.b, mean / spread)
        draws = jax.random.gamma(key, concentration, (NUM_GAMMAS + 1, *shape))
        return (with_rest(weight, spread) * draws).sum(0)

    @validate_sample
    def log_prob(self, value):
        x = jnp.asarray(value, float)
        return _log_base_density(x, self.b) + self.tilt * x - self.log_normalizer

    @property
    def mean(self):
        return self.b * _tanh_over(self.c / 2) / 4

    @property
    def variance(self):
        h = jnp.abs(self.c) / 2
        small = h < 0.03
        safe = jnp.where(small, 1.0, h)
        ratio = (jnp.tanh(safe) - safe * (1 - jnp.tanh(safe) ** 2)) / safe**3
        series = 2 / 3 - h**2 * (8 / 15 - h**2 * (34 / 105 - h**2 * 496 / 2835))
        return self.b * jnp.where(small, series, ratio) / 16

    @property
    def tilt(self):
        return -(self.c**2) / 2

    @property
    def log_normalizer(self):
        return -self.b * _log_cosh(jnp.abs(self.c) / 2)


def _tanh_over(z):
    """tanh(z) / z."""
    safe = jnp.where(z == 0, 1.0, z)
    return jnp.where(z == 0, 1.0, jnp.tanh(safe) / safe)


def _log_cosh(z):
    """Of z with a real part >= 0."""
    return z + jnp.log1p(jnp.exp(-2 * z)) - math.log(2)


def _log_base_density(x, b):
    r"""Logarithm of the density of PG(b, 0).

    .. math:: \frac{1}{2 \pi i} \int e^{s x} \cosh^{-b} \sqrt{s/2}\, ds, \qquad
        s = \delta (1 + i v)^2 - \tfrac{\pi^2}{2},

    from v = -inf to inf. At v = 0 is the saddle point, where the mean of the variable tilted by
    :math:`e^{-s \omega}` is x, so nothing cancels; the nearest singularities are at v = i for all x
    and b, so the trapezoidal rule converges geometrically.
    """

    def root(s):
        return jnp.sqrt(s / 2 + 0j)

    def closer(_, log_delta):  # the slope of the logarithm of the mean is between -1 and -1/2
        mean = _tanh_over(root(jnp.exp(log_delta) - math.pi**2 / 2)).real / 4
        return log_delta + jnp.log(mean * b / x) / 0.75

    start = jnp.log(b / x) + jnp.log1p(b / x / 8)
    delta = jnp.exp(jax.lax.fori_loop(0, 12, closer, start))
    step = jnp.sqrt(40 / (delta * x)) / NUM_NODES

    def exponent(w):
        s = delta * w**2 - math.pi**2 / 2
        return s * x - b * _log_cosh(root(s))

    largest = exponent(1.0).real

    def add(k, total):
        w = 1 + 1j * step * k
        return total + jnp.where(k == 0, 0.5, 1.0) * (w * jnp.exp(exponent(w) - largest)).real

    total = jax.lax.fori_loop(0, NUM_NODES, add, jnp.zeros_like(largest))
    return largest + jnp.log(2 / math.pi * delta * step * total)


class ChineseRestaurantTable(dist.Distribution):
    r"""The number of tables at which y guests sit (CRT).

    .. math:: l = \sum_{j=0}^{y-1} \mathrm{Bernoulli}\Big(\frac{r}{r + j}\Big), \qquad
        p(l) = \frac{\Gamma(r)}{\Gamma(y + r)}\, |s(y, l)|\, r^l

    with unsigned Stirling numbers of the first kind :math:`|s(y, l)|`, of which ``log_prob`` has a
    table of ``max_count`` + 1 rows and columns.

    :param count: y, whole numbers >= 0, any shape.
    :param concentration: r, positive.
    :param max_count: largest count there may be; by default that of ``count``. Needed by
        ``log_prob`` if ``count`` is traced by JAX, which raises a ValueError without it.

    Reference: Zhou and Carin 2012, arXiv:1209.3442.

    Example: three guests sit at one table, two or three with weights 2, 3 and 1.

    >>> import jax.numpy as jnp
    >>> from pyro_vi_ext.cavi.auxiliaries import ChineseRestaurantTable
    >>> (6 * jnp.exp(ChineseRestaurantTable(3, 1.0).log_prob(jnp.arange(1, 4)))).round(4).tolist()
    [2.0, 3.0, 1.0]
    """

    arg_constraints = {
        "count": constraints.nonnegative_integer,
        "concentration": constraints.positive,
    }
    pytree_aux_fields = ("max_count",)

    def __init__(self, count, concentration, *, max_count=None, validate_args=None):
        self.max_count = max_count
        if max_count is None and not_jax_tracer(count):
            self.max_count = int(np.rint(np.asarray(count)).max(initial=0))
        count, concentration = jnp.asarray(count, float), jnp.asarray(concentration, float)
        self.count, self.concentration = promote_shapes(count, concentration)
        shape = jnp.broadcast_shapes(count.shape, concentration.shape)
        super().__init__(shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        return constraints.integer_interval(0, self.count)

    def sample(self, key, sample_shape=()):
        shape, count = tuple(sample_shape) + self.batch_shape, jnp.rint(self.count)

        def seat(j, tables):
            new = self.concentration / (self.concentration + j)
            new = jax.random.bernoulli(jax.random.fold_in(key, j), new, shape)
            return tables + (new & (j < count))

        most = count.max(initial=0).astype(int)
        return jax.lax.fori_loop(0, most, seat, jnp.zeros(shape, int))

    @validate_sample
    def log_prob(self, value):
        if self.max_count is None:
            raise ValueError(
                "ChineseRestaurantTable: its counts are traced by JAX, give max_count, the largest "
                "that there may be (CRTReparam has that argument too)."
            )
        value, count = jnp.asarray(value), jnp.rint(self.count).astype(int)
        column = jnp.clip(value, 0, self.max_count).astype(int)
        ways = jnp.asarray(_log_stirling(self.max_count))[count, column]
        ways = jnp.where(count > self.max_count, jnp.nan, ways)
        return ways - gammaln(count + 1.0) + self.tilt * value - self.log_normalizer

    @property
    def mean(self):
        r = self.concentration
        return r * (digamma(r + self.count) - digamma(r))

    @property
    def variance(self):
        r = self.concentration
        return self.mean + r**2 * (polygamma(1, r + self.count) - polygamma(1, r))

    @property
    def tilt(self):
        return jnp.log(self.concentration)

    @property
    def log_normalizer(self):
        r = self.concentration
        return gammaln(r + self.count) - gammaln(r) - gammaln(self.count + 1.0)


@functools.lru_cache(maxsize=4)
def _log_stirling(num: int) -> np.ndarray:
    """Logarithms of unsigned Stirling numbers of the first kind, shape (num + 1, num + 1)."""
    table = np.full((num + 1, num + 1), -np.inf)
    table[0, 0] = 0.0
    with np.errstate(divide="ignore"):
        for n in range(num):
            table[n + 1, 1:] = np.logaddexp(table[n, :-1], np.log(n) + table[n, 1:])
    return table
