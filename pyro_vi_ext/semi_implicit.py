r"""Semi-implicit variational inference (Yin and Zhou 2018, arXiv:1805.11183).

.. math::

    q(z) = \int q(z \mid \psi)\, q(\psi)\, d\psi, \qquad
    h_K(z_j) = \frac{1}{K+1} \Big[ q(z_j \mid \psi_j) + \sum_{k=1}^K q(z_j \mid \psi^{(k)}) \Big],

    L_K = \mathbb{E} \log p(x, z_j) - \log h_K(z_j), \qquad
    z_j \sim q(z \mid \psi_j), \quad \psi_j, \psi^{(k)} \sim q(\psi).

:math:`L_K` rises with :math:`K` to the ELBO of the marginal :math:`q(z)`. Without the own
:math:`\psi_j` in the average it falls to the same value from above.
"""

from __future__ import annotations

import functools
import math

import torch
from pyro.distributions.util import scale_and_mask

from pyro_vi_ext.objective import Estimate, Objective, positive_int
from pyro_vi_ext.run import Run
from pyro_vi_ext.scoring import (
    Term,
    linear_bound,
    log_mean_bound,
    pair_terms,
    plates_of,
    site_log_prob,
    split_mask,
    sum_to_units,
    unit_plates,
    unit_scale,
)
from pyro_vi_ext.tracing import MIXING_PLATE, Substitute, TracePair, latent_sites, sample_sites

__all__ = ["SemiImplicitELBO"]


class SemiImplicitELBO(Objective):
    r"""Surrogate bound for semi-implicit guides, whose density is an integral over noise.

    .. math::

        \mathrm{loss} = -\frac{1}{J} \sum_{j=1}^J \big[ \log p(x, z_j) - \log h_K(z_j) \big],

    with :math:`h_K` as in the module docstring; the :math:`K` extra draws of :math:`\psi` are
    shared by all :math:`j`. With ``importance_weighted=True`` the loss is
    :math:`-\log \frac{1}{J} \sum_j p(x, z_j) / h_K(z_j)`, formed per unit (a lower bound on
    :math:`\log p(x)` that is tighter in :math:`J`).

    In Pyro a mixing variable :math:`\psi` is a guide site marked
    ``infer={"is_auxiliary": True}`` on which another guide site directly depends. Its own density
    never enters. All conditionals :math:`q(z \mid \psi)` that depend on mixing variables are
    averaged as a product; the others enter :math:`\log q` as they are, so a guide without mixing
    variables gets the ordinary ELBO, for any :math:`K`. With all mixing variables inside a plate
    that also holds their conditionals, the average is taken for each element of the plate.

    At finite :math:`K` the bound is below the ELBO by a known kind of amount,
    :math:`O(1/K)`: :math:`\frac{1}{2(K+1)}` times the variance of
    :math:`q(z \mid \psi) / q(z)`, summed over units. ``bound="upper"`` leaves :math:`\psi_j`
    out of the average. In expectation it lies above the ELBO, so the two bounds sandwich it. It is
    for evaluation: minimising its negative does not tighten anything.

    Gradients are pathwise, so every guide site must be reparameterised (noise without learned
    parameters may have any distribution). All draws are made in two runs of the guide and one of
    the model. Peak memory of a step is about

    .. math:: c \cdot b \cdot J \,(K + 1) \cdot \sum_s n_s \ \text{bytes},

    with :math:`n_s` the number of elements (batch times event) of conditional :math:`s` and
    :math:`b` the bytes of its dtype. Measured (``benchmarks/semi_implicit.py --memory``):
    :math:`c` is 5 for Normal conditionals of fixed scale, 6 to 7 of learned scale, and 4 to 7 for
    ``AutoSemiImplicit``. The model's and the networks' activations for :math:`J + K` draws come on
    top. If a conditional depends on another conditional, the networks are evaluated on all
    :math:`J K` pairs.

    :param num_particles: J, the number of draws of z. An integer >= 1.
    :param num_mixing_particles: K, the number of extra draws of psi. An integer >= 0; K = 0 is the
        degenerate bound, whose optimum has no noise left in psi.
    :param bound: ``"lower"`` or ``"upper"`` (needs K >= 1).
    :param importance_weighted: average weights inside the logarithm. Lower bound only.
    :param max_plate_nesting: see :class:`~pyro_vi_ext.objective.Objective`.
    :param vectorize_particles: the default is one vectorised run. The sequential path, for models
        that cannot be vectorised, runs the guide J + J K times.
    :raises ValueError: for arguments out of range; ``bound="upper"`` with K = 0 or with importance
        weights (no bound); a ``Delta`` or a non-reparameterised learned site where the maths needs
        a density; scales that differ within a unit. Sites are named.
    :raises NotImplementedError: if a conditional of the guide is not reparameterised.

    .. seealso:: :class:`pyro_vi_ext.guides.AutoSemiImplicit`

    Reference: M. Yin and M. Zhou, *Semi-Implicit Variational Inference*, ICML 2018,
    arXiv:1805.11183.

    Example: noise that widens a Gaussian. The guide is the exact posterior N(1, 1/2) by
    construction, so the bound approaches log p(x) = log N(2; 0, 2) as K grows.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vi_ext import SemiImplicitELBO
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     psi = pyro.sample("psi", dist.Normal(1.0, 0.5), infer={"is_auxiliary": True})
    ...     pyro.sample("z", dist.Normal(psi, 0.5))
    >>> _ = torch.manual_seed(0)
    >>> x = torch.tensor(2.0)
    >>> lower = SemiImplicitELBO(num_particles=2000, num_mixing_particles=500)
    >>> upper = SemiImplicitELBO(num_particles=2000, num_mixing_particles=500, bound="upper")
    >>> round(-lower.loss(model, guide, x), 2), round(-upper.loss(model, guide, x), 2)
    (-2.27, -2.26)
    >>> round(dist.Normal(0.0, 2**0.5).log_prob(x).item(), 2)
    -2.27
    """

    takes_mixing = True

    def __init__(
        self,
        num_particles: int = 1,
        num_mixing_particles: int = 20,
        bound: str = "lower",
        importance_weighted: bool = False,
        *,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ):
        super().__init__(
            num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        self.num_mixing_particles = positive_int("num_mixing_particles", num_mixing_particles, 0)
        if bound not in ("lower", "upper"):
            raise ValueError(f"bound must be 'lower' or 'upper', got {bound!r}.")
        if bound == "upper" and num_mixing_particles == 0:
            raise ValueError(
                "bound='upper' averages the extra draws only: num_mixing_particles=0 leaves none."
            )
        if bound == "upper" and importance_weighted:
            raise ValueError(
                "importance_weighted=True with bound='upper' bounds nothing. Use bound='lower', or "
                "importance_weighted=False."
            )
        self.bound = bound
        self.importance_weighted = bool(importance_weighted)

    def estimate(self, run: Run) -> Estimate:
        particles = semi_implicit_terms(run, self.num_mixing_particles, self.bound)
        everything = [term for terms in particles for term in terms]
        if self.importance_weighted and self.num_particles > 1:
            bound = log_mean_bound(particles, run)
        else:
            bound = linear_bound(everything, run)
        return Estimate(-bound, terms=everything)


def semi_implicit_terms(
    run: Run, num_mixing_particles: int, bound: str, pathwise: bool = True
) -> list[list[Term]]:
    """The terms of each pair of a run, with log h_K in place of the averaged conditionals.

    :param pathwise: refuse sites that are not reparameterised; without it only values are right.
    """
    if pathwise:
        for pair in run.pairs:
            _check_reparameterised(run, pair)
    shared_psi: list[dict] = []
    return [
        _pair_terms(run, pair, num_mixing_particles, bound == "lower", shared_psi)
        for pair in run.pairs
    ]


def _pair_terms(run, pair, num_extra, own_included, shared_psi) -> list[Term]:
    scored = pair_terms(run, pair)
    averaged = [scored.guide.pop(name) for name in run.roles.given_mixing()]
    terms = [*scored.model, *scored.guide.values()]
    if not averaged:
        return terms
    mixing = [pair.guide.nodes[name] for name in run.roles.mixing]
    _check_subsampled(mixing, averaged)
    plates = unit_plates([*averaged, *(_plates_only(site) for site in mixing)])
    scale = unit_scale(averaged, plates, "The average over mixing variables")

    own = sum(sum_to_units(_pad(run, t.log_prob, 1), plates, keep=1) for t in averaged)
    if num_extra == 0:
        log_h = own
    else:
        rescored = _rescore(run, pair, averaged, scored.masks, num_extra, shared_psi)
        extra = [sum_to_units(log_prob, plates, keep=2) for log_prob in rescored]  # (J, K, *unit)
        log_h = torch.logsumexp(functools.reduce(torch.add, extra), 1)
        if own_included:
            log_h = torch.logaddexp(log_h, own)
        log_h = log_h - math.log(num_extra + own_included)
    name = f"h({', '.join(term.name for term in averaged)})"
    terms.append(Term(name, log_h, scale, plates, -1))
    return terms


# --- q(z_j | psi^(k)) for all j and k ----------------------------------------------------------


def _rescore(run, pair, averaged, masks, num_extra, shared_psi) -> list[torch.Tensor]:
    """log q(z_j | psi^(k)) of each averaged conditional, shape (J, K, *batch); masks applied."""
    if run.vectorize_mixing:
        trace = _guide_on_extra_draws(run, pair, num_extra)
        traces = [trace]
    else:
        traces = _guide_one_by_one(run, pair, num_extra, shared_psi)
    result = []
    for term in averaged:
        columns = []
        for trace in traces:
            site = trace.nodes[term.name]
            fn, _ = split_mask(site)
            mask = masks[term.name]
            if torch.is_tensor(mask):
                mask = _insert_mixing_dim(run, mask, 0)
            columns.append(scale_and_mask(site_log_prob(site, fn), 1.0, mask))
        columns = [_pad(run, column, 2) for column in columns]
        log_prob = columns[0] if len(columns) == 1 else torch.cat(columns, 1)
        _check_rescored(run, term, log_prob, num_extra)
        result.append(log_prob)
    return result


def _check_rescored(run: Run, term: Term, log_prob: torch.Tensor, num_extra: int) -> None:
    draws = run.num_particles if run.vectorized else 1
    if log_prob.shape[:2] != (draws, num_extra):
        raise ValueError(
            f"At {draws} draws of site '{term.name}' and {num_extra} extra draws of the mixing "
            f"variables, its log-density has shape {tuple(log_prob.shape)}, expected {draws} x "
            f"{num_extra} x batch. Either its parameters do not depend on the mixing variables in "
            "this call, or the guide does not broadcast over a batch dimension on the left: index "
            "with [..., i], reduce dimensions from the right, or pass vectorize_particles=False."
        )


def _guide_on_extra_draws(run: Run, pair: TracePair, num_extra: int):
    """The guide with fresh psi^(k) along the mixing plate, at the z_j of the particles.

    The networks run on K draws of psi only, and the densities broadcast to (J, K), unless some
    conditional depends on another one: then everything is expanded to (J, K) first.
    """
    roles = run.roles
    mixing_plate = run.outer_plate(MIXING_PLATE, num_extra)
    conditionals = {
        name: site
        for name, site in latent_sites(pair.guide).items()
        if name not in roles.mixing and name not in roles.deltas
    }
    nested = any(roles.conditional_parents(n) for n in roles.parents if n not in roles.deltas)
    if not nested:
        values = {
            name: _insert_mixing_dim(run, site["value"], site["fn"].event_dim)
            for name, site in conditionals.items()
        }
        return run.trace_guide(mixing_plate, Substitute(values))

    rank = run.structure.max_plate_nesting
    batch = ((run.num_particles,) if run.vectorized else ()) + (num_extra,) + (1,) * rank
    free = run.trace_guide(mixing_plate)
    sites = {**conditionals, **{name: free.nodes[name] for name in _independent_mixing(run)}}
    values = {}
    for name, site in sites.items():
        event_dim = site["fn"].event_dim
        value = site["value"]
        if name in conditionals:
            value = _insert_mixing_dim(run, value, event_dim)
        shape = torch.broadcast_shapes(value.shape, batch + (1,) * event_dim)
        values[name] = value.expand(shape)
    return run.trace_guide(mixing_plate, Substitute(values))


def _guide_one_by_one(run: Run, pair: TracePair, num_extra: int, shared_psi: list[dict]) -> list:
    """K runs of an unvectorised guide; psi^(k) drawn for the first particle, then repeated."""
    roles = run.roles
    values = {
        name: site["value"]
        for name, site in latent_sites(pair.guide).items()
        if name not in roles.mixing and name not in roles.deltas
    }
    traces = []
    for k in range(num_extra):
        known = shared_psi[k] if k < len(shared_psi) else {}
        trace = run.trace_guide(Substitute({**values, **known}))
        if k >= len(shared_psi):
            names = _independent_mixing(run)
            shared_psi.append({name: trace.nodes[name]["value"] for name in names})
        traces.append(trace)
    return traces


def _independent_mixing(run: Run) -> list[str]:
    """Mixing sites without a conditional upstream: their extra draws are shared by all z_j."""
    roles, result = run.roles, []
    for name in roles.mixing:
        seen, stack = set(), [name]
        while stack:
            for parent in roles.parents[stack.pop()] - seen:
                seen.add(parent)
                stack.append(parent)
        if seen <= set(roles.mixing):
            result.append(name)
    return result


def _insert_mixing_dim(run: Run, value: torch.Tensor, event_dim: int) -> torch.Tensor:
    """(J, *batch, *event) -> (J, 1, *batch, *event), to broadcast against (K, *batch)."""
    vectorized = run.vectorized and value.dim() - event_dim == -run.particle_dim
    return value.unsqueeze(1) if vectorized else value


def _pad(run: Run, log_prob: torch.Tensor, lead: int) -> torch.Tensor:
    """Left-pad a batch with ones, to ``lead`` dimensions and those of the model's plates."""
    rank = run.structure.max_plate_nesting + lead
    return log_prob.reshape((1,) * (rank - log_prob.dim()) + log_prob.shape)


# --- checks ------------------------------------------------------------------------------------


def _plates_only(site: dict) -> Term:
    return Term(site["name"], site["value"], 1.0, plates_of(site), -1)


def _check_reparameterised(run: Run, pair: TracePair) -> None:
    for name, site in sample_sites(pair.guide).items():
        if getattr(site["fn"], "has_rsample", False) or name in run.roles.derived:
            continue
        if name in run.roles.mixing:
            if site_log_prob(site).requires_grad:
                raise ValueError(
                    f"Mixing site '{name}' is not reparameterised ({_kind(site)}) but its "
                    "distribution has learned parameters, which would get no gradient. Use fixed "
                    "noise and put the parameters into the conditional, or a reparameterised "
                    "distribution."
                )
            continue
        raise NotImplementedError(
            f"Guide site '{name}' ({_kind(site)}) is not reparameterised, and SemiImplicitELBO "
            "differentiates along paths only. Use a distribution with rsample, or, for a guide "
            "without mixing variables, a score-function objective such as "
            "pyro.infer.TraceGraph_ELBO."
        )


def _kind(site: dict) -> str:
    fn = site["fn"]
    while hasattr(fn, "base_dist") and type(fn).__name__ in ("Independent", "ExpandedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__


def _check_subsampled(mixing: list[dict], averaged: list[Term]) -> None:
    for term in averaged:
        for frame in term.site["cond_indep_stack"]:
            if frame.full_size in (None, frame.size):
                continue
            for site in mixing:
                if frame.name not in {f.name for f in site["cond_indep_stack"]}:
                    raise ValueError(
                        f"Site '{term.name}' is in the subsampled plate '{frame.name}' but the "
                        f"mixing variable '{site['name']}' is outside it, so h_K is a product over "
                        "data that are not in the minibatch. Move the mixing variable into the "
                        "plate, or do not subsample it."
                    )
