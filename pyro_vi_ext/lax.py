r"""LAX (Grathwohl et al. 2018, arXiv:1711.00123): the score function with a learned control.

For one reparameterised draw :math:`z = z(\epsilon, \phi)` of the guide, and its detached value
:math:`\bar z`,

.. math::

    g_\phi = [f(\bar z) - c(\bar z)] \, \nabla_\phi \log q(\bar z \mid \phi)
        + \nabla_\phi c(z(\epsilon, \phi)).

f itself is never differentiated by z: it may be a black box.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from pyro_vi_ext.control_variates import (
    Control,
    ControlledObjective,
    SiteModules,
    as_module,
    inputs,
    mlp,
    own_control,
    slopes_at,
)
from pyro_vi_ext.discrete import Site, stacked
from pyro_vi_ext.paths import Detached, is_reparameterized
from pyro_vi_ext.run import Run

__all__ = ["TraceLAX_ELBO"]


class TraceLAX_ELBO(ControlledObjective):
    r"""The ELBO with the LAX gradient, for reparameterised draws and a model that is a black box.

    .. math:: g_\phi = [f(\bar z) - c(\bar z)] \, \nabla_\phi \log q(\bar z \mid \phi)
        + \nabla_\phi c(z(\epsilon, \phi)),

    summed over the draws of the guide, where f, in nats, is the log-weight that a draw can
    influence (:mod:`pyro_vi_ext.discrete`). Unbiased for any c. The model sees detached draws, and
    so do later sites of the guide: the only path runs through c. Where the model can be
    differentiated, the pathwise gradient of ``Trace_ELBO`` costs less and has lower variance.

    :param control_variate: a module (or function) called once for each site as
        ``control_variate(sites, *args, **kwargs)`` with the arguments of model and guide. ``sites``
        maps the names of earlier draws to their values, and last the site's own name to z, with the
        particles, if vectorised, on the left. Returns one value, in nats, per unit: it must
        broadcast to the site's batch shape. Default: a network of z, of the guide's earlier draws
        in the same plates, and of the observed values of the unit; 0 at first.
    :param num_particles: J. An integer >= 1.
    :param hidden_dims: widths of the layers of the default network (tanh).
    :param name: name of the learned parts in Pyro's parameter store; default: the class's.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: see :class:`~pyro_vi_ext.objective.Objective`.
    :raises NotImplementedError: for a draw that is not reparameterised, naming the site.
    :raises ValueError: if a control variate returns another shape than one value per unit.

    Reference: W. Grathwohl, D. Choi, Y. Wu, G. Roeder and D. Duvenaud, *Backpropagation through the
    Void: Optimizing control variates for black-box gradient estimation*, ICLR 2018,
    arXiv:1711.00123.

    Example: a model with a table in it, which has no derivative.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import TraceLAX_ELBO
    >>> loc = torch.tensor(0.3, requires_grad=True)
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z.floor(), 1.0), obs=torch.tensor(2.0))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(loc, 0.5))
    >>> pyro.clear_param_store()
    >>> _ = torch.manual_seed(0)
    >>> loss = TraceLAX_ELBO(num_particles=1000).differentiable_loss(model, guide)
    >>> bool(torch.autograd.grad(loss, loc)[0] < 0)  # up, towards the datum
    True
    """

    def __init__(
        self,
        control_variate: Callable | None = None,
        num_particles=1,
        *,
        hidden_dims: Sequence[int] = (100,),
        **options,
    ):
        super().__init__(num_particles, **options)
        self.hidden_dims, self.control_variate = tuple(hidden_dims), control_variate
        self.learned = SiteModules() if control_variate is None else as_module(control_variate)

    def is_scored(self, site: dict) -> bool:
        return True

    def _run(self, *args, **options) -> Run:
        return super()._run(*args, paths=Detached(), **options)

    def prepare_site(self, site: Site) -> None:
        if not is_reparameterized(site.nodes[0]):
            raise NotImplementedError(
                f"Guide site '{site.name}' ({type(site.nodes[0]['fn']).__name__}) is not "
                "reparameterised, so z has no path to the control variate. Use "
                "TraceRELAX_ELBO, which is made for discrete draws."
            )
        if self.control_variate is None:
            self._network(site)

    def surrogate(self, run: Run, sites: list[Site], pathwise) -> torch.Tensor | float:
        learned = self.register()
        if not sites:
            return 0.0
        outputs, cotangents = [], []
        for site in sites:
            values = [trace.nodes[site.name]["value"] for trace in run.paths.drawn]
            z = site.value.requires_grad_()
            c = self._control(site, z)
            (slope,) = slopes_at(c.total, [z], bool(learned))
            residual = site.signal - c.values[0]
            outputs += [site.log_q, stacked(run, values, site.event_dim)]
            cotangents += [residual.expand_as(site.log_q), slope]
        cotangents = [cotangent / run.num_particles for cotangent in cotangents]
        used = [k for k, output in enumerate(outputs) if output.requires_grad]
        outputs, cotangents = [outputs[k] for k in used], [cotangents[k] for k in used]
        return self.combine(outputs, cotangents, pathwise, learned)

    def _control(self, site: Site, z: torch.Tensor) -> Control:
        if self.control_variate is None:
            c = self._network(site)(inputs(site, z)).squeeze(-1)
            return Control(c.unsqueeze(0), c.sum())
        names = [other.name for other in self.sites(site.run, site.rows)]
        return own_control(self.control_variate, site, [z], names)

    def _network(self, site: Site) -> nn.Module:
        def make():
            return mlp(inputs(site, site.value).shape[-1], self.hidden_dims, nn.Tanh)

        return self.learned.at(site, make)
