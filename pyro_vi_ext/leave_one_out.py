r"""The score-function gradient with a leave-one-out baseline (Kool et al. 2019; Salimans 2014).

.. math::

    g = \frac1J \sum_{j=1}^J \Big( f(b_j) - \frac{1}{J-1} \sum_{l \ne j} f(b_l) \Big)
        \nabla_\phi \log q(b_j \mid \phi).
"""

from __future__ import annotations

import torch

from pyro_vi_ext.discrete import DiscreteObjective, Site
from pyro_vi_ext.run import Run

__all__ = ["TraceRLOO_ELBO", "without_mean_of_others"]


class TraceRLOO_ELBO(DiscreteObjective):
    r"""The ELBO with the score-function gradient and the other particles' mean as a baseline.

    .. math:: g_i = \frac1J \sum_{j=1}^J \Big( f_{ij} - \frac{1}{J-1} \sum_{l \ne j} f_{il} \Big)
        \nabla \log q(b_{ij} \mid \cdot),

    where :math:`f_{ij}`, in nats, is the log-weight that draw i of particle j can influence
    (:mod:`pyro_vi_ext.discrete`). Unbiased, for any distribution; nothing to tune or to learn.

    :param num_particles: J. An integer >= 2.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: see :class:`~pyro_vi_ext.objective.Objective`.
    :raises ValueError: if ``num_particles`` is below 2.

    Reference: W. Kool, H. van Hoof and M. Welling, *Buy 4 REINFORCE Samples, Get a Baseline for
    Free!*, ICLR 2019 workshop.

    Example: at the exact posterior f is constant, and so the gradient is zero for every draw.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import TraceRLOO_ELBO
    >>> x = torch.tensor(0.8)
    >>> logit = (x - 0.5).requires_grad_()
    >>> def model():
    ...     b = pyro.sample("b", dist.Bernoulli(0.5))
    ...     pyro.sample("x", dist.Normal(b, 1.0), obs=x)
    >>> def guide():
    ...     pyro.sample("b", dist.Bernoulli(logits=logit))
    >>> loss = TraceRLOO_ELBO(num_particles=2).differentiable_loss(model, guide)
    >>> gradient, = torch.autograd.grad(loss, logit)
    >>> bool(gradient.abs() < 1e-6)
    True
    """

    def __init__(self, num_particles=2, **options):
        super().__init__(num_particles, **options)
        if num_particles < 2:
            raise ValueError(
                "A leave-one-out baseline is the mean over the other particles: num_particles "
                f"must be >= 2, got {num_particles}."
            )

    def surrogate(self, run: Run, sites: list[Site], pathwise) -> torch.Tensor | float:
        return sum(
            (without_mean_of_others(site.signal, run) * site.log_q).sum() / run.num_particles
            for site in sites
        )


def without_mean_of_others(signal: torch.Tensor, run: Run) -> torch.Tensor:
    """(J, ...) minus the mean of the other J - 1 along dimension 0."""
    num = run.num_particles
    signal = signal.expand((num,) + signal.shape[1:])
    return (signal - signal.mean(0)) * (num / (num - 1))
