r"""MuProp (Gu et al. 2016, arXiv:1511.05176): a Taylor expansion as a control variate.

For draw i let :math:`\mu_i = \mathbb{E}[b_i \mid b_{<i}]`, and :math:`f_i(\mu)` the log-weight with
earlier draws as sampled, draw i at its mean, and later draws at the means that follow from it. With
:math:`f'_i = \partial f_i(\mu) / \partial \mu_i`, also through the later means,

.. math::

    g_i = \big[ f_i(b) - f_i(\mu) - f_i' \cdot (b_i - \mu_i) \big] \,
        \nabla_\phi \log q(b_i \mid b_{<i}) + f'_i \cdot \nabla_\phi \mu_i.
"""

from __future__ import annotations

import torch

from pyro_vi_ext.branches import Relaxing, branch
from pyro_vi_ext.control_variates import slopes_at
from pyro_vi_ext.discrete import DiscreteObjective, Site
from pyro_vi_ext.rebar import relaxable
from pyro_vi_ext.run import Run

__all__ = ["TraceMuProp_ELBO"]


class TraceMuProp_ELBO(DiscreteObjective):
    r"""The ELBO with the MuProp gradient: a first-order expansion around the means.

    .. math:: g_i = \big[ f_i(b) - f_i(\mu) - f_i' \cdot (b_i - \mu_i) \big] \,
        \nabla_\phi \log q(b_i \mid \cdot) + f'_i \cdot \nabla_\phi \mu_i,

    for each discrete draw i, where :math:`f_i`, in nats, is the log-weight that it can influence
    (:mod:`pyro_vi_ext.discrete`) and :math:`f_i(\mu)` the same with draw i at its mean given the
    *sampled* earlier draws, later draws at the means that follow, and log-probabilities extended
    linearly. (The paper's mean-field pass starts from the data for all draws; from the sampled
    parents it is closer.) Unbiased; nothing to tune or to learn. Costs one more run of the pair,
    with its gradient, for each site.

    :param num_particles: J. An integer >= 1.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: see :class:`~pyro_vi_ext.objective.Objective`.
    :raises NotImplementedError: for a draw without a path that is not Bernoulli or
        OneHotCategorical, naming the site.
    :raises ValueError: if model or guide cannot be run at the means.

    Reference: S. Gu, S. Levine, I. Sutskever and A. Mnih, *MuProp: Unbiased Backpropagation for
    Stochastic Neural Networks*, ICLR 2016, arXiv:1511.05176.

    Example: where f is linear in b the gradient is exact for every draw.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import TraceMuProp_ELBO
    >>> logit = torch.tensor(0.3, requires_grad=True)
    >>> def model():
    ...     b = pyro.sample("b", dist.Bernoulli(0.2))
    ...     pyro.factor("linear", 3.0 * b)
    >>> def guide():
    ...     pyro.sample("b", dist.Bernoulli(logits=logit))
    >>> elbo = TraceMuProp_ELBO()
    >>> losses = [elbo.differentiable_loss(model, guide) for _ in range(3)]
    >>> [round(torch.autograd.grad(loss, logit)[0].item(), 4) for loss in losses]
    [-0.3211, -0.3211, -0.3211]
    """

    def prepare(self, sites: list[Site]) -> None:
        for site in sites:
            if site.relaxation is None or not site.relaxation.relaxes_value:
                raise NotImplementedError(
                    f"Guide site '{site.name}' ({type(site.nodes[0]['fn']).__name__}) has no mean "
                    "to expand around. Use Bernoulli or OneHotCategorical, or TraceRLOO_ELBO, "
                    "which takes any distribution."
                )

    def surrogate(self, run: Run, sites: list[Site], pathwise) -> torch.Tensor | float:
        return sum(self._site(run, site) for site in sites) / run.num_particles

    def _site(self, run: Run, site: Site) -> torch.Tensor:
        relaxation = site.relaxation
        mean = relaxation.mean(site.logits)
        center = mean.detach().expand_as(site.value).clone().requires_grad_()
        with torch.enable_grad():
            names = list(relaxable(run, site))
            at_mean = branch(
                run, {site.name: center.unsqueeze(0)}, 1, lambda: Relaxing(names, _mean)
            )
            field, total = at_mean.signal(site)[0], at_mean.total(site)
        (slope,) = slopes_at(total, [center], False)
        linear = site.per_unit(slope * (site.value - mean.detach()))
        residual = site.signal - field.detach() - linear
        return (residual * site.log_q).sum() + (slope * mean).sum()


def _mean(name, relaxation, logits):
    return relaxation.mean(logits)
