r"""RELAX (Grathwohl et al. 2018, arXiv:1711.00123): a network as a control variate.

For one discrete draw :math:`b = H(z)` with logits :math:`\ell` and :math:`\tilde z` given b,

.. math::

    g_\ell = [f(b) - c(\tilde z)] \, \nabla_\ell \log q(b) + \nabla_\ell c(z)
        - \nabla_\ell c(\tilde z), \qquad
    c(z) = \eta \, f(\sigma_\lambda(z)) + r(z, \ldots),

with a network r of z, of what the guide drew before, and of the data. The estimator is that of
:mod:`~pyro_vi_ext.rebar`, which is r = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from pyro_vi_ext.control_variates import (
    Control,
    SiteModules,
    as_module,
    inputs,
    mlp,
    own_control,
)
from pyro_vi_ext.discrete import Site
from pyro_vi_ext.rebar import RelaxedControl, TraceREBAR_ELBO, relaxable
from pyro_vi_ext.run import Run

__all__ = ["TraceRELAX_ELBO"]


class TraceRELAX_ELBO(TraceREBAR_ELBO):
    r"""The ELBO with the RELAX gradient: a learned control variate for each discrete site.

    .. math:: g_\ell = [f(b) - c(\tilde z)] \, \nabla_\ell \log q(b)
        + \nabla_\ell c(z) - \nabla_\ell c(\tilde z),

    where f, in nats, is the log-weight that the site can influence
    (:mod:`pyro_vi_ext.discrete`). Unbiased for any c; its parameters follow the exact gradient of
    the estimator's variance and are trained by the optimizer of model and guide. Model parameters
    and reparameterised draws have the plain derivative.

    By default :math:`c(z) = \eta f(\sigma_\lambda(z)) + r`: TraceREBAR_ELBO's control variate with
    learned temperature and scale, plus a network r of z, of the guide's earlier draws in the same
    plates, and of the observed values of the unit; r = 0 at first. Where relaxed values cannot be
    used (an integer Categorical), c is r alone.

    Cost: the run of the pair and, for each site, one relaxed run with its gradient (two, in one
    pass of twice the particles, if not ``coupled``; none with a ``control_variate`` of your own);
    the gradient of the variance takes a second derivative of c.

    :param control_variate: your own c, in place of the default: a module (or function) called once
        for each site as ``control_variate(sites, *args, **kwargs)`` with the arguments of model and
        guide. ``sites`` maps the names of earlier discrete sites to their draws, and last
        the site's own name to z, in logit space: the shape of the site's value (for an integer
        Categorical, with a last dimension of categories), with the particles, if vectorised, on the
        left. Returns one value, in nats, per unit: it must broadcast to the site's batch shape.
    :param num_particles: J. An integer >= 1.
    :param hidden_dims: widths of the layers of r.
    :param temperature: initial temperature of the relaxations, > 0.
    :param scale: initial :math:`\eta`.
    :param learn: whether temperatures and scales are learned.
    :param coupled: whether one noise serves for z and z~.
    :param leave_one_out: subtract the other particles' mean of :math:`f - c`, for
        ``num_particles >= 2``.
    :param name: name of the learned parts in Pyro's parameter store; default: the class's.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: see :class:`~pyro_vi_ext.objective.Objective`.
    :raises NotImplementedError: for a draw without a path that is not Bernoulli, Categorical or
        OneHotCategorical, naming the site.
    :raises ValueError: if model or guide cannot be run at relaxed values; if a control variate
        returns another shape than one value per unit.

    Reference: W. Grathwohl, D. Choi, Y. Wu, G. Roeder and D. Duvenaud, *Backpropagation through the
    Void: Optimizing control variates for black-box gradient estimation*, ICLR 2018,
    arXiv:1711.00123.

    Example: a control variate of one's own, trained together with the guide.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import TraceRELAX_ELBO
    >>> class Quadratic(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
    ...     def forward(self, sites):
    ...         s = sites["b"].sigmoid()
    ...         return self.weight[0] * s + self.weight[1] * s**2
    >>> logit = torch.tensor(0.3, requires_grad=True)
    >>> def model():
    ...     b = pyro.sample("b", dist.Bernoulli(0.5))
    ...     pyro.sample("x", dist.Normal(b, 1.0), obs=torch.tensor(0.8))
    >>> def guide():
    ...     pyro.sample("b", dist.Bernoulli(logits=logit))
    >>> pyro.clear_param_store()
    >>> _ = torch.manual_seed(0)
    >>> elbo = TraceRELAX_ELBO(Quadratic(), num_particles=100)(model, guide)
    >>> _ = elbo()
    >>> adam = torch.optim.Adam(elbo.parameters(), lr=0.05)
    >>> for _ in range(100):
    ...     adam.zero_grad()
    ...     elbo().backward()
    ...     adam.step()
    """

    def __init__(
        self,
        control_variate: Callable | None = None,
        num_particles=1,
        *,
        hidden_dims: Sequence[int] = (100, 100),
        **options,
    ):
        super().__init__(num_particles, **options)
        self.hidden_dims = tuple(hidden_dims)
        self.control_variate = control_variate
        if control_variate is None:
            self.networks = SiteModules()
            self.learned = nn.ModuleDict({"relaxed": self.constants, "network": self.networks})
        else:
            self.learned = as_module(control_variate)

    def prepare_site(self, site: Site) -> None:
        RelaxedControl.prepare_site(self, site)
        if self.control_variate is not None:
            return
        if all(relaxable(site.run, site).values()):
            self.constants_of(site)
        self._network(site)

    def control(self, run: Run, site: Site, points: Sequence[torch.Tensor]) -> Control:
        if self.control_variate is not None:
            names = [other.name for other in self.sites(run, site.rows)]
            return own_control(self.control_variate, site, points, names)
        network = self._network(site)
        r = torch.stack([network(inputs(site, z)).squeeze(-1) for z in points])
        c = Control(r, r.sum())
        if all(relaxable(run, site).values()):
            c = c + super().control(run, site, points)
        return c

    def _network(self, site: Site) -> nn.Module:
        def make():
            width = inputs(site, site.logits.detach()).shape[-1]
            return mlp(width, self.hidden_dims)

        return self.networks.at(site, make)
