r"""Antithetic pairs of Bernoulli draws: ARM (1807.11143) and DisARM (2006.10680).

With one uniform number for each variable, :math:`b = 1[u < \sigma(\ell)]` and
:math:`\tilde b = 1[1 - u < \sigma(\ell)]`, the gradient for the logits :math:`\ell` is estimated by

.. math::

    \text{ARM:}\quad & (f(b) - f(\tilde b)) \, (\tfrac12 - u) \\
    \text{DisARM:}\quad & \tfrac12 (f(b) - f(\tilde b)) \, (-1)^{\tilde b} \,
        1[b \ne \tilde b] \, \sigma(|\ell|),

the second of which is the mean of the first given :math:`(b, \tilde b)`. In a chain of sites each
has a pair of its own: earlier draws are shared, later ones drawn for each of the two.
"""

from __future__ import annotations

import abc

import torch

from pyro_vi_ext.branches import branch
from pyro_vi_ext.discrete import DiscreteObjective, Site
from pyro_vi_ext.relaxations import BERNOULLI
from pyro_vi_ext.run import Run

__all__ = ["TraceARM_ELBO", "TraceDisARM_ELBO"]


class _Antithetic(DiscreteObjective):
    def prepare(self, sites: list[Site]) -> None:
        for site in sites:
            if site.relaxation is not BERNOULLI:
                raise NotImplementedError(
                    f"Guide site '{site.name}' is a {type(site.nodes[0]['fn']).__name__}, and "
                    f"{type(self).__name__} takes Bernoulli sites only. Use TraceRLOO_ELBO, which "
                    "takes any distribution, or TraceREBAR_ELBO (OneHotCategorical)."
                )

    def surrogate(self, run: Run, sites: list[Site], pathwise) -> torch.Tensor | float:
        total = 0.0
        for site in sites:
            with torch.no_grad():
                gradient = self._gradient(site)
            total = total + (gradient * site.logits).sum() / run.num_particles
        return total

    def _gradient(self, site: Site) -> torch.Tensor:
        b, p = site.value, torch.sigmoid(site.logits)
        v = torch.rand_like(b)
        u = torch.where(b > 0.5, v * p, p + v * (1 - p))  # given b
        other = (1 - u < p).to(b.dtype)
        flipped = branch(site.run, {site.name: other.unsqueeze(0)})
        difference = site.per_variable(site.signal - flipped.signal(site)[0])
        return self._weigh(difference, site.logits, b, other, u)

    @staticmethod
    @abc.abstractmethod
    def _weigh(difference, logits, b, other, u) -> torch.Tensor:
        """The gradient for the logits from f(b) - f(b~)."""


class TraceARM_ELBO(_Antithetic):
    r"""The ELBO with the augment-REINFORCE-merge gradient, for Bernoulli draws.

    .. math:: g_\ell = (f(b) - f(\tilde b)) \, (\tfrac12 - u), \qquad
        b = 1[u < \sigma(\ell)], \; \tilde b = 1[1 - u < \sigma(\ell)],

    where f, in nats, is the log-weight that the draws can influence
    (:mod:`pyro_vi_ext.discrete`) and :math:`\ell` are the logits, one for each variable of the
    site. Unbiased; nothing to tune or to learn. Costs one more run of the pair for each site.

    :param num_particles: number of antithetic pairs. An integer >= 1.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: see :class:`~pyro_vi_ext.objective.Objective`.
    :raises NotImplementedError: for a draw without a path that is not Bernoulli, naming the site.

    Reference: M. Yin and M. Zhou, *ARM: Augment-REINFORCE-Merge Gradient for Stochastic Binary
    Networks*, ICLR 2019, arXiv:1807.11143.

    Example: see :class:`TraceDisARM_ELBO`.
    """

    @staticmethod
    def _weigh(difference, logits, b, other, u):
        return difference * (0.5 - u)


class TraceDisARM_ELBO(_Antithetic):
    r"""The ELBO with the DisARM (or U2G) gradient, for Bernoulli draws.

    .. math:: g_\ell = \tfrac12 (f(b) - f(\tilde b)) \, (-1)^{\tilde b} \, 1[b \ne \tilde b] \,
        \sigma(|\ell|),

    where :math:`(b, \tilde b)` is ARM's antithetic pair; f, in nats, is the log-weight that the
    draws can influence (:mod:`pyro_vi_ext.discrete`), and :math:`\ell` are the logits, one for each
    variable of the site. Unbiased, of lower variance than ARM at the same cost.

    :param num_particles: number of antithetic pairs. An integer >= 1.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: see :class:`~pyro_vi_ext.objective.Objective`.
    :raises NotImplementedError: for a draw without a path that is not Bernoulli, naming the site.

    References: Z. Dong, A. Mnih and G. Tucker, *DisARM: An Antithetic Gradient Estimator for Binary
    Latent Variables*, NeurIPS 2020, arXiv:2006.10680. M. Yin, N. Ho, B. Yan, X. Qian and M. Zhou,
    *Probabilistic Best Subset Selection via Gradient-Based Optimization*, arXiv:2006.06448.

    Example: the gradient for a logit, and its exact value.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import TraceDisARM_ELBO
    >>> logit = torch.tensor(0.3, requires_grad=True)
    >>> def model():
    ...     b = pyro.sample("b", dist.Bernoulli(0.5))
    ...     pyro.sample("x", dist.Normal(b, 1.0), obs=torch.tensor(0.8))
    >>> def guide():
    ...     pyro.sample("b", dist.Bernoulli(logits=logit))
    >>> _ = torch.manual_seed(0)
    >>> loss = TraceDisARM_ELBO(num_particles=10_000).differentiable_loss(model, guide)
    >>> estimate, = torch.autograd.grad(loss, logit)
    >>> p = logit.sigmoid()
    >>> exact = -(0.8**2 / 2 - 0.2**2 / 2 - logit) * p * (1 - p)
    >>> bool((estimate - exact).abs() < 0.01)
    True
    """

    @staticmethod
    def _weigh(difference, logits, b, other, u):
        sign = 1 - 2 * other
        return 0.5 * difference * sign * (b != other) * torch.sigmoid(logits.abs())
