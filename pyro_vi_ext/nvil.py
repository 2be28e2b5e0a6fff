r"""NVIL (Mnih and Gregor 2014, arXiv:1402.0030): baselines that depend on the data.

.. math::

    g_i = (f_i - m_i - C_i(x, b_{<i})) \, \nabla_\phi \log q(b_i \mid b_{<i}, x), \qquad
    C_i \leftarrow \arg\min \mathbb{E} (f_i - m_i - C_i)^2, \qquad
    m_i \leftarrow \beta m_i + (1 - \beta) \bar f_i.

The signal is centred, and not divided by a running standard deviation, which would bias g.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from pyro_vi_ext.control_variates import (
    ControlledObjective,
    SiteModules,
    context,
    mlp,
    one_per_unit,
)
from pyro_vi_ext.discrete import Site, stacked
from pyro_vi_ext.run import Run

__all__ = ["TraceNVIL_ELBO"]


class TraceNVIL_ELBO(ControlledObjective):
    r"""The ELBO with the score-function gradient and input-dependent baselines.

    .. math:: g_i = (f_i - m_i - C_i(x, b_{<i})) \, \nabla_\phi \log q(b_i \mid \cdot)

    for each draw i without a path, where :math:`f_i`, in nats, is the log-weight that it can
    influence (:mod:`pyro_vi_ext.discrete`), :math:`m_i` a running mean of it, and
    :math:`C_i` a baseline that is trained to predict the rest, by its squared error, with the
    optimizer of model and guide. Unbiased, for any distribution. The running mean is updated after
    use, and only in calls with gradients.

    :param baseline: a module (or function) of the arguments of model and guide,
        ``baseline(*args, **kwargs)``, that returns one value per unit, in nats: it must broadcast
        to the batch shape of every discrete site. Default: for each site, a network of the guide's
        earlier draws in the same plates and of the observed values of the unit; where there are
        none, the running mean alone.
    :param num_particles: J. An integer >= 1.
    :param hidden_dims: widths of the layers of the default network (tanh).
    :param decay: :math:`\beta`, in [0, 1).
    :param name: name of the learned parts in Pyro's parameter store; default: the class's.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: see :class:`~pyro_vi_ext.objective.Objective`.
    :raises ValueError: for a decay out of range; for a baseline that cannot be called, or returns
        another shape than one value per unit.

    Reference: A. Mnih and K. Gregor, *Neural Variational Inference and Learning in Belief
    Networks*, ICML 2014, arXiv:1402.0030.

    Example: the gradient for a logit, and its exact value.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import TraceNVIL_ELBO
    >>> logit = torch.tensor(0.3, requires_grad=True)
    >>> def model():
    ...     b = pyro.sample("b", dist.Bernoulli(0.5))
    ...     pyro.sample("x", dist.Normal(b, 1.0), obs=torch.tensor(0.8))
    >>> def guide():
    ...     pyro.sample("b", dist.Bernoulli(logits=logit))
    >>> pyro.clear_param_store()
    >>> _ = torch.manual_seed(0)
    >>> loss = TraceNVIL_ELBO(num_particles=100_000).differentiable_loss(model, guide)
    >>> estimate, = torch.autograd.grad(loss, logit)
    >>> p = logit.sigmoid()
    >>> exact = -(0.8**2 / 2 - 0.2**2 / 2 - logit) * p * (1 - p)
    >>> bool((estimate - exact).abs() < 0.01)
    True
    """

    def __init__(
        self,
        baseline: Callable | None = None,
        num_particles=1,
        *,
        hidden_dims: Sequence[int] = (100,),
        decay: float = 0.9,
        **options,
    ):
        super().__init__(num_particles, **options)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay!r}.")
        if baseline is not None and not callable(baseline):
            raise ValueError(
                "baseline must be a module or function of the arguments of model and guide, got "
                f"{type(baseline).__name__}."
            )
        self.hidden_dims, self.decay, self.baseline = tuple(hidden_dims), decay, baseline
        self.means, self.networks = SiteModules(), SiteModules()
        own = baseline if isinstance(baseline, nn.Module) else None
        self.learned = self.networks if baseline is None else own

    def prepare_site(self, site: Site) -> None:
        known = context(site) if self.baseline is None else None
        if known is not None:
            self._network(site, known)

    def surrogate(self, run: Run, sites: list[Site], pathwise) -> torch.Tensor | float:
        total = 0.0
        for site in sites:
            known = context(site) if self.baseline is None else None
            mean = self.means.at(site, RunningMean)
            centred = site.signal - mean.value
            predicted = self._predict(site, known)
            total = total + ((centred - predicted.detach()) * site.log_q).sum()
            if predicted.requires_grad:
                total = total - (centred - predicted).square().sum()
            mean.update(site.signal, self.decay)
        return total / run.num_particles

    def _network(self, site: Site, known: torch.Tensor) -> nn.Module:
        return self.networks.at(site, lambda: mlp(known.shape[-1], self.hidden_dims, nn.Tanh))

    def _predict(self, site: Site, known: torch.Tensor | None) -> torch.Tensor:
        run = site.run
        if self.baseline is not None:
            value = self.baseline(*run.args, **run.kwargs)
            return stacked(run, [one_per_unit(value, node, "baseline") for node in site.nodes])
        if known is None:
            return torch.zeros_like(site.signal)
        return self._network(site, known)(known.detach()).squeeze(-1)


class RunningMean(nn.Module):
    """A mean over past calls, corrected for its start at zero; 0 at first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    @property
    def value(self) -> torch.Tensor:
        """The mean so far."""
        tiny = torch.finfo(self.weight.dtype).tiny
        return self.total / self.weight.clamp(min=tiny)

    @torch.no_grad()
    def update(self, values: torch.Tensor, decay: float) -> None:
        """Take in the values of a call."""
        self.total.mul_(decay).add_((1 - decay) * values.mean())
        self.weight.mul_(decay).add_(1 - decay)
