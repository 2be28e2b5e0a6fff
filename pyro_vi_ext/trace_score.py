r"""The plain score-function gradient (Williams 1992; Ranganath et al. 2014, arXiv:1401.0118).

.. math::

    \nabla_\phi L = \mathbb{E}_{q(b)} \big[ (\log p(x, b) - \log q(b)) \,
        \nabla_\phi \log q(b \mid \phi) \big],

without the term :math:`-\mathbb{E} \nabla_\phi \log q(b \mid \phi) = 0`.
"""

from __future__ import annotations

import torch

from pyro_vi_ext.discrete import DiscreteObjective, Site
from pyro_vi_ext.paths import Detached
from pyro_vi_ext.run import Run

__all__ = ["TraceScore_ELBO"]


class TraceScore_ELBO(DiscreteObjective):
    r"""The ELBO with the plain score-function gradient (REINFORCE), without a baseline.

    .. math:: g_i = \frac1J \sum_{j=1}^J f_i(b_j) \nabla \log q(b_{ij} \mid \cdot),

    where :math:`f_i`, in nats, is the log-weight that draw i can influence
    (:mod:`pyro_vi_ext.discrete`). Unbiased, for any distribution, of high variance: the
    reference that the other estimators are compared to.

    :param num_particles: J. An integer >= 1.
    :param score_sites: ``"discrete"`` for the draws without ``rsample``; ``"all"`` for
        reparameterised draws too, which then have no path.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: see :class:`~pyro_vi_ext.objective.Objective`.
    :raises ValueError: for another ``score_sites``.

    References: R. Williams, *Simple Statistical Gradient-Following Algorithms for Connectionist
    Reinforcement Learning*, Machine Learning 8, 1992. R. Ranganath, S. Gerrish and D. Blei,
    *Black Box Variational Inference*, AISTATS 2014, arXiv:1401.0118.

    Example: the gradient for a logit, and its exact value.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import TraceScore_ELBO
    >>> logit = torch.tensor(0.3, requires_grad=True)
    >>> def model():
    ...     b = pyro.sample("b", dist.Bernoulli(0.5))
    ...     pyro.sample("x", dist.Normal(b, 1.0), obs=torch.tensor(0.8))
    >>> def guide():
    ...     pyro.sample("b", dist.Bernoulli(logits=logit))
    >>> _ = torch.manual_seed(0)
    >>> loss = TraceScore_ELBO(num_particles=100_000).differentiable_loss(model, guide)
    >>> estimate, = torch.autograd.grad(loss, logit)
    >>> p = logit.sigmoid()
    >>> exact = -(0.8**2 / 2 - 0.2**2 / 2 - logit) * p * (1 - p)
    >>> bool((estimate - exact).abs() < 0.01)
    True
    """

    def __init__(self, num_particles=1, *, score_sites="discrete", **options):
        if score_sites not in ("discrete", "all"):
            raise ValueError(f"score_sites must be 'discrete' or 'all', got {score_sites!r}.")
        self.score_sites = score_sites
        super().__init__(num_particles, **options)

    def is_scored(self, site: dict) -> bool:
        return self.score_sites == "all" or super().is_scored(site)

    def _run(self, *args, **options) -> Run:
        paths = Detached() if self.score_sites == "all" else None
        return super()._run(*args, paths=paths, **options)

    def surrogate(self, run: Run, sites: list[Site], pathwise) -> torch.Tensor | float:
        return sum((site.signal * site.log_q).sum() / run.num_particles for site in sites)
