r"""Draws from a guide, with everything a model says about each of them.

A draw is a value of every latent with its :math:`\log p(x, z)`, its :math:`\log q(z)`, the
pointwise log-likelihood and a replicated data set. Log-probabilities come from the same terms that
objectives add up (:mod:`pyro_vi_ext.scoring`), without any scale. With a subsampled plate the draws
are made by a *walk*: the plate is visited in minibatches that cover each index once, global latents
are drawn in the first and repeated in the others, and terms outside the plate count once.
"""

from __future__ import annotations

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.util import site_is_factor, site_is_subsample

from pyro_vi_ext.arrange import (
    Draws,
    Variable,
    arrange,
    event_dim_of,
    from_left,
    join,
    masked,
    trim,
)
from pyro_vi_ext.draw_checks import (
    blame_nan,
    check_global,
    check_structure,
    check_vectorised,
    soft_sites,
)
from pyro_vi_ext.plate_walk import PlateSubsample, Walk
from pyro_vi_ext.roles import is_delta
from pyro_vi_ext.run import Run, Structure
from pyro_vi_ext.scoring import check_finite, log_weights, pair_terms, plates_of
from pyro_vi_ext.semi_implicit import semi_implicit_terms
from pyro_vi_ext.tracing import PARTICLE_PLATE, TracePair, latent_sites, sample_sites, trace_inside

__all__ = ["Draws", "Variable", "draw"]

_ELEMENTS = 2**24  # numbers held at once when batch_size is not given


def draw(
    model,
    guide,
    args,
    kwargs,
    *,
    num_draws: int,
    num_mixing_particles: int,
    posterior_predictive: bool,
    log_likelihood: bool,
    batch_size: int | None,
    max_plate_nesting: float,
    vectorize_particles: bool,
) -> Draws:
    """Draw from the guide and score each draw; see :func:`pyro_vi_ext.from_pyro_svi`."""
    with torch.no_grad(), poutine.block():
        sampler = _Sampler(
            model,
            guide,
            args,
            kwargs,
            max_plate_nesting=max_plate_nesting,
            vectorized=vectorize_particles,
            num_extra=num_mixing_particles,
            with_predictive=posterior_predictive,
            with_likelihood=log_likelihood,
        )
        size = sampler.default_batch_size() if batch_size is None else batch_size
        parts = []
        for start in range(0, num_draws, size):
            parts.append(sampler.draw(min(size, num_draws - start), first=start == 0))
    return join(parts, None)


class _Sampler:
    """Draws of one pair: what one set-up pass learns, then any number of batches of draws."""

    def __init__(
        self,
        model,
        guide,
        args,
        kwargs,
        *,
        max_plate_nesting,
        vectorized,
        num_extra,
        with_predictive,
        with_likelihood,
    ):
        self.pair = (model, guide, args, kwargs)
        self.vectorized, self.num_extra = vectorized, num_extra
        self.with_predictive, self.with_likelihood = with_predictive, with_likelihood
        try:
            self.structure = Structure.of(model, guide, args, kwargs, max_plate_nesting)
            with torch.random.fork_rng():
                self.reference = self.run(1, {}, False)
        except ValueError as e:
            blame_nan(e, guide, args, kwargs)
            raise
        self.walk = Walk(self.reference)
        self.walk.check_indices(self.reference)
        self.soft: set[str] = set()  # sites observed at a function of latents: no data
        if not latent_sites(self.reference.pairs[0].model):
            raise ValueError("The model has no latent site, so there is no posterior to export.")

    def run(self, num_particles, indices, vectorized, given=None) -> Run:
        subsample = PlateSubsample()
        subsample.indices.update(indices)
        run = Run(
            self.structure,
            *self.pair,
            num_particles=num_particles,
            vectorized=vectorized,
            subsample=subsample,
            given=given,
        )
        for pair in run.pairs:
            for trace in (pair.model, pair.guide):
                for site in sample_sites(trace).values():
                    site["scale"] = 1.0
        return run

    def default_batch_size(self) -> int:
        if not self.vectorized:
            return 100
        pair, mixed = self.reference.pairs[0], set(self.reference.roles.given_mixing())
        elements = sum(site["value"].numel() for site in sample_sites(pair.model).values())
        for name, site in sample_sites(pair.guide).items():
            elements += site["value"].numel() * (1 + self.num_extra * (name in mixed))
        return max(1, _ELEMENTS // max(1, elements))

    def draw(self, num_particles: int, first: bool) -> Draws:
        """One batch of draws: a walk over the minibatches of the subsampled plate, if any."""
        walk, parts, given, known = self.walk, [], None, {}
        for index, valid in walk.minibatches:
            indices = {} if walk.plate is None else {walk.plate: index}
            run = self.run(num_particles, indices, self.vectorized, given)
            scored = [pair_terms(run, pair) for pair in run.pairs]
            if first and not parts:
                check_structure(run, scored[0], walk.plate)
                self.soft = soft_sites(run)
            check_global(walk.plate, [[*s.model, *s.guide.values()] for s in scored], known)
            if parts and not self._mixing_is_local(run):
                averaged = run.roles.given_mixing()  # counted with the first minibatch
                terms = [
                    [*s.model, *(t for n, t in s.guide.items() if n not in averaged)]
                    for s in scored
                ]
            else:
                terms = semi_implicit_terms(run, self.num_extra, "lower", pathwise=False)
            if first and not parts and self.vectorized and num_particles > 1:
                check_vectorised(run, scored[0], self.reference, self._run_alone)
            part = Draws(has_mixing=bool(run.roles.mixing))
            part.log_p = self._log_density(run, terms, +1, valid, bool(parts))
            part.log_q = -self._log_density(run, terms, -1, valid, bool(parts))
            total = float((part.log_p - part.log_q).sum())
            check_finite(total, [term for row in terms for term in row])
            self._collect(run, scored, part)
            parts.append(trim(part, walk.plate, valid))
            if given is None:
                given = [self._global_values(pair) for pair in run.pairs]
        return join(parts, walk.plate)

    def _run_alone(self, indices, given) -> Run:
        return self.run(1, indices, False, [given])

    # --- scores ------------------------------------------------------------------------------

    def _mixing_is_local(self, run: Run) -> bool:
        """Whether the average over mixing variables is formed in the subsampled plate."""
        nodes = run.pairs[0].guide.nodes
        names = [*run.roles.mixing, *run.roles.given_mixing()]
        return bool(names) and all(self.walk.plate in plates_of(nodes[name]) for name in names)

    def _log_density(self, run, terms, sign, valid, local_only) -> torch.Tensor:
        """Sum of the terms of one sign: global ones once, local ones at the valid indices."""
        signed = [[term for term in row if term.sign == sign] for row in terms]
        inside = [[t for t in row if self.walk.plate in t.plates] for row in signed]
        outside = [[t for t in row if self.walk.plate not in t.plates] for row in signed]
        total = torch.zeros(())
        if inside[0]:
            frame = self.walk.frame
            log_w = log_weights(inside, {frame.name: frame}, run)
            total = total + log_w.narrow(frame.dim, 0, valid).flatten(1).sum(1)
        if outside[0] and not local_only:
            total = total + log_weights(outside, {}, run).reshape(run.num_particles)
        return total.expand(run.num_particles)

    def _global_values(self, pair: TracePair) -> dict:
        """Draws of the guide to repeat in every minibatch; a Delta follows its parents."""
        return {
            name: site["value"]
            for name, site in latent_sites(pair.guide).items()
            if self.walk.plate not in plates_of(site) and not is_delta(site)
        }

    # --- variables ---------------------------------------------------------------------------

    def _collect(self, run: Run, scored: list, part: Draws) -> None:
        model = run.pairs[0].model
        for name, site in model.nodes.items():
            if not _has_values(site):
                continue
            deterministic = site["infer"].get("_deterministic")
            if not site["is_observed"] or deterministic:
                event_dim = site["fn"].event_dim
                if deterministic:
                    event_dim = event_dim_of(self.reference, name)
                part.posterior[name] = self._variable(run, name, event_dim)
        terms = [{term.name: term for term in s.model} for s in scored]
        data = [
            name
            for name, term in terms[0].items()
            if term.site["is_observed"] and not site_is_factor(term.site) and name not in self.soft
        ]
        for name in data:
            event_dim = terms[0][name].site["fn"].event_dim
            part.observed_data[name] = self._observed(run, name, event_dim)
            if self.with_likelihood:
                values = [masked(row[name].log_prob, row[name].site, 0) for row in terms]
                part.log_likelihood[name] = self._variable(run, name, 0, values)
        if self.with_predictive and data:
            traces = self._predict(run, data)
            for name in data:
                event_dim = terms[0][name].site["fn"].event_dim
                values = [trace.nodes[name]["value"] for trace in traces]
                part.posterior_predictive[name] = self._variable(run, name, event_dim, values)

    def _variable(self, run: Run, name: str, event_dim: int, values=None) -> Variable:
        sites = [pair.model.nodes[name] for pair in run.pairs]
        values = [site["value"] for site in sites] if values is None else values
        rank, plates = self.structure.max_plate_nesting, plates_of(sites[0])
        rows = [arrange(name, v, event_dim, plates, rank, run.vectorized) for v in values]
        rows = rows[0] if len(rows) == 1 else torch.cat(rows)
        rows = rows.expand((run.num_particles,) + rows.shape[1:])
        return Variable(rows, tuple(from_left(plates)))

    def _observed(self, run: Run, name: str, event_dim: int) -> Variable:
        site = run.pairs[0].model.nodes[name]
        values = masked(site["value"], site, event_dim)
        variable = self._variable(run, name, event_dim, [values] * len(run.pairs))
        return Variable(variable.values[:1], variable.plates)

    def _predict(self, run: Run, data: list[str]) -> list:
        """The model again at the same latents, with new data."""
        model, _, args, kwargs = self.pair
        outer = [run.outer_plate(PARTICLE_PLATE, run.num_particles)] if run.vectorized else []
        traces, uncondition = [], _Uncondition(data)
        for pair in run.pairs:
            replay = ReplayMessenger(pair.guide)
            try:
                traces.append(
                    trace_inside(model, args, kwargs, replay, *outer, run.subsample, uncondition)
                )
            except NotImplementedError as e:
                raise NotImplementedError(
                    f"Cannot draw new data at site '{uncondition.name}' "
                    f"({type(pair.model.nodes[uncondition.name]['fn']).__name__}): {e}. Pass "
                    "posterior_predictive=False."
                ) from e
        return traces


class _Uncondition(Messenger):
    """Draws the named observed sites afresh."""

    def __init__(self, names):
        super().__init__()
        self.names = frozenset(names)
        self.name = None  # the site at hand, for error messages

    def _pyro_sample(self, msg):
        if msg["name"] in self.names:
            self.name = msg["name"]
            msg["is_observed"] = False
            msg["value"] = None
            msg["done"] = False


def _has_values(site: dict) -> bool:
    if site["type"] != "sample" or site_is_subsample(site) or site_is_factor(site):
        return False
    return torch.is_tensor(site["value"])
