r"""One bound, three readings.

.. math::

    \mathrm{ELBO}
    = \sum_i \mathbb{E}_q \log p(x_i \mid z) - \sum_s \mathbb{E}_q \log \frac{q(z_s)}{p(z_s)}
    = \mathbb{E}_q \log p(x, z) + \mathbb{H}[q]
    = -(D \ln 2) \cdot \text{bits per dimension}.

Reconstruction less KL; expected log joint plus entropy; and, for discrete data of D
dimensions, the net rate of bits-back coding (Hinton and van Camp 1993; arXiv:1901.04866): the
message costs -log p(x, z) and gives the bits spent on choosing z back.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_factor

from pyro_vi_ext.objective import positive_int
from pyro_vi_ext.progress import progress_bar
from pyro_vi_ext.proposal import Proposal
from pyro_vi_ext.run import Run
from pyro_vi_ext.scoring import Term, check_finite, log_weights, split_mask

__all__ = ["ElboTerms", "Mean", "elbo_terms"]


@dataclass(frozen=True)
class Mean:
    """A Monte-Carlo mean in nats and its standard error; ``float()`` is the value."""

    value: float
    standard_error: float

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"{self.value:.6g} +- {self.standard_error:.2g}"

    @staticmethod
    def of(draws: torch.Tensor) -> Mean:
        return Mean(float(draws.mean()), float(draws.std()) / len(draws) ** 0.5)


@dataclass(frozen=True, eq=False)
class ElboTerms:
    r"""What :func:`elbo_terms` returns, in nats, scaled to all data.

    :ivar elbo: the bound.
    :ivar reconstruction: expected log-likelihood of each observed site (and ``pyro.factor``).
    :ivar kl: :math:`\mathbb{E}_q[\log q(z_s) - \log p(z_s)]` of each latent, given its
        ancestors. Latents whose guide has only a joint density share an entry, ``"a, b"``.
    :ivar expected_log_joint: :math:`\mathbb{E}_q \log p(x, z)`.
    :ivar entropy: :math:`-\mathbb{E}_q \log q(z)`, relative to the latents' base measure.
    :ivar num_dims: D, the number of observed values that are not masked, scaled like the bound.
    """

    elbo: Mean
    reconstruction: dict[str, Mean]
    kl: dict[str, Mean]
    expected_log_joint: Mean
    entropy: Mean
    num_dims: float

    @property
    def bits_per_dim(self) -> float:
        """-ELBO / (D ln 2). A code length if the data are discrete; a density's, otherwise."""
        return -self.elbo.value / (self.num_dims * math.log(2))

    def __str__(self) -> str:
        rows = [("ELBO", self.elbo)]
        rows += [(f"+ reconstruction of {name}", v) for name, v in self.reconstruction.items()]
        rows += [(f"- KL of {name}", value) for name, value in self.kl.items()]
        rows += [("= expected log joint", self.expected_log_joint), ("  + entropy", self.entropy)]
        lines = [f"{name:<32}{v.value:>14.4f} +- {v.standard_error:.2g} nats" for name, v in rows]
        lines.append(f"{'bits per dimension':<32}{self.bits_per_dim:>14.4f}")
        return "\n".join(lines)


def elbo_terms(
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
) -> ElboTerms:
    r"""The ELBO of a guide taken apart, each part with its Monte-Carlo standard error.

    The equations are those of the module docstring. All parts come from the same draws, so the
    readings agree to rounding. Scales (:math:`N/B`, ``poutine.scale``) and masks apply as in
    ``Trace_ELBO``.

    :param model: the model, as given to ``SVI``.
    :param guide: any guide; with mixing variables its density is :math:`h_K`.
    :param args: arguments of model and guide; ``kwargs`` likewise.
    :param num_particles: number of draws, an integer >= 2.
    :param chunk_size: draws in memory at once.
    :param num_mixing_particles: see :func:`~pyro_vi_ext.log_evidence`.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: run a chunk in one plate (default), or one after another.
    :param progress: show a bar: ``None`` on a terminal only, ``True`` always, ``False`` never.
    :returns: an :class:`ElboTerms`; ``print`` it.
    :raises ValueError: for arguments out of range; data or log-probabilities that are NaN or
        infinite; the errors of the objectives. Sites are named.

    References: M. Hoffman and M. Johnson, *ELBO surgery*, 2016; J. Townsend, T. Bird and D. Barber,
    *Practical Lossless Compression with Latent Variables using Bits Back Coding*, ICLR 2019,
    arXiv:1901.04866.

    Example: a bit and what it says about another one.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import elbo_terms
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Bernoulli(0.5))
    ...         pyro.sample("x", dist.Bernoulli(0.1 + 0.8 * z), obs=x)
    >>> x = torch.tensor([1.0, 0.0])
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Bernoulli(0.1 + 0.8 * x))  # the posterior
    >>> terms = elbo_terms(model, guide, x)
    >>> round(terms.elbo.value, 4), round(terms.bits_per_dim, 4)  # log 1/2 per bit: 1 bit
    (-1.3863, 1.0)
    >>> abs(terms.elbo.value - terms.reconstruction["x"].value + terms.kl["z"].value) < 1e-4
    True
    """
    num_particles = positive_int("num_particles", num_particles, 2)
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
    parts: dict[tuple, list] = defaultdict(list)  # (kind, name) -> a value for each draw
    with progress_bar(progress, num_particles, unit="particle") as bar:
        for run, particles in proposal.draws():
            for key, values in _parts(run, particles).items():
                parts[key].append(values)
            bar.update(run.num_particles)
    draws = {key: torch.cat(values) for key, values in parts.items()}
    log_p = sum(values for (kind, _), values in draws.items() if kind != "log q")
    log_q = sum(values for (kind, _), values in draws.items() if kind == "log q")
    kl: dict = defaultdict(float)
    for (kind, name), values in draws.items():
        if kind != "likelihood":
            kl[name] = kl[name] + (values if kind == "log q" else -values)
    return ElboTerms(
        elbo=Mean.of(log_p - log_q),
        reconstruction={n: Mean.of(v) for (kind, n), v in draws.items() if kind == "likelihood"},
        kl={name: Mean.of(values) for name, values in kl.items()},
        expected_log_joint=Mean.of(log_p),
        entropy=Mean.of(-log_q),
        num_dims=_num_dims(run, particles[0]),
    )


def _parts(run: Run, particles: list[list[Term]]) -> dict[tuple[str, str], torch.Tensor]:
    """(kind, name) -> shape (draws,): terms summed over their plates, with their scales."""
    names = _names(run, particles[0])
    result: dict = {}
    for copies in zip(*particles, strict=True):  # the same site in each pair
        term = copies[0]
        kind = "log q" if term.sign < 0 else "likelihood"
        if term.sign > 0 and not term.site["is_observed"]:
            kind = "prior"
        scaled = [[replace(t, log_prob=t.log_prob * t.scale, sign=+1)] for t in copies]
        key = kind, names.get(term.name, term.name)
        values = log_weights(scaled, {}, run).reshape(run.num_particles)
        result[key] = result.get(key, 0.0) + values
    total = sum(float(values.sum()) for values in result.values())
    check_finite(total, [term for row in particles for term in row])
    return result


def _names(run: Run, terms: list[Term]) -> dict[str, str]:
    """Term -> the latents it stands for, "a, b" if the guide has no density for each alone."""
    roles = run.roles
    latents = [t.name for t in terms if t.sign > 0 and not t.site["is_observed"]]
    groups: list[tuple[set, set]] = []  # terms, and the latents they stand for
    for term in terms:
        sources = roles.given_mixing() if term.site is None else (term.name,)  # None: h_K
        owned = {n for name in sources for n in (name, *roles.delta_children(name))}
        owned &= set(latents)
        joined = [group for group in groups if group[1] & owned]
        groups = [group for group in groups if not group[1] & owned]
        groups.append(
            (
                {term.name}.union(*(names for names, _ in joined)),
                owned.union(*(others for _, others in joined)),
            )
        )
    labels = [(names, ", ".join(n for n in latents if n in owned)) for names, owned in groups]
    return {name: label or name for names, label in labels for name in names}


def _num_dims(run: Run, terms: list[Term]) -> float:
    """Observed values that are not masked, each counted with its scale."""
    total = 0.0
    for term in terms:
        if term.sign < 0 or not term.site["is_observed"] or site_is_factor(term.site):
            continue
        count = torch.ones_like(term.log_prob)
        if run.vectorized and count.dim() >= -run.particle_dim:
            count = count[0]
        mask = split_mask(term.site)[1]
        event = term.site["fn"].event_shape.numel()
        total += float((scale_and_mask(count, 1.0, mask) * term.scale).sum()) * event
    return total
