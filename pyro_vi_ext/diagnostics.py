r"""Is my guide any good? Diagnostics per unit, where a global one hides everything.

.. math::

    \log w_{k,u} = \log p(x_u, z_{k,u}) - \log q(z_{k,u} \mid x_u), \qquad
    \mathrm{gap}_u = \log \tfrac1K \sum_k w_{k,u} - \tfrac1K \sum_k \log w_{k,u}.

The weight of all :math:`N` units together is a product, whose tail grows with :math:`N`: of a guide
0.018 nats per datum away from the posterior (13% too narrow) the global Pareto :math:`\hat k` is
0.8 at :math:`N = 100` and 2.3 at :math:`N = 1000`, and of one 0.003 nats away it is 0.8 at
:math:`N = 1000`. The units' own stay below 0.7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_ext.objective import positive_int
from pyro_vi_ext.progress import progress_bar
from pyro_vi_ext.proposal import Proposal, by_plate

__all__ = ["GuideReport", "guide_report"]


@dataclass(eq=False)
class GuideReport:
    r"""What :func:`guide_report` returns; u runs over the units, one dimension for each plate.

    :ivar pareto_k: :math:`\hat k_u` of the unit's weights: below 0.7 they can be averaged;
        ``-inf`` if the largest are equal (an exact posterior, discrete latents).
    :ivar ess: effective sample size, in draws of K; K at the exact posterior.
    :ivar elbo: the unit's ELBO, nats.
    :ivar elbo_standard_error: its Monte-Carlo standard error.
    :ivar iwae: the unit's K-sample bound, nats.
    :ivar gap: ``iwae - elbo``: a lower estimate of KL(q || p), nats.
    :ivar global_pareto_k: of the product of the weights of all units that were drawn.
    :ivar global_ess: of that product.
    :ivar plates: names of the plates of the units, left to right.
    :ivar num_particles: K.
    """

    pareto_k: Tensor
    ess: Tensor
    elbo: Tensor
    elbo_standard_error: Tensor
    iwae: Tensor
    gap: Tensor
    global_pareto_k: float
    global_ess: float
    plates: tuple[str, ...]
    num_particles: int

    def worst(self, num: int = 10, by: str = "pareto_k") -> list[tuple[int, ...]]:
        """Indices of the units with the largest ``"pareto_k"`` or ``"gap"``, worst first.

        Of units with the same k (infinite, say) those with the larger gap come first. An index has
        one entry for each plate; under subsampling it counts within the minibatch.
        """
        if by not in ("pareto_k", "gap"):
            raise ValueError(f"by must be 'pareto_k' or 'gap', got {by!r}.")
        gap, first = self.gap.flatten(), getattr(self, by).flatten()
        order = gap.argsort(descending=True, stable=True)
        order = order[first[order].argsort(descending=True, stable=True)][:num]
        return [tuple(int(i) for i in torch.unravel_index(u, self.gap.shape)) for u in order]

    def __str__(self) -> str:
        k, total = self.pareto_k.flatten(), self.pareto_k.numel()
        units = " x ".join(f"{n} '{p}'" for n, p in zip(self.gap.shape, self.plates, strict=True))
        lines = [
            f"Guide report: {units or 'the whole model is one unit'}, {self.num_particles} draws",
            f"  Pareto k       good (<= 0.7) {int((k <= 0.7).sum())}   "
            f"bad (0.7 to 1) {int(((k > 0.7) & (k <= 1)).sum())}   "
            f"very bad (> 1) {int((k > 1).sum())}   of {total}",
            f"  global         k = {self.global_pareto_k:.2f}, ESS = {self.global_ess:.1f}",
            f"  ESS            {self._quantiles(self.ess)}",
            f"  gap to IWAE    {self._quantiles(self.gap)} nats",
        ]
        if total > 1:
            lines.append("  worst units    k      ESS      gap")
            for index in self.worst(5):
                row = (self.pareto_k[index], self.ess[index], self.gap[index])
                label = ", ".join(map(str, index))
                lines.append("  {:<13}{:6.2f}{:9.1f}{:9.4f}".format(label, *map(float, row)))
        return "\n".join(lines)

    @staticmethod
    def _quantiles(values: Tensor) -> str:
        low, middle, high = (float(f(values)) for f in (torch.min, torch.median, torch.max))
        if values.numel() == 1:
            return f"{middle:.4g}"
        return f"median {middle:.4g}, from {low:.4g} to {high:.4g}"


def guide_report(
    model,
    guide,
    *args,
    num_particles: int = 1000,
    chunk_size: int = 100,
    num_mixing_particles: int = 100,
    max_plate_nesting: float = float("inf"),
    vectorize_particles: bool = True,
    progress: bool | None = None,
    **kwargs,
) -> GuideReport:
    r"""Compare a guide with the posterior, unit by unit and as a whole.

    For each unit u (one datum, for a model with local latents only) the Pareto :math:`\hat k` and
    the effective sample size of the weights of the module docstring, the ELBO, the K-sample bound,
    and the gap between the two; and :math:`\hat k` of the product of all weights, which is what
    ``numpyro.infer`` and ``pyro.infer.importance.psis_diagnostic`` report. A small :math:`\hat k`
    says that the guide can be corrected by its weights; a small gap, that there is little to
    correct. Neither sees what the guide never proposes (a missed mode).

    :param model: the model, as given to ``SVI``.
    :param guide: the fitted guide; with mixing variables its density is :math:`h_K`.
    :param args: arguments of model and guide; ``kwargs`` likewise.
    :param num_particles: K, an integer >= 25 (fewer draws have no tail to fit).
    :param chunk_size: particles in memory at once.
    :param num_mixing_particles: see :func:`~pyro_vi_ext.log_evidence`.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: run a chunk in one plate (default), or one after another.
    :param progress: show a bar: ``None`` on a terminal only, ``True`` always, ``False`` never.
    :returns: a :class:`GuideReport`; ``print`` it.
    :raises ValueError: as :func:`~pyro_vi_ext.log_evidence`.

    Reference: A. Vehtari et al., *Pareto Smoothed Importance Sampling*, JMLR 2024,
    arXiv:1507.02646; Y. Yao et al., *Yes, but Did It Work?: Evaluating Variational Inference*,
    ICML 2018, arXiv:1802.02538.

    Example: a guide that is too narrow for one of three data.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import guide_report
    >>> x = torch.tensor([0.0, 1.0, 2.0])
    >>> def model():
    ...     with pyro.plate("data", 3):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide():
    ...     with pyro.plate("data", 3):
    ...         pyro.sample("z", dist.Normal(x / 2, torch.tensor([0.7, 0.2, 0.7])))
    >>> _ = torch.manual_seed(0)
    >>> report = guide_report(model, guide)
    >>> report.worst(1), (report.pareto_k > 0.7).tolist()
    ([(1,)], [False, True, False])
    """
    num_particles = positive_int("num_particles", num_particles, 25)
    proposal = Proposal(
        model,
        guide,
        args,
        kwargs,
        num_particles=num_particles,
        chunk_size=chunk_size,
        num_mixing_particles=num_mixing_particles,
        max_plate_nesting=max_plate_nesting,
        vectorize_particles=vectorize_particles,
    )
    per_unit, whole = proposal.summary(), proposal.summary()
    with progress_bar(progress, num_particles, unit="particle") as bar:
        for chunk in proposal.chunks():
            per_unit.add(by_plate(chunk.log_w, chunk.plates, lead=1))
            whole.add(chunk.log_w.reshape(len(chunk.log_w), -1).sum(1))
            bar.update(len(chunk.log_w))
    frames = sorted(chunk.plates.values(), key=lambda frame: frame.dim)
    return GuideReport(
        pareto_k=per_unit.pareto_k,
        ess=per_unit.ess,
        elbo=per_unit.mean_log,
        elbo_standard_error=per_unit.mean_log_se,
        iwae=per_unit.log_mean,
        gap=per_unit.log_mean - per_unit.mean_log,
        global_pareto_k=float(whole.pareto_k),
        global_ess=float(whole.ess),
        plates=tuple(frame.name for frame in frames),
        num_particles=num_particles,
    )
