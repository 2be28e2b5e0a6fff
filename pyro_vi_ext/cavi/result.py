r"""What coordinate ascent returns: the factors, as distributions, as draws and as a density.

.. math:: q(z) = \prod_i q_i(z_i)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["CAVIResult", "MeanField"]


@dataclass(frozen=True, eq=False, repr=False)
class MeanField:
    r"""Independent factors of latent sites.

    .. math:: q(z) = \prod_i q_i(z_i)

    :ivar factors: the factors, by name: that of the site, or those of a block, ``"mu, tau"``.
    :ivar params: parameters of the factors, factor -> name -> array.
    """

    factors: dict = field(repr=False)
    params: dict

    @functools.cached_property
    def posterior(self) -> dict:
        """The marginal of each latent site, a NumPyro distribution.

        A Gaussian with joint axes is a MultivariateNormal over these axes, flattened, in its last
        dimension, behind the independent ones. In a block with a precision, Gaussian sites are
        StudentT or MultivariateStudentT likewise; if the precision is a Wishart matrix, each row.
        What sites of a block have in common, :meth:`sample` and :meth:`log_density` show.
        """
        marginals: dict = {}
        for name, factor in self.factors.items():
            marginals.update(factor.marginals(self.params[name]))
        return marginals

    def sample(self, rng_key, sample_shape: Sequence[int] = ()) -> dict:
        """Draw from q, sites of a block jointly.

        :param sample_shape: shape of independent draws.
        :returns: site -> array, shape (\\*sample_shape, \\*shape of the site in the model).
        """
        shape = tuple(int(n) for n in np.atleast_1d(np.asarray(sample_shape, int)))

        def draw(key):
            values: dict = {}
            for i, (name, factor) in enumerate(self.factors.items()):
                values.update(factor.draw(self.params[name], jax.random.fold_in(key, i)))
            return values

        keys = jax.random.split(rng_key, int(np.prod(shape, initial=1, dtype=int)))
        values = jax.jit(jax.vmap(draw))(keys)
        return {n: v.reshape(*shape, *v.shape[1:]) for n, v in values.items()}

    def log_density(self, values: dict):
        """log q of values of sites, nats; sites that are left out are integrated out.

        :param values: site -> array, as :meth:`sample` returns them; of a block all sites, or none.
        :returns: array of shape ``sample_shape``.
        :raises ValueError: for sites that are none of q, or only some of a block.
        """
        known = {site: factor for factor in self.factors.values() for site in factor.sites}
        factors = {}
        for site in values:
            if site not in known:
                raise ValueError(f"Site '{site}' is none of q: found {', '.join(known)}.")
            factor = known[site]
            missing = [other for other in factor.sites if other not in values]
            if missing:
                raise ValueError(f"Give '{missing[0]}' too: it has a joint factor with '{site}'.")
            factors[factor.name] = factor
        if not factors:
            raise ValueError("log_density needs values of one site at least.")

        def one(draw):
            return sum(f.log_density(self.params[name], draw) for name, f in factors.items())

        values = {site: jnp.asarray(value) for site, value in values.items()}
        shapes = {site: self._sample_shape(known[site], site, v) for site, v in values.items()}
        shape = next(iter(shapes.values()))
        if len(set(shapes.values())) > 1:
            raise ValueError(f"Sites have different sample shapes: {shapes}.")
        size = int(np.prod(shape, initial=1, dtype=int))
        flat = {n: v.reshape(size, *v.shape[len(shape) :]) for n, v in values.items()}
        return jax.jit(jax.vmap(one))(flat).reshape(shape)

    @staticmethod
    def _sample_shape(factor, site: str, value) -> tuple[int, ...]:
        own = factor.shape_of(site)
        if value.shape[value.ndim - len(own) :] != own:
            raise ValueError(f"Site '{site}' has shape {own}, found {value.shape}.")
        return value.shape[: value.ndim - len(own)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._shown()})"

    def _shown(self) -> str:
        return ", ".join(f"{n}: {type(d).__name__}" for n, d in self.posterior.items())


@dataclass(frozen=True, eq=False, repr=False)
class CAVIResult(MeanField):
    """What :meth:`CAVI.run` returns, of the start that ended with the best bound.

    :ivar losses: negative bound after each sweep, nats, 1-D.
    :ivar state: expected statistics, factor -> statistic -> array; ``run(state=...)`` goes on
        there.
    :ivar bounds: the bound at the end of each start, nats, 1-D.
    """

    losses: np.ndarray
    state: dict
    bounds: np.ndarray

    _unit = "sweeps"

    @property
    def bound(self) -> float:
        """The evidence lower bound at the end, nats."""
        return -float(self.losses[-1])

    def _shown(self) -> str:
        steps = f"{len(self.losses)} {self._unit}"
        return f"bound={self.bound:.6f} nats, {steps}; {super()._shown()}"
