r"""Which axis of a site is which in a joint factor of Gaussian sites and their precision.

.. math:: X \mid T \sim \mathcal{MN}(M, \Lambda^{-1}, T^{-1}), \qquad X: n \times D,

for each element of a batch. The rows of X are those of all its sites, one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp

from pyro_vi_ext.cavi.families import FAMILIES

__all__ = ["Member", "Precision"]


@dataclass(frozen=True)
class Member:
    """A Gaussian site of a block.

    :ivar batch: axes that are independent in q given the precision, as the block's batch has them.
    :ivar matrix: the axis of the columns of X, whose precision is a Wishart matrix; or ``None``.
    """

    name: str
    shape: tuple[int, ...]
    batch: tuple[int, ...] = ()
    matrix: int | None = None

    @property
    def plain(self) -> tuple[int, ...]:
        return tuple(a for a in range(len(self.shape)) if a != self.matrix)

    @property
    def joint(self) -> tuple[int, ...]:
        return tuple(a for a in self.plain if a not in self.batch)

    @property
    def size(self) -> int:
        return math.prod(self.sizes(self.joint))

    def sizes(self, axes) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in axes)

    def to_rows(self, x):
        """(\\*shape) to (\\*batch, size, D)."""
        last = () if self.matrix is None else (self.matrix,)
        x = jnp.transpose(x, (*self.batch, *self.joint, *last))
        return x.reshape(*self.sizes(self.batch), self.size, math.prod(self.sizes(last)))

    def from_rows(self, x):
        x = self.by_plain(x)
        return x[..., 0] if self.matrix is None else jnp.moveaxis(x, -1, self.matrix)

    def by_axes(self, x):
        """The batch axes of an array in the order of the site's axes."""
        order = sorted(range(len(self.batch)), key=lambda i: self.batch[i])
        return jnp.transpose(x, (*order, *range(len(order), x.ndim)))

    def by_plain(self, x):
        """(\\*batch, size, ...) to (\\*plain, ...)."""
        axes = (*self.batch, *self.joint)
        x = x.reshape(*self.sizes(axes), *x.shape[len(self.batch) + 1 :])
        order = [axes.index(a) for a in self.plain]
        return jnp.transpose(x, (*order, *range(len(axes), x.ndim)))

    def to_matrices(self, xx, other: Member):
        """(\\*plain, \\*joint of the other) to (\\*batch, size, size of the other)."""
        order = [self.plain.index(a) for a in (*self.batch, *self.joint)]
        xx = jnp.transpose(xx, (*order, *range(len(order), len(order) + len(other.joint))))
        return xx.reshape(*self.sizes(self.batch), self.size, other.size)

    def from_matrices(self, xx, other: Member):
        xx = xx.reshape(*xx.shape[:-1], *other.sizes(other.joint))
        return self.by_plain(xx)


@dataclass(frozen=True)
class Precision:
    """The precision of a block, as a batch of D x D Wishart matrices, whatever its site is.

    :ivar kind: name of the prior's distribution class.
    :ivar batch: for each batch axis of the site, which axis of the block's batch it is; ``None``
        for an axis of size 1 that is none of them.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    batch: tuple[int | None, ...] = ()

    @property
    def is_matrix(self) -> bool:
        return self.kind == "Wishart"

    @property
    def keys(self) -> tuple[str, str]:
        """Its statistics: the logarithm, and what the square is multiplied by."""
        return FAMILIES[self.kind].keys

    @property
    def sign(self) -> float:
        """Of its logarithm in that of the precision: a variance's is -1."""
        return -1.0 if self.kind == "InverseGamma" else 1.0

    @property
    def jacobian(self) -> float:
        """d log |d site / d precision| / d log precision: of a variance, -2."""
        return -2.0 if self.kind == "InverseGamma" else 0.0

    def to_matrix(self, t):
        """Values of the site as batches of D x D precisions."""
        if self.is_matrix:
            return t
        return (t**self.sign)[..., None, None]

    def from_matrix(self, t):
        return t if self.is_matrix else t[..., 0, 0] ** self.sign

    def to_block(self, t, batch_shape):
        """An array with the axes of the site's batch, under the axes of the block's batch."""
        mapped = [a for a in self.batch if a is not None]
        tail = t.shape[len(self.batch) :]
        t = t.reshape(*(batch_shape[a] for a in mapped), *tail)
        order = sorted(range(len(mapped)), key=lambda i: mapped[i])
        t = jnp.transpose(t, (*order, *range(len(mapped), t.ndim)))
        sizes = [n if a in mapped else 1 for a, n in enumerate(batch_shape)]
        return t.reshape(*sizes, *tail)

    def from_block(self, x, batch_rank: int):
        """The sum over the axes that the site's batch does not have, under its axes."""
        mapped = [a for a in self.batch if a is not None]
        x = x.sum(tuple(a for a in range(batch_rank) if a not in mapped))
        order = [sorted(mapped).index(a) for a in mapped]
        x = jnp.transpose(x, (*order, *range(len(mapped), x.ndim)))
        return x.reshape(*self.shape[: len(self.batch)], *x.shape[len(mapped) :])
