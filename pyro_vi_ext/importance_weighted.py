r"""Importance-weighted variational inference (Burda, Grosse and Salakhutdinov 2016, 1509.00519).

.. math::

    \log w_{k,u} = \log p(x_u, z_{k,u}) - \log q(z_{k,u} \mid x_u), \qquad
    L = \sum_u s_u L_u, \quad L_u = \log \frac{1}{K} \sum_{k=1}^K w_{k,u}
    \le \log p(x_u) \text{ in expectation}.

With :math:`\tilde w_k = w_k / \sum_l w_l`, detached like every factor in front of a bracket, and
:math:`L_{-k}` the bound in which the geometric mean of the other weights replaces :math:`w_k`
(VIMCO, 1602.06725), each estimator is the gradient of a surrogate, here for one unit, whose draws
are :math:`z` (reparameterised) and :math:`b` (not):

.. math::

    \text{pathwise:}\quad & \sum_k \tilde w_k \log w_k + (L - L_{-k}) \log q(b_k) \\
    \text{STL:}\quad & \sum_k \tilde w_k [\log w_k + \log q(\bar z_k)] + (L - L_{-k}) \log q(b_k) \\
    \text{DReG:}\quad & \sum_k \tilde w_k [\log w'_k + \log q(\bar z_k, \bar b_k)]
        + (L - L_{-k} - \tilde w_k + \tfrac1K) \log q(b_k).

:math:`\bar z` is a detached draw. :math:`w'` is scored at copies of the draws whose backward pass
multiplies by :math:`\tilde w_k`, so that all that goes through a draw has weight
:math:`\tilde w_k^2`, the model's own parameters have :math:`\tilde w_k`, and the density's own have
none (1810.04152). The gradient of :math:`\log q(b_k)` reaches the draws that :math:`b_k` depends
on. Its :math:`1/K` has mean zero; with it every term vanishes where the guide is the exact
posterior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pyro_vi_ext.chunks import ChunkedEstimate
from pyro_vi_ext.has_values import has_values
from pyro_vi_ext.objective import Estimate, Objective, positive_int
from pyro_vi_ext.paths import Paths
from pyro_vi_ext.run import Run
from pyro_vi_ext.score_function import score_bound, score_terms
from pyro_vi_ext.scoring import Scored, linear_bound, log_weights, pair_terms, units
from pyro_vi_ext.sticking_the_landing import stl_bound

__all__ = ["ImportanceWeightedELBO", "Weights"]


class ImportanceWeightedELBO(Objective):
    r"""The importance-weighted bound, per unit, with the gradient estimator of your choice.

    .. math:: \mathrm{loss} = -\sum_u s_u \log \frac{1}{K} \sum_{k=1}^K
        \frac{p(x_u, z_{k,u})}{q(z_{k,u} \mid x_u)},

    in nats. A unit u is one element of the plates common to all sites (a datum, for a model with
    local latents only; the whole model, if it has a global latent), and :math:`s_u` is its scale,
    :math:`N/B` under subsampling, which multiplies the logarithm. In expectation the bound is
    below the evidence, rises with K, and does not depend on the size of the minibatch.

    ==============  =====================================================================
    ``gradient``    of the reparameterised draws
    ==============  =====================================================================
    ``"pathwise"``  the plain derivative; its signal-to-noise ratio for the guide falls as
                    :math:`1/\sqrt K` (1802.04537)
    ``"dreg"``      doubly reparameterised: unbiased, its signal-to-noise ratio rises with K
    ``"stl"``       the density's own term dropped: biased for K > 1, unbiased for K = 1
    ==============  =====================================================================

    Draws without ``rsample`` (discrete ones) get the score-function gradient with VIMCO's
    leave-one-out baseline in each case, also mixed with reparameterised draws in one guide. K = 1
    is the ELBO: it has no baseline, takes any mixture of global and subsampled local
    latents, and ``"dreg"`` is then ``"stl"``.

    With ``chunk_size`` the memory of a step is that of ``chunk_size`` particles for any K: a first
    pass without gradients finds the weights, a second draws the same particles again, chunk by
    chunk, for the weighted gradient, which is exact. It costs a second forward pass (a third, if
    the loss is differentiated by ``differentiable_loss`` or the module).

    :param num_particles: K. An integer >= 1.
    :param gradient: ``"pathwise"``, ``"stl"`` or ``"dreg"``.
    :param chunk_size: number of particles in memory at once; ``None`` for all. The draws are those
        of the unchunked run only if all particles fit into one chunk.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: see :class:`~pyro_vi_ext.objective.Objective`.
    :raises ValueError: for arguments out of range; for K > 1, sites of one unit with
        different scales (a subsampled plate beside a global latent: no such bound exists); for
        STL and DReG, a guide that has other densities when run again at its draws (dropout).
    :raises NotImplementedError: for a guide with mixing variables; for STL and DReG, a flow
        that cannot be scored at given draws (planar, radial, Sylvester). Sites are named.

    References: Y. Burda, R. Grosse and R. Salakhutdinov, *Importance Weighted Autoencoders*, ICLR
    2016, arXiv:1509.00519. G. Tucker, D. Lawson, S. Gu and C. Maddison, *Doubly Reparameterized
    Gradient Estimators for Monte Carlo Objectives*, ICLR 2019, arXiv:1810.04152. A. Mnih and D.
    Rezende, *Variational Inference for Monte Carlo Objectives*, ICML 2016, arXiv:1602.06725.

    Example: ten data with a latent each. The bound climbs to the evidence, for whole data and for
    minibatches alike.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import ImportanceWeightedELBO
    >>> x = torch.linspace(-2.0, 2.0, 10)
    >>> def model(x, batch):
    ...     with pyro.plate("data", len(x), subsample_size=batch) as i:
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])
    >>> def guide(x, batch):
    ...     with pyro.plate("data", len(x), subsample_size=batch):
    ...         pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> _ = torch.manual_seed(0)
    >>> for K in (1, 10, 1000):
    ...     loss = ImportanceWeightedELBO(num_particles=K).loss
    ...     bounds = [[-loss(model, guide, x, batch) for _ in range(200)] for batch in (10, 2)]
    ...     print(K, [round(sum(b) / 200, 1) for b in bounds])
    1 [-22.6, -22.3]
    10 [-17.0, -17.1]
    1000 [-16.7, -16.7]
    >>> round(dist.Normal(0.0, 2**0.5).log_prob(x).sum().item(), 1)
    -16.7
    """

    def __init__(
        self,
        num_particles: int = 10,
        gradient: str = "pathwise",
        chunk_size: int | None = None,
        *,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ):
        super().__init__(
            num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        if gradient not in ("pathwise", "stl", "dreg"):
            raise ValueError(f"gradient must be 'pathwise', 'stl' or 'dreg', got {gradient!r}.")
        if chunk_size is not None:
            chunk_size = positive_int("chunk_size", chunk_size)
        self.gradient = gradient
        self.chunk_size = chunk_size

    def _run(self, *args, **options) -> Run:
        paths = None
        if self.gradient != "pathwise" and torch.is_grad_enabled():
            paths = Paths(copies=self.gradient == "dreg" and self.num_particles > 1)
        return super()._run(*args, paths=paths, **options)

    def _evaluate(self, model, guide, args, kwargs) -> Estimate:
        if self.chunk_size is None or self.chunk_size >= self.num_particles:
            return super()._evaluate(model, guide, args, kwargs)
        if not has_values(torch.empty(())):
            raise NotImplementedError(
                "chunk_size draws the same random numbers twice, which a compiled step cannot do. "
                "Leave chunk_size out, or take plain steps with it."
            )
        return ChunkedEstimate(self, model, guide, args, kwargs)

    def estimate(self, run: Run) -> Estimate:
        scored, particles = self.score(run)
        terms = [term for row in particles for term in row]
        if self.num_particles == 1:
            bound = linear_bound(terms, run)
            if not torch.is_grad_enabled():
                return Estimate(-bound, terms=terms)
            extra = score_bound(run, particles, _drawn(run))
            if run.paths is not None:
                extra = extra + stl_bound(run, scored)
            return Estimate(-bound, -(bound + extra), terms)
        plates, scale = units(particles, run)
        log_w = log_weights(particles, plates, run)
        if run.paths is None and not any(score_terms(trace) for trace in _drawn(run)):
            per_unit = torch.logsumexp(log_w, 0) - math.log(self.num_particles)
            return Estimate(-(per_unit * scale).sum(), terms=terms)
        weights = self.weights(log_w)
        loss = -(weights.bound * scale).sum()
        if not torch.is_grad_enabled():
            return Estimate(loss, terms=terms)
        return Estimate(loss, -self.surrogate(run, scored, log_w, weights, plates, scale), terms)

    @staticmethod
    def score(run: Run) -> tuple[list[Scored], list[list]]:
        """The scores of each pair of a run, and its terms."""
        scored = [pair_terms(run, pair) for pair in run.pairs]
        return scored, [[*part.model, *part.guide.values()] for part in scored]

    @staticmethod
    def weights(log_w: torch.Tensor) -> Weights:
        """What is known of all K weights, from their logarithms."""
        return Weights.of(log_w)

    def surrogate(self, run, scored, log_w, weights: Weights, plates, scale) -> torch.Tensor:
        """The scalar whose gradient estimates that of the bound; see the module docstring.

        :param log_w: log-weights of the run, shape (particles, \\*units), with gradients.
        :param weights: the same particles' part of what is known of all K weights.
        """
        normalised = weights.normalised
        total = normalised * log_w
        signal = weights.signal
        if run.paths is not None and self.gradient == "stl":
            log_q = run.paths.log_q_at_detached(run, scored, reparameterized_only=True, masked=True)
            total = total + normalised * _sum(log_q, plates, run)
        if run.paths is not None and self.gradient == "dreg":
            run.paths.weigh(normalised)
            log_q = run.paths.log_q_at_detached(
                run, scored, reparameterized_only=False, masked=False
            )
            total = total + normalised * _sum(log_q, plates, run)
            signal = signal - normalised + 1 / self.num_particles
        log_q = [score_terms(trace) for trace in _drawn(run)]
        total = total + signal * _sum(log_q, plates, run)
        return (total.sum(0) * scale).sum()


def _drawn(run: Run) -> list:
    """The guide's traces as drawn."""
    return [pair.guide for pair in run.pairs] if run.paths is None else run.paths.drawn


def _sum(particles: list[list], plates: dict, run: Run) -> torch.Tensor | float:
    return log_weights(particles, plates, run) if particles[0] else 0.0


@dataclass
class Weights:
    r"""What the estimators need to know of all K weights; detached, in nats.

    :ivar bound: :math:`L_u`, shape (\*units).
    :ivar normalised: :math:`\tilde w_{k,u}`, shape (K, \*units).
    :ivar signal: :math:`L_u - L_{-k,u}`, shape (K, \*units).
    """

    bound: torch.Tensor
    normalised: torch.Tensor
    signal: torch.Tensor

    @staticmethod
    def of(log_w: torch.Tensor) -> Weights:
        """
        :param log_w: shape (K, \\*units), K >= 2.
        """
        log_w = log_w.detach()
        num = log_w.shape[0]
        total = torch.logsumexp(log_w, 0)
        others = _without_each(torch.logcumsumexp, torch.logaddexp, log_w, -math.inf)
        mean_of_others = _without_each(torch.cumsum, torch.add, log_w, 0.0) / (num - 1)
        return Weights(
            bound=total - math.log(num),
            normalised=(log_w - total).exp(),
            signal=total - torch.logaddexp(others, mean_of_others),
        )

    def slice(self, start: int, stop: int) -> Weights:
        """The part of some particles."""
        return Weights(self.bound, self.normalised[start:stop], self.signal[start:stop])


def _without_each(cumulate, combine, values: torch.Tensor, neutral: float) -> torch.Tensor:
    """The total of all entries but one along dimension 0, for each one, without subtraction."""
    edge = torch.full_like(values[:1], neutral)
    before = torch.cat([edge, cumulate(values[:-1], 0)])
    after = torch.cat([cumulate(values[1:].flip(0), 0).flip(0), edge])
    return combine(before, after)
