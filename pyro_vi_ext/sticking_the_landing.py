r"""Sticking the landing (Roeder, Wu and Duvenaud 2017, arXiv:1703.09194).

.. math::

    \nabla_\phi L = \mathbb{E}_\epsilon \Big[
        \frac{\partial (\log p(x, z) - \log q(z \mid \phi))}{\partial z}
        \frac{\partial z}{\partial \phi} \Big], \qquad z = z(\epsilon, \phi).

The gradient of the ELBO also has the term :math:`-\partial \log q(z \mid \phi) / \partial \phi` at
fixed :math:`z`. Its expectation is zero; leaving it out leaves out its noise.
"""

from __future__ import annotations

import torch

from pyro_vi_ext.objective import Estimate, Objective
from pyro_vi_ext.paths import Paths, check_reparameterized
from pyro_vi_ext.run import Run
from pyro_vi_ext.scoring import linear_bound, pair_terms

__all__ = ["TraceSTL_ELBO", "stl_bound"]


class TraceSTL_ELBO(Objective):
    r"""The ELBO with the path derivative as its gradient ("sticking the landing").

    .. math::

        \mathrm{loss} = -\frac{1}{J} \sum_{j=1}^J \big[ \log p(x, z_j) - \log q(z_j) \big],

    in nats, with the gradient of the module docstring: unbiased, and exactly zero for every draw
    where the guide is the exact posterior, which that of ``Trace_ELBO`` is not. Parameters that the
    guide shares with the model keep their gradient through the model.

    The guide may be hierarchical, a flow, an AutoGuide. Only the densities of draws are left out: a
    parameter that moves a ``Delta`` directly (``AutoDelta``) keeps its gradient. Flows are scored
    at given draws, by their inverses (slow for inverse autoregressive flows).

    Use it for the ELBO. Inside a bound with :math:`K > 1` weights the dropped term has no longer
    zero mean: ``ImportanceWeightedELBO(gradient="stl")`` is biased there (Tucker et al. 2018,
    arXiv:1810.04152), and ``gradient="dreg"`` is its unbiased successor.

    :param num_particles: J. An integer >= 1.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: see :class:`~pyro_vi_ext.objective.Objective`.
    :raises NotImplementedError: for a guide site that is not reparameterised; a flow without an
        inverse (planar, radial, Sylvester); a guide with mixing variables. Sites are named.
    :raises ValueError: if the guide has other densities when run again at its own draws (dropout).

    Reference: G. Roeder, Y. Wu and D. Duvenaud, *Sticking the Landing: Simple, Lower-Variance
    Gradient Estimators for Variational Inference*, NeurIPS 2017, arXiv:1703.09194.

    Example: at the exact posterior N(1, 1/2) one draw suffices.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro.infer import Trace_ELBO
    >>> from pyro_vi_ext import TraceSTL_ELBO
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> loc, scale = torch.tensor([1.0, 0.5**0.5]).requires_grad_()
    >>> def guide(x):
    ...     pyro.sample("z", dist.Normal(loc, scale))
    >>> def gradient(elbo):
    ...     _ = torch.manual_seed(0)
    ...     loss = elbo.differentiable_loss(model, guide, torch.tensor(2.0))
    ...     return [round(g.item(), 3) + 0.0 for g in torch.autograd.grad(loss, [loc, scale])]
    >>> gradient(TraceSTL_ELBO())
    [0.0, 0.0]
    >>> all(abs(g) > 0.1 for g in gradient(Trace_ELBO()))
    True
    """

    def _run(self, *args, **options) -> Run:
        paths = Paths(copies=False) if torch.is_grad_enabled() else None
        return super()._run(*args, paths=paths, **options)

    def estimate(self, run: Run) -> Estimate:
        for pair in run.pairs:
            check_reparameterized(
                pair.guide, "ImportanceWeightedELBO, or pyro.infer.TraceGraph_ELBO"
            )
        scored = [pair_terms(run, pair) for pair in run.pairs]
        terms = [term for part in scored for term in (*part.model, *part.guide.values())]
        bound = linear_bound(terms, run)
        if run.paths is None:
            return Estimate(-bound, terms=terms)
        return Estimate(-bound, -(bound + stl_bound(run, scored)), terms)


def stl_bound(run: Run, scored):
    """What to add to a linear bound for its gradient to be the path derivative; needs ``Paths``."""
    landed = run.paths.log_q_at_detached(run, scored, reparameterized_only=True, masked=True)
    return linear_bound([term for row in landed for term in row], run)
