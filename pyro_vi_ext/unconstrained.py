r"""The density of a model in unconstrained coordinates, the prior apart from the likelihood.

.. math::

    z_s = T_s(u_s), \qquad
    \log p(u) = \sum_s \log p(z_s \mid z_{<s}) + \log \Big| \frac{dT_s}{du_s} \Big|, \qquad
    \log p(x \mid u) = \sum_i \log p(x_i \mid z(u)).

:math:`T_s` is ``biject_to`` of the support that latent :math:`s` has in that very run of the model,
so a support may depend on other latents. The coordinates of all latents are one tensor; the
densities are per particle and unit, one element of the plates common to all scored sites.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, biject_to, constraints

from pyro_vi_ext.roles import is_delta
from pyro_vi_ext.run import Run, Structure
from pyro_vi_ext.scoring import (
    Term,
    pair_terms,
    plates_of,
    site_log_prob,
    split_mask,
    sum_to_units,
    unit_plates,
    unit_scale,
)
from pyro_vi_ext.tracing import (
    PARTICLE_PLATE,
    OuterPlate,
    SharedSubsample,
    sample_sites,
    trace_inside,
)

__all__ = ["Point", "UnconstrainedModel"]


@dataclass
class Point:
    """Particles and their densities: u (K, *units, D); log p(u), log p(x | u) (K, *units)."""

    u: Tensor
    log_prior: Tensor
    log_lik: Tensor

    def log_density(self, beta: float) -> Tensor:
        return self.log_prior + beta * self.log_lik


@dataclass
class _Site:
    """Where a latent lies in the state."""

    single: torch.Size  # u of one particle run alone
    shape: tuple[int, ...]  # the same with all plate dimensions of the model
    order: list[int]  # axes of (K, *shape): particles, unit plates, others
    columns: slice
    dtype: torch.dtype


class UnconstrainedModel:
    """The densities of a model's latents and data, for all particles and units at once.

    The state u has shape (K, *units, D): D unconstrained coordinates per particle and unit.
    """

    def __init__(self, model, args, kwargs, max_plate_nesting, vectorized):
        self.call, self.vectorized = (model, args, kwargs), vectorized
        self.subsample = SharedSubsample()

        def prior(*args, **kwargs):
            with poutine.block(hide_fn=lambda site: site["is_observed"]):
                return model(*args, **kwargs)

        with torch.no_grad(), poutine.block():
            latents = _Unconstrained()
            trace = trace_inside(*self.call, latents, self.subsample)
            _check_roles(trace, latents)
            structure = Structure.of(model, prior, args, kwargs, max_plate_nesting)
            run = Run(
                *(structure, model, prior, args, kwargs),
                num_particles=2,
                vectorized=vectorized,
                subsample=self.subsample,
            )
            for pair in run.pairs:
                pair_terms(run, pair)  # the checks of every objective
            terms = [term for side in _terms(trace, latents) for term in side]
        self.rank = structure.max_plate_nesting
        self.plates = unit_plates(terms)
        self.scale = unit_scale(terms, self.plates, "Annealed importance sampling")
        self.scored = sample_sites(trace).keys()
        self._lay_out(trace, latents)
        if is_validation_enabled():
            self._check_density()

    # State.

    def _lay_out(self, trace, latents: _Unconstrained) -> None:
        plates = {frame.dim: frame.size for frame in self.plates.values()}
        self.units = tuple(plates.get(dim, 1) for dim in range(-self.rank, 0))
        self.sites: dict[str, _Site] = {}
        unit_axes = [1 + self.rank + dim for dim in sorted(plates)]
        start = 0
        for name, u in latents.values.items():
            shape = (1,) * (self.rank - len(trace.nodes[name]["fn"].batch_shape)) + u.shape
            others = [axis for axis in range(1, len(shape) + 1) if axis not in unit_axes]
            stop = start + u.numel() // math.prod(self.units)
            order = [0, *unit_axes, *others]
            self.sites[name] = _Site(u.shape, shape, order, slice(start, stop), u.dtype)
            start = stop

    def _pack(self, rows: list[dict[str, Tensor]]) -> Tensor:
        parts = []
        for name, site in self.sites.items():
            values = torch.cat([row[name].reshape(-1, *site.shape) for row in rows])
            parts.append(values.permute(site.order).reshape(len(values), *self.units, -1))
        return torch.cat(parts, -1)

    def _unpack(self, u: Tensor) -> list[dict[str, Tensor]]:
        """The values of each run of the model: of all particles, or of one after another."""
        values = {}
        for name, site in self.sites.items():
            shape = [len(u), *(site.shape[axis - 1] for axis in site.order[1:])]
            inverse = sorted(range(len(shape)), key=site.order.__getitem__)
            values[name] = u[..., site.columns].reshape(shape).permute(inverse).to(site.dtype)
        if self.vectorized:
            return [values]
        single = {name: site.single for name, site in self.sites.items()}
        return [{n: v[k].reshape(single[n]) for n, v in values.items()} for k in range(len(u))]

    def draw(self, num_particles: int) -> Point:
        """Particles from the prior.

        :raises ValueError: if their log-likelihood is NaN or +inf, naming the site.
        """
        with torch.no_grad():
            runs = [_Unconstrained() for _ in range(1 if self.vectorized else num_particles)]
            for latents in runs:
                self._terms(latents, num_particles)
            u = self._pack([latents.values for latents in runs])
            point = self(u)
            if not bool((point.log_lik < math.inf).all()):
                self._blame(u)
        return point

    # Densities.

    def __call__(self, u: Tensor) -> Point:
        """log p(u) and log p(x | u), unscaled and masked, per particle and unit."""
        try:
            rows = [self._terms(_Unconstrained(v), len(u)) for v in self._unpack(u)]
        except torch.linalg.LinAlgError as e:
            return self._without_singular(u, e)
        sides = [torch.cat([self._per_unit(row[side]) for row in rows]) for side in (0, 1)]
        return Point(u, *(side.expand(len(u), *self.units) for side in sides))

    def pull(self, u: Tensor, beta: float) -> tuple[Point, Tensor]:
        """The densities, and d log f / du: zero where not finite, as any force is a valid one."""
        with torch.enable_grad():
            point = self(u.detach().requires_grad_())
            (force,) = torch.autograd.grad(point.log_density(beta).sum(), point.u)
        point = Point(u, point.log_prior.detach(), point.log_lik.detach())
        return point, torch.nan_to_num(force, nan=0.0, posinf=0.0, neginf=0.0)

    def _terms(self, latents: _Unconstrained, num_particles: int) -> tuple[list, list]:
        plate = OuterPlate(PARTICLE_PLATE, num_particles, -self.rank - 1)
        outer = [plate] if self.vectorized else []
        with poutine.block(), pyro.validation_enabled(False):  # a proposal may be anywhere
            trace = trace_inside(*self.call, latents, *outer, self.subsample)
            other = sample_sites(trace).keys() ^ self.scored
            if other:
                raise _changing(min(other))
            return _terms(trace, latents)

    def _per_unit(self, terms: list[Term]) -> Tensor:
        total = 0.0
        for term in terms:
            shape = term.log_prob.shape
            log_prob = term.log_prob.reshape((1,) * (self.rank + 1 - len(shape)) + shape)
            total = total + sum_to_units(log_prob, self.plates, keep=1)
        return total

    def _without_singular(self, u: Tensor, error: Exception) -> Point:
        """NaN where a matrix of the model cannot be factorised, particle by particle."""
        if len(u) > 1:
            halves = [self(half) for half in u.chunk(2)]
            sides = zip(*((half.log_prior, half.log_lik) for half in halves), strict=True)
            return Point(u, *map(torch.cat, sides))
        if math.prod(self.units) > 1:
            raise ValueError(
                f"The model fails at a proposal of the leapfrog ({error}), and one unit of many "
                "cannot be rejected alone. Add a larger multiple of the identity to the matrix, or "
                "use torch.linalg.cholesky_ex."
            ) from error
        unknown = math.nan * u.sum(-1)
        return Point(u, unknown, unknown)

    # Checks.

    def _blame(self, u: Tensor) -> None:
        for values in self._unpack(u):
            for term in self._terms(_Unconstrained(values), len(u))[1]:
                if not bool((term.log_prob < math.inf).all()):
                    raise ValueError(
                        f"The log-probability of site '{term.name}' is NaN or +inf at a draw from "
                        "the prior. Check the data for NaN, narrow the prior, or keep the site's "
                        "parameters where its distribution exists (clamp them)."
                    )

    @torch.no_grad()
    def _check_density(self) -> None:
        """It is a function of the latents alone, and of each unit of each particle by itself."""
        point, other = self.draw(16), self.draw(16)
        if not _same(point, self(point.u), point.u.new_ones((), dtype=torch.bool)):
            raise ValueError(
                "Two runs of the model at the same latents differ in their log-density, so there "
                "is no one posterior. Take away what is random outside pyro.sample: put modules "
                "with dropout into .eval() mode."
            )
        kept = torch.rand_like(point.log_lik) < 0.5
        mixed = self(torch.where(kept.unsqueeze(-1), point.u, other.u))
        if not _same(point, mixed, kept):
            names = ", ".join(f"'{name}'" for name in self.plates) or "none"
            raise ValueError(
                "The log-density of one unit depends on latents of another unit or particle (unit "
                f"plates: {names}): the code mixes elements of a plate. Sample latents that the "
                "elements share outside the plate, index with [..., i], reduce dimensions from the "
                "right, or pass vectorize_particles=False."
            )


def _same(a: Point, b: Point, where: Tensor) -> bool:
    """Whether two points have the same densities there, up to rounding."""
    rounding = torch.finfo(a.u.dtype).eps ** 0.5
    close = [
        torch.isclose(x, y, rtol=rounding, atol=rounding, equal_nan=True) | ~where
        for x, y in ((a.log_prior, b.log_prior), (a.log_lik, b.log_lik))
    ]
    return all(bool(c.all()) for c in close)


# --- sites ---------------------------------------------------------------------------------------


def _check_roles(trace, latents: _Unconstrained) -> None:
    if not latents.values:
        raise ValueError(
            "The model has no latent site: its log-likelihood is its log-evidence, and there is "
            "nothing to anneal."
        )
    if sample_sites(trace).keys() <= latents.values.keys():
        raise ValueError(
            f"The model has no observed site (its latents: {', '.join(latents.values)}), so its "
            "evidence is 1. Pass the data, obs=..., or wrap the model in pyro.condition."
        )


def _terms(trace, latents: _Unconstrained) -> tuple[list[Term], list[Term]]:
    """The prior in unconstrained coordinates, and the likelihood. A latent ignores its mask."""
    prior, likelihood = [], []
    for name, site in sample_sites(trace).items():
        fn, mask = split_mask(site)
        log_prob = site_log_prob(site, fn)
        if name in latents.jacobians:
            log_prob = log_prob + latents.jacobians[name]
        else:
            log_prob = scale_and_mask(log_prob, 1.0, mask)
        side = prior if name in latents.jacobians else likelihood
        side.append(Term(name, log_prob, site["scale"], plates_of(site), +1, site))
    return prior, likelihood


class _Unconstrained(Messenger):
    """Gives each latent the value T(u), and notes log |dT/du|.

    :param values: u of each latent; None draws them from the prior.
    """

    def __init__(self, values: dict[str, Tensor] | None = None):
        super().__init__()
        self.drawing, self.values = values is None, values or {}
        self.jacobians: dict[str, Tensor] = {}

    def _pyro_sample(self, msg):
        if msg["is_observed"] or site_is_subsample(msg) or is_delta(msg):
            return
        name, fn = msg["name"], msg["fn"]
        if self.drawing:
            self.values[name] = _draw_unconstrained(name, fn)
        if name not in self.values:
            raise _changing(name)
        u, transform = self.values[name], _transform(fn)
        value = transform(u)
        if value.shape != fn.shape():
            raise _changing(name)
        jacobian = transform.log_abs_det_jacobian(u, value)
        self.jacobians[name] = sum_rightmost(jacobian, jacobian.dim() - len(fn.batch_shape))
        msg["value"], msg["done"] = value, True


def _transform(fn):
    """From unconstrained coordinates to the support; an angle's is a circle, not the real line."""
    base = fn
    while isinstance(base, Independent | MaskedDistribution):
        base = base.base_dist
    if isinstance(base, dist.VonMises | dist.SineBivariateVonMises | dist.SineSkewed):
        return biject_to(constraints.interval(-math.pi, math.pi))
    return biject_to(fn.support)


def _draw_unconstrained(name: str, fn) -> Tensor:
    try:
        if fn.support.is_discrete:
            raise NotImplementedError("it is discrete")
        u = _transform(fn).inv(fn())
    except NotImplementedError as e:
        raise NotImplementedError(
            f"Latent site '{name}' ({type(fn).__name__}) cannot be annealed: {e}. Annealing moves "
            "continuous latents, from draws of a proper prior. Sum a discrete latent out of the "
            "model (a mixture distribution), or use importance sampling with a guide."
        ) from e
    bound = -math.log(torch.finfo(u.dtype).tiny)  # a draw rounded to an end of its support
    return torch.nan_to_num(u, nan=math.nan, posinf=bound, neginf=-bound)


def _changing(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"Site '{name}' is not in every run of the model with the same shape, so there is no one "
        "space of latents. Sample the same sites in every call."
    )
