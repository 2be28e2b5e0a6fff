r"""REBAR (Tucker et al. 2017, arXiv:1703.07370) and RELAX (Grathwohl et al. 2018, 1711.00123).

For one discrete draw :math:`b = H(z)` with logits :math:`\ell`, and :math:`\tilde z` drawn given b
(:mod:`~pyro_vi_ext.relaxations`), and any control variate c,

.. math::

    g_\ell = [f(b) - c(\tilde z)] \, \nabla_\ell \log q(b) + \nabla_\ell c(z)
        - \nabla_\ell c(\tilde z)

is an unbiased estimate of the gradient, of low variance if :math:`c(z) \approx f(H(z))`. With
:math:`\sigma_\lambda` the relaxation at temperature :math:`\lambda` and a network r,

.. math::

    \text{REBAR:}\quad c(z) = \eta \, f(\sigma_\lambda(z)), \qquad
    \text{RELAX:}\quad c(z) = \eta \, f(\sigma_\lambda(z)) + r(z, \ldots).

The parameters of c follow the gradient of the variance of g
(:mod:`~pyro_vi_ext.control_variates`). In a chain each draw has a control variate of its own
relaxation: earlier draws hard, later ones drawn again, relaxed, from the relaxed value.

z and :math:`\tilde z` may depend on each other, since each term needs only its own law. Coupled,
they are one number with two derivatives: one evaluation of c and of its gradient serves for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from pyro_vi_ext.branches import Relaxing, branch, descendants
from pyro_vi_ext.control_variates import Control, ControlledObjective, SiteModules, slopes_at
from pyro_vi_ext.discrete import Site
from pyro_vi_ext.leave_one_out import without_mean_of_others
from pyro_vi_ext.relaxations import relaxation_of
from pyro_vi_ext.roles import is_delta
from pyro_vi_ext.run import Run

__all__ = ["RelaxedControl", "TraceREBAR_ELBO", "relaxable", "relaxed_signal"]


class RelaxedControl(ControlledObjective):
    """Base class: the estimator of the module docstring for any control variate."""

    def __init__(
        self,
        num_particles=1,
        *,
        coupled: bool = True,
        leave_one_out: bool = False,
        **options,
    ):
        super().__init__(num_particles, **options)
        if leave_one_out and num_particles < 2:
            raise ValueError("leave_one_out=True needs num_particles >= 2.")
        self.coupled, self.leave_one_out = coupled, leave_one_out

    def control(self, run: Run, site: Site, points: Sequence[torch.Tensor]) -> Control:
        r"""The control variate at relaxed values of a site.

        :param points: C values of z, each (J, \*batch, \*event), in logit space.
        """
        raise NotImplementedError

    def prepare_site(self, site: Site) -> None:
        if site.relaxation is None:
            raise NotImplementedError(
                f"Guide site '{site.name}' is a {type(site.nodes[0]['fn']).__name__}, which "
                "has no relaxation here. Use Bernoulli, OneHotCategorical or Categorical, or "
                "TraceRLOO_ELBO, which takes any distribution."
            )

    def surrogate(self, run: Run, sites: list[Site], pathwise) -> torch.Tensor | float:
        learned = self.register()
        if not sites:
            return 0.0
        gradients = [self._gradient(run, site, bool(learned)) for site in sites]
        logits = [site.logits for site in sites]
        cotangents = [
            _sum_to(gradient, site.logits.shape) / run.num_particles
            for gradient, site in zip(gradients, sites, strict=True)
        ]
        return self.combine(logits, cotangents, pathwise, learned)

    def _gradient(self, run: Run, site: Site, train: bool) -> torch.Tensor:
        """g for the logits of each particle, a function of the learned parts."""
        relaxation, b = site.relaxation, site.value
        logits = site.logits.detach()
        logits = logits.expand((run.num_particles,) + logits.shape[1:]).requires_grad_()
        given_b = relaxation.given(logits, b, relaxation.noise(logits))
        free = given_b
        if not self.coupled:
            free = relaxation.given(logits, b, relaxation.noise(logits))
        free = logits + (free - logits).detach()  # of the same value, with the path of z
        points = [given_b.detach().requires_grad_()]
        if not self.coupled:
            points.append(free.detach().requires_grad_())
        with torch.enable_grad():
            c = self.control(run, site, points)
        slopes = slopes_at(c.total, points, train)
        path = ((free * slopes[-1]) - (given_b * slopes[0])).sum()
        (path,) = torch.autograd.grad(path, logits, create_graph=train, retain_graph=True)
        log_q = relaxation.linear_log_prob(logits, b).sum()
        (score,) = torch.autograd.grad(log_q, logits)
        residual = site.signal - (c.values if train else c.values.detach())[0]
        if self.leave_one_out:
            residual = without_mean_of_others(residual, run)
        return site.per_variable(residual) * score + path


def _sum_to(tensor: torch.Tensor, shape) -> torch.Tensor:
    return tensor.sum_to_size(shape) if tensor.shape != shape else tensor


class TraceREBAR_ELBO(RelaxedControl):
    r"""The ELBO with the REBAR gradient: the relaxed log-weight as a control variate.

    .. math:: g_\ell = [f(b) - \eta f(\sigma_\lambda(\tilde z))] \, \nabla_\ell \log q(b)
        + \eta \nabla_\ell f(\sigma_\lambda(z)) - \eta \nabla_\ell f(\sigma_\lambda(\tilde z)),

    for each site, where f, in nats, is the log-weight that the site can influence
    (:mod:`pyro_vi_ext.discrete`), with log-probabilities of relaxed draws extended linearly.
    Unbiased for any temperature :math:`\lambda` and scale :math:`\eta`, which each site has of its
    own and which are learned by the same optimizer. Model parameters and reparameterised draws
    have the plain derivative.

    Cost: the run of the pair and, for each site, one relaxed run with its gradient (two, in one
    pass of twice the particles, if not ``coupled``); the gradient of the variance takes a second
    derivative of the relaxed run.

    :param num_particles: J. An integer >= 1.
    :param temperature: initial temperature of the relaxations, > 0.
    :param scale: initial :math:`\eta`.
    :param learn: whether temperatures and scales are learned.
    :param coupled: whether one noise serves for z and z~: cheaper, and as a rule of lower variance.
    :param leave_one_out: subtract the other particles' mean of :math:`f - c`, for
        ``num_particles >= 2``.
    :param name: name of the learned parts in Pyro's parameter store; default: the class's.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: see :class:`~pyro_vi_ext.objective.Objective`.
    :raises NotImplementedError: for a draw without a path that is not Bernoulli or
        OneHotCategorical, naming the site.
    :raises ValueError: if model or guide cannot be run at relaxed values.

    Reference: G. Tucker, A. Mnih, C. Maddison, J. Lawson and J. Sohl-Dickstein, *REBAR:
    Low-variance, unbiased gradient estimates for discrete latent variable models*, NeurIPS 2017,
    arXiv:1703.07370.

    Example: the gradient for a logit, and its exact value.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import TraceREBAR_ELBO
    >>> logit = torch.tensor(0.3, requires_grad=True)
    >>> def model():
    ...     b = pyro.sample("b", dist.Bernoulli(0.5))
    ...     pyro.sample("x", dist.Normal(b, 1.0), obs=torch.tensor(0.8))
    >>> def guide():
    ...     pyro.sample("b", dist.Bernoulli(logits=logit))
    >>> _ = torch.manual_seed(0)
    >>> loss = TraceREBAR_ELBO(num_particles=10_000).differentiable_loss(model, guide)
    >>> estimate, = torch.autograd.grad(loss, logit)
    >>> p = logit.sigmoid()
    >>> exact = -(0.8**2 / 2 - 0.2**2 / 2 - logit) * p * (1 - p)
    >>> bool((estimate - exact).abs() < 0.01)
    True
    """

    def __init__(
        self,
        num_particles=1,
        *,
        temperature: float = 0.5,
        scale: float = 1.0,
        learn: bool = True,
        **options,
    ):
        super().__init__(num_particles, **options)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {temperature!r}.")
        self.temperature, self.scale, self.learn = float(temperature), float(scale), learn
        self.learned = self.constants = SiteModules()

    def prepare_site(self, site: Site) -> None:
        super().prepare_site(site)
        for name, relaxes in relaxable(site.run, site).items():
            if not relaxes:
                raise NotImplementedError(
                    f"Site '{name}' cannot take relaxed values. Use Bernoulli or "
                    "OneHotCategorical there, TraceRELAX_ELBO (a network as control variate), or "
                    "TraceRLOO_ELBO, which takes any distribution."
                )
        self.constants_of(site)

    def constants_of(self, site: Site) -> Constants:
        """Temperature and scale of a site."""
        return self.constants.at(site, lambda: Constants(self.temperature, self.scale, self.learn))

    def control(self, run: Run, site: Site, points: Sequence[torch.Tensor]) -> Control:
        relaxed = relaxed_signal(run, site, points, self._temperature)
        return relaxed.scaled(self.constants_of(site).scale)

    def _temperature(self, name: str) -> torch.Tensor | float:
        constants = self.constants.get(name)
        return self.temperature if constants is None else constants.temperature


class Constants(nn.Module):
    """Temperature and scale of one site's control variate."""

    def __init__(self, temperature: float, scale: float, learn: bool):
        super().__init__()
        held = nn.Parameter if learn else nn.Buffer
        self.log_temperature = held(torch.tensor(temperature).log())
        self.scale = held(torch.tensor(scale))

    @property
    def temperature(self) -> torch.Tensor:
        return self.log_temperature.exp()


def relaxable(run: Run, site: Site) -> dict[str, bool]:
    """The site and the discrete draws that depend on it: whether they take relaxed values."""
    nodes = run.pairs[0].guide.nodes
    below = descendants(run)[site.name]
    result = {}
    for name, node in nodes.items():
        if name == site.name or (name in below and not getattr(node["fn"], "has_rsample", False)):
            if not is_delta(node):
                relaxation, _ = relaxation_of(node["fn"])
                result[name] = relaxation is not None and relaxation.relaxes_value
    return result


def relaxed_signal(
    run: Run, site: Site, points: Sequence[torch.Tensor], temperature: Callable
) -> Control:
    r"""The log-weight a site can influence at relaxed values.

    Later draws are drawn again, relaxed, with the same noise for all C values.

    :param temperature: temperature of a site, by its name.
    """
    relaxation, names = site.relaxation, list(relaxable(run, site))
    values = torch.stack([relaxation.relax(z, temperature(site.name)) for z in points])
    num, noise = run.num_particles, {}

    def draw(name, relaxation, logits):
        if logits.dim() and len(points) > 1 and run.vectorize_mixing:
            if name not in noise:
                noise[name] = relaxation.noise(logits[:num])
            repeats = (len(points),) + (1,) * (logits.dim() - 1)
            z = relaxation.sample(logits, noise[name].repeat(repeats))
        else:
            z = relaxation.sample(logits, relaxation.noise(logits))
        return relaxation.relax(z, temperature(name))

    result = branch(run, {site.name: values}, len(points), lambda: Relaxing(names, draw))
    return Control(result.signal(site), result.total(site))
