r"""The score-function gradient of the sites that have no path.

.. math::

    \nabla_\phi \mathbb{E}_{q(b)} f(b)
        = \mathbb{E}_{q(b)} \big[ (f(b) - c) \, \nabla_\phi \log q(b \mid \phi) \big].

:math:`f` is the learning signal of a site; the baseline :math:`c` must not depend on its draw
(Williams 1992; for plates, Schulman et al. 2015, arXiv:1506.05254).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.poutine.trace_struct import Trace

from pyro_vi_ext.paths import draws, is_reparameterized, score
from pyro_vi_ext.run import Run
from pyro_vi_ext.scoring import Term

__all__ = ["learning_signal", "score_bound", "score_terms"]


def score_terms(guide_trace: Trace) -> list[Term]:
    """log q(b | ancestors) of each draw without a path, unmasked; empty if nothing is learned.

    Gradients reach the ancestors' draws too.
    """
    sites = [s for s in draws(guide_trace).values() if not is_reparameterized(s)]
    terms = [score(site) for site in sites]
    return [term for term in terms if term.log_prob.requires_grad]


def learning_signal(terms: Sequence[Term], plates: dict) -> torch.Tensor:
    """The scaled log-weight that a site in given plates can influence.

    Terms are summed over the plates that the site is not in, and kept apart along those that it is
    in; particles (vectorised) are kept apart. Broadcasts against the site's log-probability.
    """
    total = 0.0
    for term in terms:
        value = term.log_prob * term.scale
        dims = [f.dim for name, f in term.plates.items() if name not in plates]
        dims = [d for d in dims if -d <= value.dim()]
        total = total + term.sign * (value.sum(dims, keepdim=True) if dims else value)
    return total


def score_bound(run: Run, particles: Sequence[Sequence[Term]], guides: Sequence[Trace]):
    """A scalar whose gradient is the score-function part of that of a linear bound.

    :param particles: the terms of each pair, as in :func:`~pyro_vi_ext.scoring.linear_bound`.
    :param guides: the guide's trace of each pair, as drawn.
    """
    total = 0.0
    for terms, guide_trace in zip(particles, guides, strict=True):
        for term in score_terms(guide_trace):
            signal = learning_signal(terms, term.plates).detach()
            total = total + (signal * term.log_prob).sum() / run.num_particles
    return total
