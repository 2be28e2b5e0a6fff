r"""Concrete relaxations (Maddison et al. 2017, arXiv:1611.00712; Jang et al. 2017, 1611.01144).

Discrete latents are replaced by continuous ones, in the guide at temperature :math:`\lambda` and in
the model at :math:`\lambda_p`, and the bound of *that* model is maximised along its paths. With
logits :math:`\ell`, logistic or Gumbel noise :math:`\epsilon`, and n categories,

.. math::

    \text{Bernoulli:}\quad & y = (\ell + \epsilon) / \lambda, & v &= \sigma(y), &
        \log p(y) &= \log \lambda + t - 2 \, \mathrm{softplus}(t), \; t = \ell - \lambda y \\
    \text{one-hot:}\quad & y = \log \mathrm{softmax}((\ell + \epsilon) / \lambda), & v &= e^y, &
        \log p(y) &= \log \Gamma(n) + (n - 1) \log \lambda + \textstyle\sum_i t_i
        - n \log \sum_i e^{t_i}.

Densities are of y, which does not underflow where v does; those of v have the same ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import nn
from torch.distributions import constraints

from pyro_vi_ext.objective import Estimate, Objective
from pyro_vi_ext.relaxations import BERNOULLI, Relaxation, relaxation_of
from pyro_vi_ext.roles import is_delta
from pyro_vi_ext.run import Run
from pyro_vi_ext.scoring import linear_bound, pair_terms, split_mask

__all__ = ["TraceConcrete_ELBO"]


class TraceConcrete_ELBO(Objective):
    r"""The ELBO of a model whose discrete latents are relaxed. Biased: it is another model's bound.

    .. math:: \mathrm{loss} = -\mathbb{E}_{q_\lambda(y)} \big[ \log p(x \mid v(y))
        + \log p_{\lambda_p}(y) - \log q_\lambda(y) \big],

    in nats, by its path; densities and notation as in the module docstring. Every Bernoulli and
    OneHotCategorical latent of model and guide is relaxed, here, without a change to either. The
    gradient has low variance, and is biased for the discrete model; the loss is not a bound on its
    evidence. A lower temperature lessens the bias as a rule, but not to zero: at equal temperatures
    the divergence of relaxed draws from their prior is that of the logits with noise,
    whatever :math:`\lambda`, and more than that of the discrete ones. Evaluate with
    ``Trace_ELBO``, ``ImportanceWeightedELBO`` or ``log_evidence``, which keep draws hard.

    Values shown to the model lie strictly inside the unit interval or the simplex.

    :param temperature: :math:`\lambda`, > 0, of the guide's sites.
    :param prior_temperature: :math:`\lambda_p`, > 0, of the model's; default: that of the guide.
    :param anneal: optional function of the number of gradient calls so far that returns
        :math:`\lambda`, instead of ``temperature``.
    :param hard: show the model hard values, with the path of the relaxed ones (straight-through);
        densities are of relaxed values.
    :param num_particles: J. An integer >= 1.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: see :class:`~pyro_vi_ext.objective.Objective`.
    :raises NotImplementedError: for a draw without a path that is not Bernoulli or
        OneHotCategorical, naming the site.
    :raises ValueError: for a temperature that is not positive.

    References: C. Maddison, A. Mnih and Y. W. Teh, *The Concrete Distribution: A Continuous
    Relaxation of Discrete Random Variables*, ICLR 2017, arXiv:1611.00712. E. Jang, S. Gu and B.
    Poole, *Categorical Reparameterization with Gumbel-Softmax*, ICLR 2017, arXiv:1611.01144.

    Example: which of two components a datum comes from.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import TraceConcrete_ELBO
    >>> x = torch.tensor([0.8, -1.0])
    >>> logits = torch.zeros(2, 2, requires_grad=True)
    >>> def model():
    ...     with pyro.plate("data", 2):
    ...         b = pyro.sample("b", dist.OneHotCategorical(torch.tensor([0.5, 0.5])))
    ...         pyro.sample("x", dist.Normal(b @ torch.tensor([-1.0, 1.0]), 1.0), obs=x)
    >>> def guide():
    ...     with pyro.plate("data", 2):
    ...         pyro.sample("b", dist.OneHotCategorical(logits=logits))
    >>> _ = torch.manual_seed(0)
    >>> elbo = TraceConcrete_ELBO(temperature=0.5, num_particles=1000)
    >>> (-torch.autograd.grad(elbo.differentiable_loss(model, guide), logits)[0] > 0).tolist()
    [[False, True], [True, False]]
    """

    def __init__(
        self,
        temperature: float = 0.5,
        num_particles=1,
        *,
        prior_temperature: float | None = None,
        anneal: Callable[[int], float] | None = None,
        hard: bool = False,
        **options,
    ):
        super().__init__(num_particles, **options)
        self._temperature = _positive("temperature", temperature)
        self.prior_temperature = None
        if prior_temperature is not None:
            self.prior_temperature = _positive("prior_temperature", prior_temperature)
        self.anneal, self.hard = anneal, hard
        self.steps = _Steps()

    @property
    def temperature(self) -> float:
        """The guide's temperature in the next call."""
        if self.anneal is None:
            return self._temperature
        return _positive("anneal", float(self.anneal(int(self.steps.count))))

    def _handled(self, model, guide):
        temperature = self.temperature
        prior = temperature if self.prior_temperature is None else self.prior_temperature
        drawn = _Drawn()
        relax_guide = _Relax(temperature, drawn, self.hard, draws=True)
        return _Relax(prior, drawn, self.hard, draws=False)(model), relax_guide(guide)

    def _run(self, *args, **options) -> Run:
        run = super()._run(*args, check_alone=False, **options)
        if self.anneal is not None and torch.is_grad_enabled():
            self.steps.count += 1
        return run

    def estimate(self, run: Run) -> Estimate:
        scored = [pair_terms(run, pair) for pair in run.pairs]
        terms = [term for part in scored for term in (*part.model, *part.guide.values())]
        return Estimate(-linear_bound(terms, run), terms=terms)


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value!r}.")
    return float(value)


class _Steps(nn.Module):
    """The number of gradient calls, in a module so that a checkpoint keeps it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


class _Drawn:
    """The y of each value v that was drawn, by the identity of v."""

    def __init__(self):
        self._by_id: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.names: set[str] = set()  # sites of the guide

    def add(self, value: torch.Tensor, y: torch.Tensor) -> None:
        self._by_id[id(value)] = (value, y)  # keeps v, so that no other tensor takes its id

    def find(self, value: torch.Tensor) -> torch.Tensor | None:
        return self._by_id.get(id(value), (None, None))[1]


class _Relax(Messenger):
    """Replaces discrete latents by concrete ones: where they are drawn, or only as densities."""

    def __init__(self, temperature: float, drawn: _Drawn, hard: bool, draws: bool):
        super().__init__()
        self.temperature, self.drawn, self.hard, self.draws = temperature, drawn, hard, draws

    def _pyro_sample(self, msg):
        fn = msg["fn"]
        if msg["is_observed"] or site_is_subsample(msg) or is_delta(msg):
            return
        if getattr(fn, "has_rsample", False) or isinstance(fn, Concrete):
            return
        if self.draws:
            self.drawn.names.add(msg["name"])
        elif msg["name"] not in self.drawn.names:
            return  # a point mass in the guide
        inner, mask = split_mask({**msg, "mask": None})
        relaxation, logits = relaxation_of(inner)
        if relaxation is None or not relaxation.relaxes_value:
            raise NotImplementedError(
                f"Site '{msg['name']}' ({type(inner).__name__}) has no concrete relaxation. Use "
                "Bernoulli or OneHotCategorical, or TraceRLOO_ELBO, which takes any distribution."
            )
        settings = (self.temperature, self.drawn, self.hard)
        msg["fn"] = Concrete(relaxation, logits, len(inner.event_shape), *settings)
        if mask is not None:
            msg["fn"] = msg["fn"].mask(mask)


class Concrete(TorchDistribution):
    """The law of v, scored by the density of y."""

    arg_constraints: dict = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, relaxation: Relaxation, logits, event_dim, temperature, drawn, hard):
        self.relaxation, self.logits, self.hard = relaxation, logits, hard
        self.temperature, self._drawn = temperature, drawn
        split = logits.dim() - event_dim
        super().__init__(logits.shape[:split], logits.shape[split:], validate_args=False)

    def expand(self, batch_shape, _instance=None):
        logits = self.logits.expand(torch.Size(batch_shape) + self.event_shape)
        rest = (self.event_dim, self.temperature, self._drawn, self.hard)
        return Concrete(self.relaxation, logits, *rest)

    def rsample(self, sample_shape=()):
        logits = self.logits.expand(self._extended_shape(torch.Size(sample_shape)))
        z = self.relaxation.sample(logits, self.relaxation.noise(logits))
        y = z / self.temperature
        if self.relaxation is not BERNOULLI:
            y = y.log_softmax(-1)
        info = torch.finfo(y.dtype)
        value = self.relaxation.relax(z, self.temperature).clamp(info.tiny, 1 - info.eps)
        if self.hard:
            value = self.relaxation.hard(z) + (value - value.detach())
        self._drawn.add(value, y)
        return value

    def log_prob(self, value):
        y = self._drawn.find(value)
        if y is None:
            y = value.log() if self.relaxation is not BERNOULLI else value.logit()
        t = self.logits - self.temperature * y
        log_temperature = math.log(self.temperature)
        if self.relaxation is BERNOULLI:
            log_prob, summed = log_temperature + t - 2 * F.softplus(t), self.event_dim
        else:
            n = t.shape[-1]
            log_prob = t.sum(-1) - n * t.logsumexp(-1)
            log_prob = log_prob + math.lgamma(n) + (n - 1) * log_temperature
            summed = self.event_dim - 1
        return log_prob.flatten(log_prob.dim() - summed).sum(-1) if summed else log_prob
