r"""The exact gradient of a multi-sample bound in the memory of a few particles.

The gradient of :math:`\log \frac1K \sum_k w_k` is a sum over particles once the weights are known.
A first pass draws all particles, chunk by chunk and without gradients, and keeps their
log-weights; a second draws each chunk again, from the random state it was first drawn from, and
adds its part of the gradient.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pyro.infer.util import torch_backward
from torch.utils.checkpoint import checkpoint

from pyro_vi_ext.checkpoint import get_rng_state, set_rng_state
from pyro_vi_ext.objective import Estimate
from pyro_vi_ext.scoring import Term, log_weights, units
from pyro_vi_ext.tracing import SharedSubsample

__all__ = ["ChunkedEstimate"]


class ChunkedEstimate(Estimate):
    """The estimate of a multi-sample objective, of which only one chunk of particles is in memory.

    :param objective: has ``num_particles``, ``chunk_size``, ``score(run)`` and ``surrogate(...)``,
        see :class:`~pyro_vi_ext.ImportanceWeightedELBO`.
    """

    def __init__(self, objective, model, guide, args, kwargs):
        self.objective, self._pair = objective, (model, guide, args, kwargs)
        self._chunks, rows = [], []
        subsample = SharedSubsample()
        num, size = objective.num_particles, objective.chunk_size
        with torch.no_grad():
            for start in range(0, num, size):
                known = dict(subsample.indices)
                chunk = Chunk(start, min(start + size, num), get_rng_state(), known)
                self._chunks.append(chunk)
                run, _, particles = self._score(chunk, subsample)
                self._plates, self._scale = units(particles, run)
                rows.append(log_weights(particles, self._plates, run))
            self._weights = objective.weights(torch.cat(rows))
            self.loss = -(self._weights.bound * self._scale).sum()

    def _score(self, chunk: Chunk, subsample: SharedSubsample):
        objective = self.objective
        run = objective._run(
            *self._pair,
            num_particles=chunk.stop - chunk.start,
            vectorized=objective.vectorize_particles,
            subsample=subsample,
        )
        return run, *objective.score(run)

    def _surrogate(self, chunk: Chunk) -> torch.Tensor:
        """The part of the surrogate loss of some particles, drawn as before."""
        with chunk.replayed() as subsample:
            run, scored, particles = self._score(chunk, subsample)
            log_w = log_weights(particles, self._plates, run)
            weights = self._weights.slice(chunk.start, chunk.stop)
            part = self.objective.surrogate(run, scored, log_w, weights, self._plates, self._scale)
        return -part

    def backward(self, retain_graph: bool = False) -> None:
        for chunk in self._chunks:
            torch_backward(self._surrogate(chunk), retain_graph=retain_graph)

    def differentiable(self) -> torch.Tensor:
        total = 0.0
        for chunk in self._chunks:
            # Its own way of keeping random states knows torch's only.
            options = {"use_reentrant": False, "preserve_rng_state": False}
            total = total + checkpoint(self._surrogate, chunk, **options)
        return self.loss + (total - total.detach())

    @property
    def terms(self) -> list[Term]:
        """The terms of the first chunk that has a log-weight which is not finite, else of one."""
        for chunk in self._chunks:
            with torch.no_grad(), chunk.replayed() as subsample:
                run, _, particles = self._score(chunk, subsample)
                log_w = log_weights(particles, self._plates, run)
            if not bool(torch.isfinite(log_w).all()):
                break
        return [term for row in particles for term in row]


@dataclass(frozen=True)
class Chunk:
    """Particles ``start`` to ``stop``, and from where they were drawn.

    :ivar state: the random state.
    :ivar known: indices of the plates that earlier chunks had subsampled. What this chunk
        subsampled it must draw again, or what follows would see other random numbers.
    """

    start: int
    stop: int
    state: dict
    known: dict

    @contextmanager
    def replayed(self):
        """Draw the same again, inside the subsample given; the random state is then as before."""
        before = get_rng_state()
        set_rng_state(self.state)
        subsample = SharedSubsample()
        subsample.indices.update(self.known)
        try:
            yield subsample
        finally:
            set_rng_state(before)
