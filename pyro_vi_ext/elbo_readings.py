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
from torch import Tensor

from pyro_vi_ext.objective import positive_int
from pyro_vi_ext.progress import progress_bar
from pyro_vi_ext.proposal import Proposal, blame
from pyro_vi_ext.run import Run
from pyro_vi_ext.scoring import Term, log_weights, split_mask

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
    def of(draws: Tensor, groups: list[int] | None = None) -> Mean:
        """:param groups: sizes of groups of draws, if those within one depend on each other."""
        means = draws
        if groups is not None:
            means = torch.stack([group.mean() for group in draws.split(groups)])
        return Mean(float(draws.mean()), float(means.std()) / len(means) ** 0.5)


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
        """-ELBO / (D ln 2). A code length if the data are discrete; a density's, otherwise.

        NaN if no value is observed.
        """
        return -self.elbo.value / (self.num_dims * math.log(2)) if self.num_dims else math.nan

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
    parts: dict[tuple[str, str], Tensor] = {}  # (kind, name) -> a value for each draw
    done = 0
    with progress_bar(progress, num_particles, unit="particle") as bar:
        for run, particles in proposal.draws():
            for key, values in _parts(run, particles).items():
                row = parts.setdefault(key, values.new_zeros(num_particles))
                row[done : done + len(values)] = values
            done += run.num_particles
            bar.update(run.num_particles)

    def total(kind: str) -> Tensor:
        rows = [values for (k, _), values in parts.items() if k == kind]
        return sum(rows, torch.zeros(())).expand(num_particles)

    groups = proposal.sizes if proposal.shares_noise else None
    kl = defaultdict(float)
    for (kind, name), values in parts.items():
        if kind in ("log q", "prior"):
            kl[name] = kl[name] + (values if kind == "log q" else -values)
    data = {name: values for (kind, name), values in parts.items() if kind == "likelihood"}
    log_p, log_q = total("likelihood") + total("prior"), total("log q")
    return ElboTerms(
        elbo=Mean.of(log_p - log_q, groups),
        reconstruction={name: Mean.of(values, groups) for name, values in data.items()},
        kl={name: Mean.of(values, groups) for name, values in kl.items()},
        expected_log_joint=Mean.of(log_p, groups),
        entropy=Mean.of(-log_q, groups),
        num_dims=float(total("dims").mean()),
    )


def _parts(run: Run, particles: list[list[Term]]) -> dict[tuple[str, str], Tensor]:
    """(kind, name) -> shape (draws,): sums over the plates, with their scales; 0 if not sampled."""
    result: dict = {}
    for i, terms in enumerate(particles):
        row = slice(None) if run.vectorized else slice(i, i + 1)
        names = _names(run, terms)
        for term in terms:
            kind, name = _kind(term), names.get(term.name, term.name)
            scored = {kind: term.log_prob}
            if kind == "likelihood" and not site_is_factor(term.site):
                scored["dims"] = _dims(term)
            for kind, values in scored.items():
                scaled = replace(term, log_prob=values * term.scale, sign=+1)
                values = log_weights([[scaled]], {}, run).reshape(run.num_particles)
                sums = result.setdefault((kind, name), torch.zeros_like(values))
                sums[row] += values[row]
    if not all(bool(values.isfinite().all()) for values in result.values()):
        blame([term for terms in particles for term in terms])
    return result


def _kind(term: Term) -> str:
    if term.sign < 0:
        return "log q"
    return "likelihood" if term.site["is_observed"] else "prior"


def _dims(term: Term) -> Tensor:
    """Number of values in each element of an observed site's batch; 0 where it is masked."""
    event = term.site["fn"].event_shape.numel()
    return scale_and_mask(torch.full_like(term.log_prob, event), 1.0, split_mask(term.site)[1])


def _names(run: Run, terms: list[Term]) -> dict[str, str]:
    """Term -> the latents it stands for, "a, b" if the guide has no density for each alone."""
    roles = run.roles
    latents = [term.name for term in terms if _kind(term) == "prior"]
    owned = {}
    for term in terms:
        sources = roles.given_mixing() if term.site is None else (term.name,)  # None: h_K
        reached = {n for name in sources for n in (name, *roles.delta_children(name))}
        owned[term.name] = reached.intersection(latents)
    groups: list[set] = []
    for mine in owned.values():
        joined = [group for group in groups if group & mine]
        groups = [group for group in groups if not group & mine] + [mine.union(*joined)]
    labels = {n: ", ".join(m for m in latents if m in group) for group in groups for n in group}
    return {name: labels[min(mine)] for name, mine in owned.items() if mine}
