r"""One factor for several Gaussian sites, or for Gaussian sites and their precision.

.. math::

    q(X, T) \propto |T|^{\eta_0} \exp \operatorname{tr} \big\{ T \eta_1
        + T\, h^\top X - \tfrac12 T\, X^\top \Lambda X \big\}
    \;\Rightarrow\; T \sim \mathcal W(\nu, R), \quad
    X \mid T \sim \mathcal{MN}(M, \Lambda^{-1}, T^{-1}),

with the elements of the Gaussian sites in the n rows of X, and D columns if T is a D x D Wishart
matrix (Normal-Wishart). With D = 1, T is a Gamma precision (Normal-Gamma) or the reciprocal of an
InverseGamma variance; without T, the factor is a joint Gaussian. Completing the square,

.. math::

    M = \Lambda^{-1} h, \quad \nu = 2 \eta_0 - n + D + 1, \quad
    R = -\eta_1 - \eta_1^\top - M^\top \Lambda M, \quad
    \mathbb{E}[X T] = M\, \mathbb{E}[T], \quad
    \mathbb{E}[X T X^\top] = D \Lambda^{-1} + M\, \mathbb{E}[T]\, M^\top .
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from pyro_vi_ext.cavi.derivation import NotConjugateError
from pyro_vi_ext.cavi.families import WISHART
from pyro_vi_ext.cavi.gaussian_layout import Member, Precision

__all__ = ["GaussianBlock"]


@dataclass(frozen=True)
class GaussianBlock:
    """The joint factor of Gaussian sites, and of their precision if there is one.

    :ivar name: the names of its sites, the precision last.
    :ivar batch_shape: of the axes that are independent in q.
    :ivar weight: how often its sites are counted, see :class:`~.factor.Factor`.
    :ivar plates: (plate, site, axis of the site that the plate is).
    """

    members: tuple[Member, ...]
    batch_shape: tuple[int, ...]
    precision: Precision | None = None
    weight: float = 1.0
    plates: tuple[tuple[str, str, int], ...] = ()

    num_values = 0  # it is not discrete

    @property
    def sites(self) -> tuple[str, ...]:
        last = () if self.precision is None else (self.precision.name,)
        return (*(member.name for member in self.members), *last)

    @property
    def name(self) -> str:
        return ", ".join(self.sites)

    @property
    def keys(self) -> tuple[str, ...]:
        own = () if self.precision is None else self.precision.keys
        numbers = range(len(self.members))
        return (*own, *(f"x:{i}" for i in numbers), *(f"xx:{i}:{j}" for i, j in self._pairs()))

    def members_of(self, key: str) -> list[Member]:
        """The Gaussian sites that a statistic is of: ``x:0`` of the first, ``xx:0:1`` of two."""
        return [self.members[int(i)] for i in key.split(":")[1:]]

    def shape_of(self, site: str) -> tuple[int, ...]:
        parts = (*self.members, *(() if self.precision is None else (self.precision,)))
        return next(part.shape for part in parts if part.name == site)

    def plate_axes(self, plate: str) -> dict[str, int]:
        return {site: axis for name, site, axis in self.plates if name == plate}

    def entry(self, key: str, entries: tuple, plate: str):
        first, *others = self.members_of(key) or [self.precision]
        axis = self.plate_axes(plate)[first.name]
        return entries[first.plain.index(axis) if others else axis]

    def with_rows(self, plate: str, size: int) -> GaussianBlock:
        axes = self.plate_axes(plate)
        places = {
            a.batch.index(axes[a.name]) if axes.get(a.name) in a.batch else None
            for a in self.members
        }
        inside = set(axes) == set(self.sites) and len(places) == 1 and None not in places
        if not inside:
            raise NotConjugateError(
                f"Block {self.sites}: its elements in plate '{plate}' have a joint factor, and no "
                "rows of the plate can be drawn on their own."
            )
        (place,) = places

        def cut(part):
            axis = axes[part.name]
            return replace(part, shape=(*part.shape[:axis], size, *part.shape[axis + 1 :]))

        batch = (*self.batch_shape[:place], size, *self.batch_shape[place + 1 :])
        return replace(
            self,
            members=tuple(cut(member) for member in self.members),
            batch_shape=batch,
            precision=None if self.precision is None else cut(self.precision),
            weight=self.weight * self.batch_shape[place] / size,
        )

    @property
    def dim(self) -> int:
        """D, the number of columns of X."""
        first = self.members[0]
        return 1 if first.matrix is None else first.shape[first.matrix]

    @property
    def size(self) -> int:
        """n, the number of rows of X."""
        return sum(member.size for member in self.members)

    def _pairs(self):
        numbers = range(len(self.members))
        return [(i, j) for i in numbers for j in numbers if i <= j]

    @property
    def _num_rows(self) -> int:
        """Rows of X for each element of the precision's batch."""
        others = [n for a, n in enumerate(self.batch_shape) if a not in self.precision.batch]
        return self.size * math.prod(others)

    # The factor.

    def update(self, eta: dict) -> dict:
        eta = jax.tree.map(lambda g: g / self.weight, eta)
        linear = jnp.concatenate([a.to_rows(eta[f"x:{i}"]) for i, a in enumerate(self.members)], -2)
        covariance = _inverse(-self._symmetric(eta))
        loc = covariance @ linear
        q = {"loc": loc, "covariance": covariance}
        if self.precision is not None:
            log, own = (eta[key] for key in self.precision.keys)
            own = own if self.precision.is_matrix else own[..., None, None]
            power = self.precision.sign * log + self.precision.jacobian
            quadratic = _transposed(loc) @ linear
            quadratic = self.precision.from_block(quadratic, len(self.batch_shape))
            q["concentration"] = 2 * power - self._num_rows + self.dim + 1
            q["rate_matrix"] = -(own + _transposed(own)) - quadratic
        return q

    def _symmetric(self, eta: dict):
        """Natural parameters of X X', plus their transpose, shape (\\*batch, n, n)."""
        blocks = {}
        for i, j in self._pairs():
            a, b = self.members[i], self.members[j]
            own = a.to_matrices(eta[f"xx:{i}:{j}"], b)
            blocks[i, j] = own if i < j else own + _transposed(own)
            blocks[j, i] = _transposed(blocks[i, j])
        numbers = range(len(self.members))
        rows = [jnp.concatenate([blocks[i, j] for j in numbers], -1) for i in numbers]
        return jnp.concatenate(rows, -2)

    def moments(self, q: dict) -> dict:
        if self.precision is None:
            return self._split(q["loc"], q["covariance"] + q["loc"] @ _transposed(q["loc"]))
        own = WISHART.moments(q, None)
        linear = q["loc"] @ self.precision.to_block(own["pow1"], self.batch_shape)
        second = self.dim * q["covariance"] + linear @ _transposed(q["loc"])
        log, mean = self.precision.keys
        matrix = own["pow1"] if self.precision.is_matrix else own["pow1"][..., 0, 0]
        return {
            log: self.precision.sign * own["logdet"],
            mean: matrix,
            **self._split(linear, second),
        }

    def entropy(self, q: dict):
        log_det = jnp.linalg.slogdet(q["covariance"])[1]
        rows = self.size * (1 + math.log(2 * math.pi))
        total = 0.5 * self.dim * (rows + log_det).sum()
        if self.precision is not None:
            log_t = WISHART.moments(q, None)["logdet"]
            total = total + WISHART.entropy(q, None).sum()
            total = total + (self.precision.jacobian - 0.5 * self._num_rows) * log_t.sum()
        return self.weight * total

    def is_proper(self, q: dict):
        proper = jnp.all(jnp.isfinite(q["loc"])) & _is_positive(q["covariance"])
        if self.precision is None:
            return proper
        enough = jnp.all(q["concentration"] > self.dim - 1)
        return proper & enough & _is_positive(q["rate_matrix"])

    def statistics(self, values: dict) -> dict:
        x = jnp.concatenate([a.to_rows(values[a.name]) for a in self.members], -2)
        if self.precision is None:
            return self._split(x, x @ _transposed(x))
        value = values[self.precision.name]
        t = self.precision.to_matrix(value)
        linear = x @ self.precision.to_block(t, self.batch_shape)
        log, mean = self.precision.keys
        return {
            log: jnp.linalg.slogdet(value)[1] if self.precision.is_matrix else jnp.log(value),
            mean: t if self.precision.is_matrix else t[..., 0, 0],
            **self._split(linear, linear @ _transposed(x)),
        }

    def _split(self, linear, second) -> dict:
        """Statistics of X T and X T X' by sites."""
        result, starts, start = {}, {}, 0
        for i, a in enumerate(self.members):
            starts[i] = slice(start, start + a.size)
            start += a.size
            result[f"x:{i}"] = a.from_rows(linear[..., starts[i], :])
        for i, j in self._pairs():
            block = second[..., starts[i], starts[j]]
            result[f"xx:{i}:{j}"] = self.members[i].from_matrices(block, self.members[j])
        return result

    # What a user sees.

    def draw(self, q: dict, key) -> dict:
        """One draw of all sites."""
        first, second = jax.random.split(key)
        scale = jnp.linalg.cholesky(q["covariance"])
        noise = jax.random.normal(first, q["loc"].shape, q["loc"].dtype)
        values = {}
        if self.precision is not None:
            t = dist.Wishart(q["concentration"], rate_matrix=q["rate_matrix"]).sample(second)
            values[self.precision.name] = self.precision.from_matrix(t)
            columns = jnp.linalg.cholesky(_inverse(t))
            noise = noise @ _transposed(self.precision.to_block(columns, self.batch_shape))
        x, start = q["loc"] + scale @ noise, 0
        for a in self.members:
            values[a.name] = a.from_rows(x[..., start : start + a.size, :])
            start += a.size
        return values

    def log_density(self, q: dict, values: dict):
        """log q of one draw of all sites."""
        x = jnp.concatenate([a.to_rows(values[a.name]) for a in self.members], -2) - q["loc"]
        square = _transposed(x) @ jnp.linalg.solve(q["covariance"], x)
        log_det = jnp.linalg.slogdet(q["covariance"])[1].sum()
        count = self.size * self.dim * math.prod(self.batch_shape)
        total = -0.5 * (count * math.log(2 * math.pi) + self.dim * log_det)
        if self.precision is None:
            return total - 0.5 * square.sum()
        t = self.precision.to_matrix(values[self.precision.name])
        own = dist.Wishart(q["concentration"], rate_matrix=q["rate_matrix"]).log_prob(t).sum()
        log_t = jnp.linalg.slogdet(t)[1].sum()
        wide = self.precision.to_block(t, self.batch_shape)
        jacobian = self.precision.jacobian
        return total + own - 0.5 * (wide * square).sum() + (0.5 * self._num_rows - jacobian) * log_t

    def marginals(self, q: dict) -> dict:
        """The marginal of each site, see :class:`CAVIResult`."""
        result, start = {}, 0
        for a in self.members:
            own = slice(start, start + a.size)
            start += a.size
            result[a.name] = self._marginal(a, q, own)
        if self.precision is not None:
            result[self.precision.name] = self._precision_marginal(q)
        return result

    def _marginal(self, a: Member, q: dict, own: slice):
        loc, covariance = q["loc"][..., own, :], q["covariance"][..., own, own]
        if self.precision is None:
            if not a.joint:
                scale = a.from_rows(jnp.sqrt(covariance))
                return dist.Normal(a.from_rows(loc), scale)
            return dist.MultivariateNormal(a.by_axes(loc[..., 0]), a.by_axes(covariance))
        df = q["concentration"] - self.dim + 1
        shape = q["rate_matrix"] / df[..., None, None]
        df, shape = (self.precision.to_block(t, self.batch_shape) for t in (df, shape))
        if a.matrix is not None:  # each row
            variances = jnp.diagonal(covariance, axis1=-2, axis2=-1)[..., None, None]
            scale = jnp.linalg.cholesky(variances * shape[..., None, :, :])
            df = jnp.broadcast_to(df[..., None], scale.shape[:-2])
            rows = (a.by_plain(v) for v in (df, loc, scale))
            return dist.MultivariateStudentT(*rows)
        if not a.joint:
            scale = a.from_rows(jnp.sqrt(covariance * shape))
            df = a.from_rows(jnp.broadcast_to(df[..., None, None], covariance.shape))
            return dist.StudentT(df, a.from_rows(loc), scale)
        df = jnp.broadcast_to(df, covariance.shape[:-2])
        scale = jnp.linalg.cholesky(covariance * shape)
        return dist.MultivariateStudentT(*(a.by_axes(v) for v in (df, loc[..., 0], scale)))

    def _precision_marginal(self, q: dict):
        nu, rate = q["concentration"], q["rate_matrix"]
        if self.precision.is_matrix:
            return dist.Wishart(nu, rate_matrix=rate)
        family = dist.InverseGamma if self.precision.kind == "InverseGamma" else dist.Gamma
        return family(nu / 2, rate[..., 0, 0] / 2)


def _transposed(x):
    return jnp.swapaxes(x, -1, -2)


def _inverse(x):
    return 1 / x if x.shape[-1] == 1 else jnp.linalg.inv(x)


def _is_positive(matrices):
    return jnp.all(jnp.isfinite(jnp.linalg.cholesky(matrices)))
