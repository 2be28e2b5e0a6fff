r"""Importance weights of draws from a guide, or from the prior, chunk by chunk.

.. math::

    \log w_{k,u} = \log p(x_u, z_{k,u}) - \log q(z_{k,u} \mid x_u), \qquad z_{k,u} \sim q.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyro.poutine as poutine
import torch

from pyro_vi_ext.run import Run, Structure
from pyro_vi_ext.scoring import Term, check_finite, log_weights, units
from pyro_vi_ext.semi_implicit import semi_implicit_terms
from pyro_vi_ext.tracing import SharedSubsample

__all__ = ["Proposal", "WeightChunk", "by_plate"]


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
    """A model and what proposes its latents, to be drawn from as often as memory allows.

    :param guide: any guide; of one with mixing variables the density is h_K (1805.11183), its
        extra draws shared within a chunk. ``None``: the prior.
    """

    def __init__(
        self,
        model,
        guide,
        args,
        kwargs,
        *,
        num_mixing_particles: int,
        max_plate_nesting: float,
        vectorize_particles: bool,
    ):
        if guide is None:
            guide = poutine.block(model, hide_fn=_is_observed)
        self.pair = (model, guide, args, kwargs)
        self.num_mixing_particles = num_mixing_particles
        self.vectorize_particles = vectorize_particles
        self.structure = Structure.of(model, guide, args, kwargs, max_plate_nesting)
        self.subsample = SharedSubsample()

    def draws(self, num_particles: int, chunk_size: int) -> Iterator[tuple[Run, list[list[Term]]]]:
        """Runs of at most ``chunk_size`` particles, and the terms of their pairs.

        All are on one subsample of each plate.
        """
        for start in range(0, num_particles, chunk_size):
            with torch.no_grad():
                run = Run(
                    self.structure,
                    *self.pair,
                    num_particles=min(chunk_size, num_particles - start),
                    vectorized=self.vectorize_particles,
                    subsample=self.subsample,
                )
                extra = self.num_mixing_particles
                particles = semi_implicit_terms(run, extra, "lower", pathwise=False)
            yield run, particles

    def chunks(self, num_particles: int, chunk_size: int) -> Iterator[WeightChunk]:
        """The weights of these draws.

        :raises ValueError: if no weights per unit exist, or one is NaN or ``+inf``.
        """
        for run, particles in self.draws(num_particles, chunk_size):
            plates, scale = units(particles, run)
            log_w = log_weights(particles, plates, run)
            if bool((log_w.isnan() | (log_w == torch.inf)).any()):
                check_finite(torch.nan, [term for row in particles for term in row])
            yield WeightChunk(log_w, plates, scale)


def _is_observed(msg: dict) -> bool:
    return msg["type"] == "sample" and msg["is_observed"]


def by_plate(tensor: torch.Tensor, plates: dict, lead: int = 0) -> torch.Tensor:
    """Keep ``lead`` dimensions on the left, and one for each plate, from left to right."""
    keep = {frame.dim for frame in plates.values()}
    drop = [d for d in range(-tensor.dim() + lead, 0) if d not in keep]
    return tensor.squeeze(drop)
