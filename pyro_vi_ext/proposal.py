r"""Importance weights of draws from a guide, or from the prior, chunk by chunk.

.. math::

    \log w_{k,u} = \log p(x_u, z_{k,u}) - \log q(z_{k,u} \mid x_u), \qquad z_{k,u} \sim q.

With mixing variables q is the :math:`h_K` of 1805.11183. Its extra draws are shared by the
particles of a chunk, whose weights then depend on each other: the chunks are kept small enough to
be many, and standard errors come from the differences between them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyro.poutine as poutine
import torch
from pyro.distributions import ImproperUniform

from pyro_vi_ext.code_sites import VectorQuantized, code_site
from pyro_vi_ext.not_finite import not_finite_sites
from pyro_vi_ext.objective import positive_int
from pyro_vi_ext.pareto import WeightSummary
from pyro_vi_ext.roles import is_delta
from pyro_vi_ext.run import Run, Structure
from pyro_vi_ext.scoring import Term, check_finite, log_weights, unit_plates, unit_scale
from pyro_vi_ext.semi_implicit import semi_implicit_terms
from pyro_vi_ext.tracing import SharedSubsample, sample_sites

__all__ = ["GroupedSummary", "Proposal", "WeightChunk", "blame", "by_plate"]

_MIN_GROUPS = 20  # chunks, if their draws depend on each other


@dataclass
class WeightChunk:
    r"""Weights of some draws.

    :ivar log_w: shape (chunk, \*units), in nats, unscaled, without gradient.
    :ivar plates: the plates of the units, name -> frame.
    :ivar scale: of the units.
    """

    log_w: torch.Tensor
    plates: dict
    scale: float | torch.Tensor


class Proposal:
    """A model and what proposes its latents, drawn ``num_particles`` times in chunks.

    :param guide: any guide; of one with mixing variables the density is h_K. ``None``: the prior.
    :param chunk_size: the largest number of particles at once.
    :ivar sizes: number of particles of each chunk, as even as can be.
    :ivar shares_noise: whether the particles of a chunk depend on each other.
    """

    def __init__(
        self,
        model,
        guide,
        args,
        kwargs,
        *,
        num_particles: int,
        chunk_size: int,
        num_mixing_particles: int,
        max_plate_nesting: float,
        vectorize_particles: bool,
    ):
        chunk_size = positive_int("chunk_size", chunk_size)
        self.num_mixing_particles = positive_int("num_mixing_particles", num_mixing_particles, 0)
        self.vectorize_particles = vectorize_particles
        if guide is None:
            guide = poutine.block(model, hide_fn=_is_observed)
        self.pair = (model, guide, args, kwargs)
        self.structure = self._set_up(max_plate_nesting)
        self.shares_noise = self.num_mixing_particles > 0 and self._has_mixing()
        if self.shares_noise:
            chunk_size = min(chunk_size, max(1, num_particles // _MIN_GROUPS))
        num = -(-num_particles // chunk_size)
        self.sizes = [num_particles // num + (i < num_particles % num) for i in range(num)]
        self.subsample = SharedSubsample()

    def summary(self) -> GroupedSummary:
        """What takes in the weights of all chunks."""
        return GroupedSummary(sum(self.sizes), len(self.sizes) if self.shares_noise else None)

    def draws(self) -> Iterator[tuple[Run, list[list[Term]]]]:
        """A run for each chunk, and the terms of its pairs. All are on one subsample of each plate.

        :raises ValueError: if there is nothing to score.
        """
        for size in self.sizes:
            with torch.no_grad():
                run = self._run(size, self.subsample)
                extra = self.num_mixing_particles
                particles = semi_implicit_terms(run, extra, "lower", pathwise=False)
            if not particles[0]:
                raise ValueError(
                    "Neither model nor guide has a sample site that is not masked: there is "
                    "nothing to score. Write pyro.sample('name', ..., obs=data) in the model."
                )
            yield run, particles

    def chunks(self) -> Iterator[WeightChunk]:
        """The weights of these draws.

        :raises ValueError: if no weights per unit exist, or one is NaN or ``+inf``.
        """
        warned = False
        for run, particles in self.draws():
            _check_densities(run)
            warned = warned or _warn_codes(run)
            terms = [term for row in particles for term in row]
            plates = unit_plates(terms)
            scale = unit_scale(terms, plates, "An importance weight (unlike elbo_terms)")
            log_w = log_weights(particles, plates, run)
            if not bool(torch.isfinite(log_w).all()):
                _check_weights(log_w, terms)
            yield WeightChunk(log_w, plates, scale)

    def _run(self, num_particles: int, subsample: SharedSubsample) -> Run:
        vectorized = self.vectorize_particles
        return Run(
            self.structure,
            *self.pair,
            num_particles=num_particles,
            vectorized=vectorized,
            subsample=subsample,
        )

    def _set_up(self, max_plate_nesting: float) -> Structure:
        try:
            return Structure.of(*self.pair, max_plate_nesting)
        except (ValueError, RuntimeError) as error:  # Pyro's own do not name NaN data
            found = not_finite_sites(*self.pair)
            if not found:
                raise
            raise ValueError(f"Not finite: {'; '.join(found)}. Found by: {error}") from error

    def _has_mixing(self) -> bool:
        """Whether the guide has mixing variables; the random state is as it was before."""
        with torch.random.fork_rng(), torch.no_grad(), poutine.block():
            return bool(self._run(1, SharedSubsample()).roles.mixing)


class GroupedSummary(WeightSummary):
    r"""Summary of weights that are independent, or come in groups that are.

    :param num_draws: K.
    :param num_groups: number of groups, each one a chunk, if the draws within one depend on each
        other. The standard errors are then those of means over :math:`G` groups,
        :math:`\mathrm{se}^2 = \frac{1}{G (G - 1)} \sum_g (\bar r_g / \bar r - 1)^2`.
    """

    def __init__(self, num_draws: int, num_groups: int | None = None):
        super().__init__(num_draws)
        self._groups = None
        if num_groups is not None:
            self._groups = WeightSummary(num_groups), WeightSummary(num_groups)

    def add(self, log_w: torch.Tensor) -> None:
        """Take in a chunk, which is one group, of log weights: shape (chunk, *units), in nats."""
        super().add(log_w)
        if self._groups is not None:
            of_weights, of_logs = self._groups
            of_weights.add(log_w.logsumexp(0, keepdim=True) - math.log(len(log_w)))
            of_logs.add(log_w.mean(0, keepdim=True))

    @property
    def log_mean_se(self) -> torch.Tensor:
        """Standard error of :attr:`log_mean` (delta method)."""
        return super().log_mean_se if self._groups is None else self._groups[0].log_mean_se

    @property
    def mean_log_se(self) -> torch.Tensor:
        """Standard error of :attr:`mean_log`."""
        return super().mean_log_se if self._groups is None else self._groups[1].mean_log_se

    @property
    def pareto_k(self) -> torch.Tensor:
        """Shape of the tail; ``-inf`` if its weights are equal to rounding: they end there."""
        top = self._complete()._top
        tied = top[0] - top[-1] <= torch.finfo(top.dtype).eps ** 0.5
        return super().pareto_k.masked_fill(tied & (len(top) > 5), -math.inf)


# --- checks ------------------------------------------------------------------------------------


def _is_observed(msg: dict) -> bool:
    if msg["type"] == "sample" and not msg["is_observed"] and _is_improper(msg["fn"]):
        raise NotImplementedError(
            f"Site '{msg['name']}' has an improper prior, so nothing can be drawn from it. Pass a "
            "guide instead of guide=None, or give the site a proper prior."
        )
    return msg["type"] == "sample" and msg["is_observed"]


def _is_improper(fn) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, ImproperUniform)


def _check_densities(run: Run) -> None:
    """No point mass of the guide where the model has a density: they have no ratio."""
    parents = run.roles.parents
    for pair in run.pairs:
        guide, model = sample_sites(pair.guide), sample_sites(pair.model)
        auxiliary = {name for name, site in guide.items() if site["infer"].get("is_auxiliary")}
        for name, site in guide.items():
            if name in auxiliary or not is_delta(site) or is_delta(model[name]):
                continue
            if code_site(model[name]["fn"]) is not None:  # a probability: its ratio is one
                continue
            if not parents.get(name, frozenset()) & auxiliary:  # else: a change of variables
                raise ValueError(
                    f"Guide site '{name}' is a point mass (Delta) where the model has a density, "
                    "so it has no importance weight. Use a guide with a density there, such as "
                    "AutoNormal; elbo_terms, which takes point masses; or, for a known value, "
                    f"pyro.condition(model, {{'{name}': value}})."
                )


def _warn_codes(run: Run) -> bool:
    """Say what weights cannot see when all mass is on one code. True: once is enough."""
    sites = sample_sites(run.pairs[0].guide).items()
    names = [n for n, s in sites if isinstance(code_site(s["fn"]), VectorQuantized)]
    if names:
        warnings.warn(
            f"The guide has all its mass at site '{names[0]}' on one code, so no draw reaches "
            "another one: this is the ELBO of the codes, a lower bound, and its standard error, "
            "effective sample size and Pareto k say nothing of what the other codes add.",
            UserWarning,
            stacklevel=4,
        )
    return True


def _check_weights(log_w: torch.Tensor, terms: Sequence[Term]) -> None:
    """Weights of zero are fine, unless infinite data are what makes them so."""
    unusable = not bool((log_w < math.inf).all())
    guilty = [
        term
        for term in terms
        if not bool((term.sign * term.log_prob < math.inf).all())
        or (_is_data(term) and not _is_finite(term) and not _has_finite_value(term))
    ]
    if guilty or unusable:
        blame(guilty or terms)


def blame(terms: Sequence[Term]) -> None:
    """Raise a ValueError that names a site whose log-probability is not finite, data first."""
    guilty = [term for term in terms if not _is_finite(term)]
    check_finite(math.nan, sorted(guilty, key=lambda term: not _is_data(term)))


def _is_data(term: Term) -> bool:
    return term.site is not None and term.site["is_observed"]


def _is_finite(term: Term) -> bool:
    return bool(torch.isfinite(term.log_prob).all())


def _has_finite_value(term: Term) -> bool:
    return bool(torch.isfinite(torch.as_tensor(term.site["value"])).all())


def by_plate(tensor: torch.Tensor, plates: dict, lead: int = 0) -> torch.Tensor:
    """Keep ``lead`` dimensions on the left, and one for each plate, from left to right."""
    keep = {frame.dim for frame in plates.values()}
    drop = [d for d in range(-tensor.dim() + lead, 0) if d not in keep]
    return tensor.squeeze(drop)
