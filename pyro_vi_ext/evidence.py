r"""Estimates of the evidence that say how far they can be trusted.

.. math::

    \log \hat p(x_u) = \log \frac{1}{K} \sum_{k=1}^K w_{k,u}, \qquad
    \mathbb{E}\, w_{k,u} = p(x_u).

The weights come from importance sampling with a guide or the prior, or from annealed importance
sampling (physics/9803008). Their standard error, their effective sample size and the Pareto
:math:`\hat k` of their tail (1507.02646) tell whether the average has settled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_ext.annealed import annealed_log_weights
from pyro_vi_ext.objective import positive_int
from pyro_vi_ext.progress import progress_bar
from pyro_vi_ext.proposal import GroupedSummary, Proposal, by_plate

__all__ = ["Evidence", "log_evidence"]


@dataclass(eq=False)
class Evidence:
    r"""What :func:`log_evidence` returns; u runs over the units, one dimension for each plate.

    :ivar log_evidence: :math:`\log \hat p(x_u)`, nats. Below :math:`\log p(x_u)` in expectation.
    :ivar standard_error: its standard error (delta method), nats; means little if k > 0.7.
    :ivar log_evidence_psis: the same with Pareto-smoothed weights: less variable, slightly biased.
    :ivar elbo: the mean log-weight; with a guide, its ELBO; nats.
    :ivar ess: effective sample size, in draws of K.
    :ivar pareto_k: shape of the tail of the weights; above 0.7 do not trust the estimate, ``-inf``
        if the largest weights are equal (an exact posterior, discrete latents), ``inf`` with
        too few draws (25 have a tail).
    :ivar scale: scale of each unit, :math:`N/B` under subsampling.
    :ivar plates: names of the plates of the units, left to right; empty if the whole model is one.
    :ivar num_particles: K.
    :ivar method: ``"importance"`` or ``"ais"``.
    :ivar acceptance: ``"ais"`` only: mean acceptance probability of each unit.
    """

    log_evidence: Tensor
    standard_error: Tensor
    log_evidence_psis: Tensor
    elbo: Tensor
    ess: Tensor
    pareto_k: Tensor
    scale: float | Tensor
    plates: tuple[str, ...]
    num_particles: int
    method: str
    acceptance: Tensor | None = None

    @property
    def total(self) -> float:
        """The log evidence of all data: the scaled sum over units, nats."""
        return float((self.log_evidence * self.scale).sum())

    @property
    def total_standard_error(self) -> float:
        """Monte-Carlo standard error of :attr:`total`; that of a drawn minibatch is not in it."""
        return float((self.standard_error * self.scale).square().sum().sqrt())

    def __float__(self) -> float:
        return self.total

    def __repr__(self) -> str:
        units = " x ".join(f"{n} '{p}'" for n, p in zip(self.ess.shape, self.plates, strict=True))
        bad = int((self.pareto_k > 0.7).sum())
        return (
            f"Evidence(total={self.total:.6g} +- {self.total_standard_error:.2g} nats, "
            f"units={units or 'the whole model'}, num_particles={self.num_particles}, "
            f"method={self.method!r}, ess={float(self.ess.min()):.4g} to "
            f"{float(self.ess.max()):.4g}, pareto_k > 0.7 in {bad} of {self.pareto_k.numel()})"
        )


def log_evidence(
    model,
    guide,
    *args,
    num_particles: int = 5000,
    chunk_size: int = 100,
    method: str = "importance",
    num_temperatures: int = 1000,
    num_leapfrog_steps: int = 10,
    num_mixing_particles: int = 100,
    max_plate_nesting: float = float("inf"),
    vectorize_particles: bool = True,
    progress: bool | None = None,
    **kwargs,
) -> Evidence:
    r"""Estimate log p(x) of each unit, with its standard error and diagnostics.

    .. math::

        \log \hat p(x_u) = \log \frac{1}{K} \sum_{k=1}^K w_{k,u}, \qquad
        w_{k,u} = \frac{p(x_u, z_{k,u})}{q(z_{k,u} \mid x_u)},

    with units u as in :class:`~pyro_vi_ext.ImportanceWeightedELBO`: one datum, for a model with
    local latents only. Terms are unscaled and masks applied; :attr:`Evidence.total` is the scaled
    sum. Under subsampling one minibatch is drawn, for all particles. Memory does not grow with
    ``num_particles``: ``chunk_size`` draws of all units, and per unit the :math:`3 \sqrt K`
    largest weights.

    ``method="ais"`` anneals from the prior to the posterior in ``num_temperatures`` steps of
    Hamiltonian Monte Carlo, for continuous latents, at (``num_leapfrog_steps`` + 1) gradients
    a step and particle; its weights stay even where no draw of the prior hits the posterior. A
    hundred particles are plenty. The guide is not used.

    :param model: the model, as given to ``SVI``.
    :param guide: proposes the latents; sites need not be reparameterised. ``None``: the prior.
    :param args: arguments of model and guide; ``kwargs`` likewise.
    :param num_particles: K, an integer >= 2.
    :param chunk_size: particles in memory at once.
    :param method: ``"importance"`` or ``"ais"``.
    :param num_temperatures: ``"ais"``: number of intermediate distributions.
    :param num_leapfrog_steps: ``"ais"``: length of a trajectory.
    :param num_mixing_particles: K of :math:`h_K` for guides with mixing variables (see
        :class:`~pyro_vi_ext.SemiImplicitELBO`); the estimate stays a lower bound in expectation.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: run a chunk in one plate (default), or one after another.
    :param progress: show a bar: ``None`` on a terminal only, ``True`` always, ``False`` never.
    :returns: an :class:`Evidence`; tensors on the device of the model, without gradient.
    :raises ValueError: for arguments out of range; a subsampled plate beside a global latent;
        weights that are NaN or ``+inf``; the errors of the objectives. Sites are named.
    :raises NotImplementedError: ``"ais"`` with discrete latents.
    :raises ImportError: ``progress=True`` without tqdm.

    References: Y. Burda, R. Grosse and R. Salakhutdinov, arXiv:1509.00519; A. Vehtari et al.,
    arXiv:1507.02646; R. Neal, arXiv:physics/9803008; Y. Wu et al., arXiv:1611.04273.

    Example: three data with a latent each, proposed from the prior.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import log_evidence
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> x = torch.tensor([0.0, 1.0, 2.0])
    >>> _ = torch.manual_seed(0)
    >>> estimate = log_evidence(model, None, x)
    >>> estimate.log_evidence.shape, estimate.plates
    (torch.Size([3]), ('data',))
    >>> exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    >>> bool(((estimate.log_evidence - exact).abs() < 4 * estimate.standard_error).all())
    True
    >>> bool((estimate.pareto_k < 0.7).all())
    True
    """
    num_particles = positive_int("num_particles", num_particles, 2)
    if method not in ("importance", "ais"):
        raise ValueError(f"method must be 'importance' or 'ais', got {method!r}.")
    options = {
        "num_particles": num_particles,
        "chunk_size": chunk_size,
        "max_plate_nesting": max_plate_nesting,
        "vectorize_particles": vectorize_particles,
    }
    acceptance = None
    if method == "importance":
        proposal = Proposal(
            model, guide, args, kwargs, num_mixing_particles=num_mixing_particles, **options
        )
        summary = proposal.summary()
        with progress_bar(progress, num_particles, unit="particle") as bar:
            for chunk in proposal.chunks():
                summary.add(by_plate(chunk.log_w, chunk.plates, lead=1))
                bar.update(len(chunk.log_w))
    else:
        summary, acceptance = GroupedSummary(num_particles), 0.0
        with progress_bar(progress, 0, unit="transition") as bar:
            chunks = annealed_log_weights(
                model,
                args,
                kwargs,
                num_temperatures=num_temperatures,
                num_leapfrog_steps=num_leapfrog_steps,
                progress=bar.reach,
                **options,
            )
            for chunk in chunks:
                summary.add(by_plate(chunk.log_weights, chunk.plates, lead=1))
                share = len(chunk.log_weights) / num_particles
                acceptance = acceptance + by_plate(chunk.acceptance, chunk.plates) * share
    scale = chunk.scale
    if torch.is_tensor(scale) and scale.dim():
        scale = by_plate(scale, chunk.plates)
    frames = sorted(chunk.plates.values(), key=lambda frame: frame.dim)
    return Evidence(
        log_evidence=summary.log_mean,
        standard_error=summary.log_mean_se,
        log_evidence_psis=summary.log_mean_psis,
        elbo=summary.mean_log,
        ess=summary.ess,
        pareto_k=summary.pareto_k,
        scale=scale,
        plates=tuple(frame.name for frame in frames),
        num_particles=num_particles,
        method=method,
        acceptance=acceptance,
    )
