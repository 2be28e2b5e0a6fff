r"""Augmentations: logistic and negative-binomial likelihoods made conditionally conjugate.

.. math::
    \frac{e^{a \psi}}{(1 + e^\psi)^b} &= 2^{-b} e^{(a - b/2) \psi}\,
        \mathbb{E}_{\omega \sim \mathrm{PG}(b, 0)}\, e^{-\omega \psi^2 / 2}
        \quad \text{(Polson, Scott and Windle 2013, arXiv:1205.0310)}, \\
    \frac{\Gamma(y + r)}{\Gamma(r)\, y!} &= \mathbb{E}_{l \sim \mathrm{CRT}(y, 1)}\, r^l
        \quad \text{(Zhou and Carin 2012, arXiv:1209.3442)}.

Both are one idea: the likelihood is the mean of an exponential tilt of a base density h(z; b) of
known size b, so an auxiliary latent z makes it linear in z. Its best factor is a tilt, too:

.. math::
    q(z) = h(z; b)\, e^{\eta z - A(\eta)}, \qquad
    \mathbb{E}_q \log h + \mathbb{H}[q] = A(\eta) - \eta\, \mathbb{E}_q z .

The sum on the left has a closed form, its terms have none. So it is the moment of the statistic
``base`` (log h), and the factor's ``entropy`` is 0. A third statistic, ``size``, is always 0: its
natural parameter is b, by which the size gets to the factor with the data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import gammaln
from numpyro import handlers
from numpyro.infer.reparam import Reparam
from numpyro.util import not_jax_tracer

from pyro_vi_ext.cavi.algebra import concrete
from pyro_vi_ext.cavi.auxiliaries import ChineseRestaurantTable, PolyaGamma
from pyro_vi_ext.cavi.densities import rule, together
from pyro_vi_ext.cavi.derivation import unwrapped
from pyro_vi_ext.cavi.families import FAMILIES, Family
from pyro_vi_ext.cavi.symbolic import Expr, NotRepresentable

__all__ = ["CRTReparam", "PolyaGammaReparam"]


# --- model transformations -----------------------------------------------------------------------


class _Augmentation(Reparam):
    """An observed site, as an auxiliary latent site and a factor that is linear in it."""

    suffix: str
    kinds: tuple[type, ...]
    accepted: str

    def __call__(self, name, fn, obs):
        base, masks, claimed = unwrapped(fn)
        if not isinstance(base, self.kinds):
            raise ValueError(
                f"Site '{name}': {type(self).__name__} is for {self.accepted}, and it is a "
                f"{type(base).__name__}."
            )
        if obs is None:
            raise ValueError(
                f"Site '{name}' is not observed: {type(self).__name__} is for likelihoods. Give "
                "the site its data, or run the model without the augmentation to predict."
            )
        shape = jnp.broadcast_shapes(fn.shape(), np.shape(obs))
        mask = _mask(masks)
        _check_observed(name, base, obs, mask)
        y = jnp.where(mask, jnp.asarray(obs, float), 0.0)
        prior, log_likelihood = self.augmented(base, obs, jnp.broadcast_to(y, shape))
        auxiliary = _sample_unmasked(name, self.suffix, prior.expand(shape).to_event(claimed))
        new = dist.Unit(jnp.broadcast_to(log_likelihood(auxiliary), shape))
        new = (new.mask(jnp.broadcast_to(mask, shape)) if masks else new).to_event(claimed)
        return new, new.sample(None)

    def augmented(self, fn, obs, y):
        """The prior of the auxiliary, and its function that is the log-likelihood given it.

        :param obs: the data as observed; ``y`` has zeros where they are masked.
        """
        raise NotImplementedError


class PolyaGammaReparam(_Augmentation):
    r"""A likelihood with logits :math:`\psi`, Gaussian in :math:`\psi` given a latent
    :math:`\omega`.

    .. math:: p(y \mid \psi) = C_y\, \frac{e^{y \psi}}{(1 + e^\psi)^b}, \qquad
        \omega \sim \mathrm{PG}(b, 0), \qquad
        \log p(y \mid \omega, \psi) = \log C_y - b \log 2 + (y - \tfrac b2) \psi
            - \tfrac12 \omega \psi^2

    with b = 1 of Bernoulli, n of Binomial, y + r of NegativeBinomial. The latent site is
    ``f"{name}_omega"``, one element for each of ``name``; integrated out, it leaves the model that
    was. Its mean-field factor is PG(b, c) with :math:`c^2 = \mathbb{E} \psi^2`, and the bound is
    that of Jaakkola and Jordan (2000). Logits must be polynomials of Gaussian latents, as of
    regressions; under ``handlers.scale`` the factor is as of so many copies of the observation.

    For ``numpyro.handlers.reparam``; the distribution must be made with ``logits=``, a total count
    must be known, the site observed. Missing observations may be masked by the distribution's own
    ``.mask(...)``, and be NaN there.

    :raises ValueError: for other sites, naming them.

    Reference: N. Polson, J. Scott and J. Windle, *Bayesian inference for logistic models using
    Polya-Gamma latent variables*, JASA 2013, arXiv:1205.0310.

    Example: three successes in four trials.

    >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
    >>> from numpyro.handlers import reparam
    >>> from pyro_vi_ext.cavi import CAVI
    >>> from pyro_vi_ext.cavi.augmentations import PolyaGammaReparam
    >>> def model(y):
    ...     psi = numpyro.sample("psi", dist.Normal(0.0, 1.0))
    ...     with numpyro.plate("data", len(y)):
    ...         numpyro.sample("y", dist.Bernoulli(logits=psi), obs=y)
    >>> augmented = reparam(model, config={"y": PolyaGammaReparam()})
    >>> q = CAVI(augmented, jnp.array([1, 1, 0, 1])).run().posterior
    >>> round(float(q["psi"].mean), 3), round(float(q["y_omega"].mean[0]), 3)
    (0.516, 0.235)
    """

    suffix = "omega"
    kinds = (dist.BernoulliLogits, dist.BinomialLogits, dist.NegativeBinomialLogits)
    accepted = "Bernoulli, Binomial and NegativeBinomialLogits made with logits=..."

    def augmented(self, fn, obs, y):
        psi, constant, b = fn.logits, 0.0, 1.0
        if isinstance(fn, dist.BinomialLogits):
            b = n = fn.total_count
            constant = gammaln(n + 1.0) - gammaln(y + 1.0) - gammaln(n - y + 1.0)
        elif isinstance(fn, dist.NegativeBinomialLogits):
            b, r = y + fn.total_count, fn.total_count
            constant = gammaln(b) - gammaln(r) - gammaln(y + 1.0)

        def log_likelihood(omega):
            return constant - b * math.log(2) + (y - b / 2) * psi - omega * psi**2 / 2

        return PolyaGamma(jnp.asarray(b, float)), log_likelihood


class CRTReparam(_Augmentation):
    r"""A negative-binomial likelihood, linear in log r given a latent number of tables.

    .. math:: p(y \mid r, p) = \frac{\Gamma(y + r)}{\Gamma(r)\, y!}\, p^y (1 - p)^r, \qquad
        l \sim \mathrm{CRT}(y, 1), \qquad
        \log p(y \mid l, r, p) = l \log r + y \log p + r \log(1 - p) .

    The latent site is ``f"{name}_tables"``, one element for each of ``name``; summed over, it
    leaves the model that was. Its mean-field factor is CRT(y, :math:`\exp \mathbb{E} \log r`). With
    Gamma r and Beta p all updates are closed. Given the tables r and *latent* logits do not
    separate, nor do r and a Polya-Gamma variable of size y + r.

    For ``numpyro.handlers.reparam``; missing observations may be masked by the distribution's own
    ``.mask(...)``, and be NaN there.

    :param max_count: largest count there may be; needed only where the counts are traced by JAX.
    :raises ValueError: for a site that is no observed NegativeBinomial, naming it.

    Reference: M. Zhou and L. Carin, *Negative binomial process count and mixture modeling*, 2012,
    arXiv:1209.3442.

    Example:

    >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
    >>> from numpyro.handlers import reparam
    >>> from pyro_vi_ext.cavi import CAVI
    >>> from pyro_vi_ext.cavi.augmentations import CRTReparam
    >>> def model(y):
    ...     r = numpyro.sample("r", dist.Gamma(1.0, 1.0))
    ...     p = numpyro.sample("p", dist.Beta(1.0, 1.0))
    ...     with numpyro.plate("data", len(y)):
    ...         numpyro.sample("y", dist.NegativeBinomialProbs(r, p), obs=y)
    >>> cavi = CAVI(reparam(model, config={"y": CRTReparam()}), jnp.array([0, 2, 1, 4]))
    >>> q = cavi.run().posterior
    >>> round(float(q["r"].mean), 2), round(float(q["p"].mean), 2)
    (1.23, 0.57)
    """

    suffix = "tables"
    kinds = (dist.NegativeBinomialProbs, dist.NegativeBinomialLogits)
    accepted = "NegativeBinomialProbs and NegativeBinomialLogits"

    def __init__(self, max_count: int | None = None):
        self.max_count = max_count

    def augmented(self, fn, obs, y):
        r = fn.total_count
        if isinstance(fn, dist.NegativeBinomialProbs):
            log_p, log_q = jnp.log(fn.probs), jnp.log1p(-fn.probs)
        else:
            log_q = -jax.nn.softplus(fn.logits)
            log_p = fn.logits + log_q
        most = self.max_count
        if most is None and not_jax_tracer(obs):
            most = int(np.nanmax(np.asarray(obs, float), initial=0.0))

        def log_likelihood(tables):
            return tables * jnp.log(r) + y * log_p + r * log_q

        return ChineseRestaurantTable(y, 1.0, max_count=most), log_likelihood


def _mask(masks):
    """Where all masks are true, aligned with the elements of the site."""
    with jax.ensure_compile_time_eval():  # what is known is known now, also where JAX traces
        masks = [jnp.reshape(m, jnp.shape(m) + (1,) * right) for m, right in masks]
        return functools.reduce(jnp.logical_and, masks, jnp.ones((), bool))


def _check_observed(name: str, fn, obs, mask) -> None:
    """As NumPyro would check the values, which it does not see any more."""
    with jax.ensure_compile_time_eval():
        valid = fn.support(obs) | ~mask
    if not_jax_tracer(valid) and not np.asarray(valid).all():
        raise ValueError(
            f"Site '{name}' has observations outside of the support of its distribution, "
            f"{type(fn).__name__}, or NaN. Mask what is missing by the distribution's .mask(...)."
        )


def _sample_unmasked(name: str, suffix: str, fn):
    """The auxiliary, which keeps its prior at masked observations."""
    with handlers.trace() as trace:
        value = numpyro.sample(f"{name}_{suffix}", fn)
    if unwrapped(trace[f"{name}_{suffix}"]["fn"])[1]:
        raise ValueError(
            f"Site '{name}' is masked by handlers.mask, which masks its auxiliary latent "
            f"'{name}_{suffix}' too. Mask its distribution, as in "
            f'numpyro.sample("{name}", fn.mask(mask), obs=...), or leave these elements out.'
        )
    return value


# --- densities and factors of the auxiliaries ----------------------------------------------------


@dataclass(frozen=True)
class TiltedFamily(Family):
    """Factors h(z; size) exp(eta z - A(eta)).

    :ivar log_base: (a value, natural parameters) -> log h.
    """

    log_base: Callable


def _register(cls, parameter: Callable) -> None:
    """The density and the factor of a distribution that has a ``tilt`` and a ``log_normalizer``.

    :param cls: the distribution; its first parameter is the size.
    :param parameter: eta -> the second parameter.
    """
    size, tilt = cls.arg_constraints

    @rule(cls.__name__, names=(size, tilt))
    def log_density(algebra, x, p):
        for name, constraint in cls.arg_constraints.items():
            if not p[name].is_known():
                raise NotRepresentable(f"its {name}, which depends on latents")
            if not np.all(constraint(concrete(p[name]))):
                raise NotRepresentable(f"its {name}, which is not {constraint}")
        x, b, c = together(x, p[size], p[tilt])
        fn = cls(concrete(b), concrete(c))
        tilted = Expr.of(fn.tilt) * x - Expr.of(fn.log_normalizer)
        return _statistic(x, "base") + b * _statistic(x, "size") + tilted

    def parameters(eta, factor=None):
        return {size: eta["size"] / eta["base"], tilt: parameter(eta["pow1"] / eta["base"])}

    def distribution(q, factor=None):
        return cls(q[size], q[tilt])

    def moments(q, factor):
        fn = distribution(q)
        base = fn.log_normalizer - fn.tilt * fn.mean
        return {"pow1": fn.mean, "base": base, "size": jnp.zeros_like(base)}

    def is_proper(q, factor):
        valid = [
            constraint(q[n]) & jnp.isfinite(q[n]) for n, constraint in cls.arg_constraints.items()
        ]
        return jnp.all(jnp.array([jnp.all(x) for x in valid]))

    def statistics(x, factor):
        x = jnp.asarray(x, float)
        return {"pow1": x, "base": jnp.zeros_like(x), "size": jnp.zeros_like(x)}

    def log_base(x, eta):
        untilted = {**eta, "pow1": jnp.zeros_like(eta["pow1"])}
        return distribution(parameters(untilted)).log_prob(x)

    FAMILIES[cls.__name__] = TiltedFamily(
        keys=("pow1", "base", "size"),
        update=parameters,
        moments=moments,
        entropy=lambda q, factor: jnp.zeros(()),  # it is in the moment of the base
        distribution=distribution,
        is_proper=is_proper,
        statistics=statistics,
        log_base=log_base,
    )


def _statistic(x: Expr, name: str) -> Expr:
    """A statistic of the latent whose value this is."""
    (term,) = x.terms
    (atom,) = term.atoms
    return Expr(x.labels, (replace(term, atoms=(replace(atom, stat=(name,)),)),))


def _tilt_of(eta):
    """c of eta = -c^2 / 2, which may be positive by rounding."""
    square = -2 * eta
    rounding = jnp.sqrt(jnp.finfo(square.dtype).eps)
    return jnp.sqrt(jnp.where(square > -rounding, jnp.maximum(square, 0.0), jnp.nan))


_register(PolyaGamma, _tilt_of)
_register(ChineseRestaurantTable, jnp.exp)
