r"""The factor of one latent site: the interface of all factors of a mean-field posterior.

.. math:: q(z) = \prod_i q_i(z_i), \qquad q_i(z_i) \propto \exp \langle \eta_i, t_i(z_i) \rangle

Another factor, of several sites, is :class:`~pyro_vi_ext.cavi.gaussian_block.GaussianBlock`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from pyro_vi_ext.cavi.derivation import NotConjugateError
from pyro_vi_ext.cavi.families import Family, GaussianAxes

__all__ = ["Factor"]


@dataclass(frozen=True)
class Factor:
    """The factor of one latent site: its family, shape, and which axes are joint.

    :ivar kind: name of the prior's distribution class.
    :ivar num_values: of a discrete site; otherwise 0.
    :ivar weight: how often the site is counted in the log joint and in the entropy: N/B in a plate
        of size N of which B are there.
    :ivar plates: its plates, with the axis that each of them is.
    """

    name: str
    kind: str
    family: Family
    axes: GaussianAxes
    num_values: int = 0
    weight: float = 1.0
    plates: tuple[tuple[str, int], ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def keys(self) -> tuple[str, ...]:
        return self.family.keys

    def shape_of(self, site: str) -> tuple[int, ...]:
        """Shape of a value of the site."""
        return self.axes.shape

    def plate_axes(self, plate: str) -> dict[str, int]:
        """The axis of a plate, of each site that is in it."""
        own = [axis for name, axis in self.plates if name == plate]
        return dict.fromkeys(self.sites, own[0]) if own else {}

    def entry(self, key: str, entries: tuple, plate: str):
        """The entry of a statistic at the axis of a plate."""
        return entries[self.plate_axes(plate)[self.name]]

    def with_rows(self, plate: str, size: int) -> Factor:
        """The factor of so many elements of a plate, which stand for all of them.

        :raises NotConjugateError: if elements of the plate are not independent.
        """
        axis = self.plate_axes(plate)[self.name]
        if axis in self.axes.joint:
            raise NotConjugateError(
                f"Site '{self.name}': its elements in plate '{plate}' have a joint covariance, and "
                "no rows of the plate can be drawn on their own."
            )
        full = self.axes.shape[axis]
        shape = (*self.axes.shape[:axis], size, *self.axes.shape[axis + 1 :])
        weight = self.weight * full / size
        return replace(self, axes=replace(self.axes, shape=shape), weight=weight)

    def update(self, eta: dict) -> dict:
        """Parameters of the best factor, from the derivatives of F by its statistics."""
        return self.family.update(jax.tree.map(lambda g: g / self.weight, eta), self)

    def moments(self, q: dict) -> dict:
        """Expected statistics."""
        return self.family.moments(q, self)

    def entropy(self, q: dict):
        """Entropy of all elements, nats."""
        return self.weight * self.family.entropy(q, self).sum()

    def hidden_entropy(self, q: dict, hidden):
        """Entropy of the elements that are hidden, which are independent of all others.

        :param hidden: 1 where an element is hidden and 0 elsewhere, shape of the site.
        """
        if not self.axes.joint:
            each = self.family.entropy(q, self)
            own = hidden.reshape(*each.shape, -1)[..., 0]  # events are hidden as a whole
            return self.weight * jnp.where(own > 0, each, 0.0).sum()
        own = self.axes.to_rows(hidden)
        both = own[..., :, None] * own[..., None, :]
        covariance = q["covariance"] * both + jnp.eye(self.axes.size) * (1 - own)[..., None]
        only = {"loc": q["loc"] * hidden, "covariance": covariance}
        ones = 0.5 * (1 + math.log(2 * math.pi)) * (1 - own).sum()  # of the 1s on the diagonal
        return self.weight * (self.family.entropy(only, self).sum() - ones)

    def touches(self, eta: dict, hidden) -> bool:
        """Whether hidden elements have natural parameters."""
        for key, value in eta.items():
            own = hidden
            if key == "xx" and self.axes.joint:
                value, own = self.axes.to_matrices(value), self.axes.to_rows(hidden)
                own = jnp.maximum(own[..., :, None], own[..., None, :])
            own = own.reshape(*own.shape, *(1,) * (value.ndim - own.ndim))
            own = own[(slice(None),) * value.ndim + (0,) * (own.ndim - value.ndim)]  # events
            if bool(((value != 0) & (own > 0)).any()):
                return True
        return False

    def is_proper(self, q: dict):
        """Whether the parameters are those of a distribution."""
        return self.family.is_proper(q, self)

    def statistics(self, values: dict) -> dict:
        """Statistics of a value of the site."""
        return self.family.statistics(values[self.name], self)

    def draw(self, q: dict, key) -> dict:
        """One draw, by site."""
        value = self.family.distribution(q, self).sample(key)
        return {self.name: self.axes.from_rows(value) if self.axes.joint else value}

    def log_density(self, q: dict, values: dict):
        """log q of one draw."""
        value = jnp.asarray(values[self.name])
        value = self.axes.to_rows(value) if self.axes.joint else value
        return self.family.distribution(q, self).log_prob(value).sum()

    def marginals(self, q: dict) -> dict:
        """A NumPyro distribution, by site."""
        return {self.name: self.family.distribution(q, self)}
