r"""The objective of vector-quantised guides (van den Oord et al. 2017, arXiv:1711.00937).

.. math::

    \mathrm{loss} = -\log p(x \mid z) + \mathrm{KL}
        + \sum_u s_u \big( \lVert \mathrm{sg}[z_e] - e_k \rVert^2
        + \beta \lVert z_e - \mathrm{sg}[e_k] \rVert^2 \big)_u,
    \qquad z = e_k, \quad \mathrm{KL} = -\sum_u s_u \log p(z_u).

The first two terms are a negative ELBO. (The paper's eq. (3) adds log p(x|z) to the penalties; as a
loss it needs the other sign.) The KL is constant for a uniform prior, and the paper leaves it out;
here it stays, so that the model has a bound.
"""

from __future__ import annotations

import math
import numbers
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import pyro
import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor

from pyro_vi_ext.code_sites import VectorQuantized, code_event_dims, code_site
from pyro_vi_ext.learned import register_learned
from pyro_vi_ext.objective import Estimate, Objective
from pyro_vi_ext.pair_checks import check_codes
from pyro_vi_ext.paths import check_reparameterized
from pyro_vi_ext.run import Run
from pyro_vi_ext.scoring import Scored, Term, linear_bound, pair_terms, plates_of
from pyro_vi_ext.tracing import TracePair, sample_sites

__all__ = ["VQELBO", "VQParts"]


@dataclass(frozen=True)
class VQParts:
    r"""The loss of :class:`VQELBO` taken apart: scalar tensors in the units of the loss.

    :ivar reconstruction: :math:`-\log p(x \mid z)` of all observed sites, nats.
    :ivar kl: :math:`\log q(z) - \log p(z)` of all latents, nats.
    :ivar codebook: :math:`\sum_u s_u \lVert \mathrm{sg}[z_e] - e_k \rVert^2`.
    :ivar commitment: :math:`\beta \sum_u s_u \lVert z_e - \mathrm{sg}[e_k] \rVert^2`.
    """

    reconstruction: Tensor
    kl: Tensor
    codebook: Tensor
    commitment: Tensor

    @property
    def negative_elbo(self) -> Tensor:
        """Reconstruction + KL: the bound of the model, without penalties; nats."""
        return self.reconstruction + self.kl

    @property
    def loss(self) -> Tensor:
        """The sum of all parts."""
        return self.reconstruction + self.kl + self.codebook + self.commitment

    def __str__(self) -> str:
        names = ("reconstruction", "KL", "codebook", "commitment")
        parts = zip(names, vars(self).values(), strict=True)
        text = " + ".join(f"{name} {float(value):.6g}" for name, value in parts)
        return f"loss {float(self.loss):.6g} = {text}"


class VQELBO(Objective):
    r"""Negative ELBO of a vector-quantised guide plus its codebook and commitment losses.

    The loss is that of the module docstring, with the mean over particles where other sites of the
    guide are random. It is **not a negative bound**: the two penalties come on top of one. The
    bound is in :meth:`parts`, and what :func:`~pyro_vi_ext.elbo_terms` reports.

    Squared errors are summed over the dimension of the codes and over positions. They are masked
    and scaled like the model's log-probability at the site (:math:`s_u`: N/B of a subsampled plate,
    ``poutine.scale``; so annealing the KL there anneals them too).
    Gradients: encoder, through the code (straight through, or as its quantiser has it) and
    the commitment loss; codebook, through the codebook loss only; biased for the encoder, since
    the choice of the code has no derivative. Other sites of the guide must be reparameterised;
    they have the gradient of ``Trace_ELBO``, and where a code depends on them, the encoder's.

    Once in each gradient call, quantisers in training mode move their statistics, from the
    unmasked units and without regard to scales: moving averages, usage counts, restarts; and
    before the first, k-means initialisation. Particles count as one draw. A codebook that neither
    model nor guide has registered with Pyro is registered by the objective, as "<site>.quantizer".

    :param commitment_cost: :math:`\beta \ge 0`; 0.1 to 2 do not differ much, says the paper.
    :param num_particles: number of draws of the other sites; codes need one. An integer >= 1.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: see :class:`~pyro_vi_ext.objective.Objective`.
    :ivar latest: the :class:`VQParts` of the latest evaluation, or ``None``; detached.
    :raises ValueError: for arguments out of range; if model and guide do not use the same
        quantiser at a site. The site is named.
    :raises NotImplementedError: for a guide site that is not reparameterised; a guide with mixing
        variables. Sites are named.

    Reference: A. van den Oord, O. Vinyals and K. Kavukcuoglu, *Neural Discrete Representation
    Learning*, NeurIPS 2017, arXiv:1711.00937.

    Example: one datum, two codes.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import VQELBO
    >>> from pyro_vi_ext.guides import CodePrior, VectorQuantized, VectorQuantizer
    >>> quantizer = VectorQuantizer(2, 1)
    >>> with torch.no_grad():
    ...     _ = quantizer.codebook.copy_(torch.tensor([[-1.0], [1.0]]))
    >>> def model(x):
    ...     z = pyro.sample("z", CodePrior(quantizer))
    ...     pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
    >>> def guide(x):
    ...     pyro.sample("z", VectorQuantized(0.5 * x, quantizer))
    >>> objective = VQELBO(commitment_cost=0.25)
    >>> loss = objective.loss(model, guide, torch.tensor([1.0]))
    >>> print(objective.latest)  # log sqrt(2 pi), log 2, 0.25, 0.25 * 0.25
    loss 1.92459 = reconstruction 0.918939 + KL 0.693147 + codebook 0.25 + commitment 0.0625
    """

    def __init__(
        self,
        commitment_cost: float = 0.25,
        num_particles: int = 1,
        *,
        max_plate_nesting=float("inf"),
        vectorize_particles=True,
    ):
        number = isinstance(commitment_cost, numbers.Real) and commitment_cost is not True
        if not number or not 0 <= commitment_cost < math.inf:
            raise ValueError(
                f"commitment_cost must be a finite number >= 0, got {commitment_cost!r}."
            )
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        self.commitment_cost = commitment_cost
        self.latest: VQParts | None = None

    def parts(self, model, guide, *args, **kwargs) -> VQParts:
        """The loss and its parts, without gradient; nothing moves."""
        self.loss(model, guide, *args, **kwargs)
        return self.latest

    def estimate(self, run: Run) -> Estimate:
        for pair in run.pairs:
            check_codes(pair)  # whichever quantizers the code holds now
            check_reparameterized(pair.guide, "TraceRLOO_ELBO (which does not train codebooks)")
        run, scored, quantized = _ready(run)
        terms = [term for part in scored for term in (*part.model, *part.guide.values())]
        data = [term for term in terms if term.sign > 0 and term.site["is_observed"]]
        latent = [term for term in terms if term.sign < 0 or not term.site["is_observed"]]
        penalties = [site.penalties() for site in quantized]
        beta = self.commitment_cost
        zero = terms[0].log_prob.new_zeros(()) if terms else torch.zeros(())
        parts = VQParts(
            reconstruction=zero - linear_bound(data, run),
            kl=zero - linear_bound(latent, run),
            codebook=zero + linear_bound([codebook for codebook, _ in penalties], run),
            commitment=zero + beta * linear_bound([commitment for _, commitment in penalties], run),
        )
        loss = parts.loss
        self.latest = VQParts(*(part.detach() for part in vars(parts).values()))
        if _moving():
            _update(run, quantized, loss.detach().isfinite())
        return Estimate(loss, terms=terms)


@contextmanager
def codes_at_rest():
    """Inside, gradient calls neither start codebooks nor move what they keep of the batches."""
    token = _at_rest.set(True)
    try:
        yield
    finally:
        _at_rest.reset(token)


_at_rest: ContextVar[bool] = ContextVar("codes_at_rest", default=False)


def _moving() -> bool:
    return torch.is_grad_enabled() and not _at_rest.get()


@dataclass
class QuantizedSite:
    """A quantised site of the guide: its distribution, mask and scale (the model's)."""

    name: str
    fn: VectorQuantized
    event_dims: int
    mask: object
    scale: float | Tensor
    site: dict

    def penalties(self) -> tuple[Term, Term]:
        """Codebook and commitment loss as terms, summed over the event dimensions."""
        z_e = self.fn.z_e
        if torch.is_tensor(self.mask):  # what is masked may be NaN, and would be in the gradient
            z_e = torch.where(self.weights().unsqueeze(-1) > 0, z_e, 0.0)
        return tuple(
            Term(self.name, self._masked(part), self.scale, plates_of(self.site), +1)
            for part in self.fn.quantizer.penalties(z_e, self.fn.indices)
        )

    def _masked(self, part: Tensor) -> Tensor:
        part = sum_rightmost(part.expand(self.fn.batch_shape), self.event_dims)
        return scale_and_mask(part, 1.0, self.mask)

    def weights(self) -> Tensor:
        """How many latents of the site each vector of ``z_e`` stands for; shape of ``indices``."""
        shape = self.fn.batch_shape
        ones = self.fn.z_e.new_ones(shape[: len(shape) - self.event_dims])
        weights = scale_and_mask(ones, 1.0, self.mask)
        weights = weights.reshape(weights.shape + (1,) * self.event_dims).expand(shape)
        return weights.sum_to_size(self.fn.z_e.shape[:-1])


def quantized_sites(pair: TracePair, scored: Scored) -> list[QuantizedSite]:
    """The quantised sites of the guide, also auxiliary ones."""
    scales = {term.name: term.scale for term in scored.model}
    sites = []
    for name, site in sample_sites(pair.guide).items():
        fn = code_site(site["fn"])
        if isinstance(fn, VectorQuantized):
            dims, mask = code_event_dims(site["fn"]), scored.masks.get(name)
            scale = scales.get(name, site["scale"])
            sites.append(QuantizedSite(name, fn, dims, mask, scale, site))
    return sites


def _ready(run: Run) -> tuple[Run, list[Scored], list[QuantizedSite]]:
    """The run, scored; made again after each codebook that was replaced by what the parameter store
    holds, or that starts from this batch, those upstream first."""
    while True:
        scored = [pair_terms(run, pair) for pair in run.pairs]
        quantized = [
            site
            for pair, part in zip(run.pairs, scored, strict=True)
            for site in quantized_sites(pair, part)
        ]
        if not _register(run, quantized):
            waiting = [s for s in quantized if s.fn.quantizer.needs_initialization]
            if not waiting or not _moving():
                return run, scored, quantized
            quantizer = waiting[0].fn.quantizer
            z_e, _, weights = _vectors([s for s in waiting if s.fn.quantizer is quantizer])
            quantizer.initialize(z_e, weights)
            if quantizer.needs_initialization:  # nothing to start from; NaN is said with the loss
                return run, scored, quantized
        run = run.again()


def _register(run: Run, quantized: list[QuantizedSite]) -> bool:
    """See to it that the optimizer of an ``SVI`` finds the codebooks.

    :returns: whether one was replaced by what the parameter store holds under its name.
    """
    pairs = [trace for pair in run.pairs for trace in (pair.guide, pair.model)]
    params = [node["value"] for t in pairs for node in t.nodes.values() if node["type"] == "param"]
    known = {id(getattr(p, "unconstrained", lambda p=p: p)()) for p in params}
    store, replaced = pyro.get_param_store(), False
    for site in quantized:
        quantizer = site.fn.quantizer
        own = [p for p in quantizer.parameters() if p.requires_grad]
        new = [p for p in own if id(p) not in known and store.param_name(p) is None]
        if new:
            register_learned(quantizer, f"{site.name}.quantizer", quantizer)
            found = [p for p in quantizer.parameters() if p.requires_grad]
            replaced |= [*map(id, found)] != [*map(id, own)]
        known |= {id(p) for p in quantizer.parameters()}
    return replaced


def _update(run: Run, quantized: list[QuantizedSite], finite: Tensor) -> None:
    """Move the statistics of each quantiser once, from all of its sites and particles."""
    for quantizer in {id(s.fn.quantizer): s.fn.quantizer for s in quantized}.values():
        if quantizer.training:
            sites = [s for s in quantized if s.fn.quantizer is quantizer]
            z_e, indices, weights = _vectors(sites)
            quantizer.update(z_e, indices, weights * finite / run.num_particles)


def _vectors(sites: list[QuantizedSite]) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors (N, D) of the sites of one quantiser, their indices and weights; no NaN counts."""
    quantizer = sites[0].fn.quantizer
    z_e = torch.cat([s.fn.z_e.detach().reshape(-1, quantizer.code_dim) for s in sites])
    indices = torch.cat([s.fn.indices.reshape((-1,) + quantizer.code_shape) for s in sites])
    weights = torch.cat([s.weights().reshape(-1) for s in sites])
    return z_e, indices, weights * z_e.isfinite().all(-1)
