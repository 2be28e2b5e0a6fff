r"""Draws from a guide, with everything a model says about each of them.

A draw is a value of every latent with its :math:`\log p(x, z)`, its :math:`\log q(z)`, the
pointwise log-likelihood and a replicated data set. Log-probabilities come from the same terms that
objectives add up (:mod:`pyro_vi_ext.scoring`), without any scale. With a subsampled plate the draws
are made by a *walk*: the plate is visited in minibatches that cover each index once, global latents
are drawn in the first and repeated in the others, and terms outside the plate count once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.util import site_is_factor, site_is_subsample

from pyro_vi_ext.plate_walk import PlateSubsample, Walk
from pyro_vi_ext.roles import is_delta
from pyro_vi_ext.scoring import (
    Scored,
    Term,
    check_finite,
    log_weights,
    pair_terms,
    plates_of,
    split_mask,
)
from pyro_vi_ext.semi_implicit import semi_implicit_terms
from pyro_vi_ext.tracing import (
    PARTICLE_PLATE,
    Run,
    Structure,
    TracePair,
    latent_sites,
    sample_sites,
    trace_inside,
)

__all__ = ["Draws", "Variable", "draw"]

_ELEMENTS = 2**24  # numbers held at once when batch_size is not given


@dataclass
class Variable:
    """Values of one site.

    :ivar values: shape (draws, *plates, *event); data have a single draw.
    :ivar plates: names of the plates, from left to right.
    """

    values: torch.Tensor
    plates: tuple[str, ...]


@dataclass
class Draws:
    """What :func:`draw` returns: groups of variables by site name, and one number per draw.

    :ivar log_p: log joint of all data and latents, unscaled, in nats; shape (draws,).
    :ivar log_q: log density of the guide; shape (draws,).
    :ivar has_mixing: whether log_q is the log h_K of a semi-implicit guide.
    """

    posterior: dict[str, Variable] = field(default_factory=dict)
    log_likelihood: dict[str, Variable] = field(default_factory=dict)
    posterior_predictive: dict[str, Variable] = field(default_factory=dict)
    observed_data: dict[str, Variable] = field(default_factory=dict)
    log_p: torch.Tensor | float = 0.0
    log_q: torch.Tensor | float = 0.0
    has_mixing: bool = False


GROUPS = ("posterior", "log_likelihood", "posterior_predictive", "observed_data")


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
    return _join(parts, None)


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
            _blame_nan(e, guide, args, kwargs)
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
            run = self._run_particles(num_particles, indices, given)
            scored = [pair_terms(run, pair) for pair in run.pairs]
            if first and not parts:
                self._check_structure(run, scored[0])
            self._check_global(run, [[*s.model, *s.guide.values()] for s in scored], known)
            if parts and not self._mixing_is_local(run):
                averaged = run.roles.given_mixing()  # counted with the first minibatch
                terms = [
                    [*s.model, *(t for n, t in s.guide.items() if n not in averaged)]
                    for s in scored
                ]
            else:
                terms = semi_implicit_terms(run, self.num_extra, "lower", pathwise=False)
            if first and not parts and self.vectorized and num_particles > 1:
                self._check_vectorised(run, scored[0])
            part = Draws(has_mixing=bool(run.roles.mixing))
            part.log_p = self._log_density(run, terms, +1, valid, bool(parts))
            part.log_q = -self._log_density(run, terms, -1, valid, bool(parts))
            total = float((part.log_p - part.log_q).sum())
            check_finite(total, [term for row in terms for term in row])
            self._collect(run, scored, part)
            parts.append(_trim(part, walk.plate, valid))
            if given is None:
                given = [self._global_values(pair) for pair in run.pairs]
        return _join(parts, walk.plate)

    def _run_particles(self, num_particles, indices, given) -> Run:
        try:
            return self.run(num_particles, indices, self.vectorized, given)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError) as e:
            if not self.vectorized:
                raise
            reason = str(e).split("\n")[0].strip()  # Pyro adds a table of shapes
            raise ValueError(
                f"Model or guide cannot be run for {num_particles} draws at once ({reason}). "
                "Let every operation broadcast over a batch dimension on the left (index and "
                "reduce dimensions from the right), or pass vectorize_particles=False."
            ) from e

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

    def _check_global(self, run: Run, rows: list[list[Term]], known: dict) -> None:
        """Terms outside the subsampled plate must not depend on the minibatch."""
        if self.walk.plate is None:
            return
        for i, row in enumerate(rows):
            for term in row:
                if self.walk.plate in term.plates:
                    continue
                other = known.setdefault((i, term.sign, term.name), term.log_prob)
                if not _close(term.log_prob, other):
                    where = "model" if term.sign > 0 else "guide"
                    raise ValueError(
                        f"Site '{term.name}' of the {where} is outside the subsampled plate "
                        f"'{self.walk.plate}', but its log-probability changes with the minibatch, "
                        "so it has no value for all data. Move it into the plate, let it not "
                        "depend on the minibatch, or do not subsample the plate."
                    )

    # --- variables ---------------------------------------------------------------------------

    def _collect(self, run: Run, scored: list, part: Draws) -> None:
        model = run.pairs[0].model
        for name, site in model.nodes.items():
            if not _has_values(site):
                continue
            deterministic = site["infer"].get("_deterministic")
            if not site["is_observed"] or deterministic:
                event_dim = self._event_dim(name) if deterministic else site["fn"].event_dim
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
                values = [_masked(row[name].log_prob, row[name].site, 0) for row in terms]
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
        return Variable(rows, tuple(_from_left(plates)))

    def _observed(self, run: Run, name: str, event_dim: int) -> Variable:
        site = run.pairs[0].model.nodes[name]
        values = _masked(site["value"], site, event_dim)
        variable = self._variable(run, name, event_dim, [values] * len(run.pairs))
        return Variable(variable.values[:1], variable.plates)

    def _event_dim(self, name: str) -> int:
        """Event dimensions of a deterministic site, which Pyro takes all to be by default."""
        site = self.reference.pairs[0].model.nodes.get(name)
        if site is None:
            _raise_dynamic(name)
        value, plates = site["value"], plates_of(site)
        declared = min(site["fn"].event_dim, value.dim())
        if declared < value.dim():
            return declared
        depth = -min((frame.dim for frame in plates.values()), default=0)
        for event_dim in range(max(0, value.dim() - depth), value.dim()):
            try:
                arrange(name, value, event_dim, plates, self.structure.max_plate_nesting, False)
                return event_dim
            except ValueError:
                continue
        return value.dim()

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

    # --- checks ------------------------------------------------------------------------------

    def _check_structure(self, run: Run, scored: Scored) -> None:
        """The same sites in every draw; latents in the model's plates; no stray dimension."""
        model = sample_sites(run.pairs[0].model)
        for pair in run.pairs[1:]:
            for name in set(model) ^ set(sample_sites(pair.model)):
                _raise_dynamic(name)
        guide = sample_sites(run.pairs[0].guide)
        for name, site in model.items():
            if name in guide and self.walk.plate in plates_of(site):
                if self.walk.plate not in plates_of(guide[name]):
                    raise ValueError(
                        f"Site '{name}' is in the subsampled plate '{self.walk.plate}' in the "
                        "model but not in the guide, so its draws cannot be matched to the data. "
                        "Put it into that plate in the guide."
                    )
            if site["is_observed"] and _varies(run, name):
                self.soft.add(name)
        for term in (*scored.model, *scored.guide.values()):
            rank = self.structure.max_plate_nesting
            arrange(term.name, term.log_prob, 0, term.plates, rank, run.vectorized)

    def _check_vectorised(self, run: Run, scored: Scored) -> None:
        """Running a draw by itself must give what it has among the others."""
        pair, reference = run.pairs[0], self.reference.pairs[0]
        rank = self.structure.max_plate_nesting
        for j in (0, run.num_particles - 1):
            given = {}
            for name, site in latent_sites(pair.guide).items():
                if is_delta(site):
                    continue
                if name not in reference.guide:
                    _raise_dynamic(name)
                value, event_dim = site["value"], site["fn"].event_dim
                if value.dim() - event_dim == rank + 1:
                    value = value[j] if value.shape[0] > 1 else value[0]
                given[name] = value.reshape(reference.guide.nodes[name]["value"].shape)
            alone = self.run(1, run.subsample.indices, False, [given])
            expected = pair_terms(alone, alone.pairs[0])
            terms = {(t.sign, t.name): t for t in (*scored.model, *scored.guide.values())}
            for term in (*expected.model, *expected.guide.values()):
                many = terms.get((term.sign, term.name))
                if many is None:
                    _raise_dynamic(term.name)
                rows = arrange(term.name, many.log_prob, 0, many.plates, rank, True)
                row = arrange(term.name, term.log_prob, 0, term.plates, rank, False)
                if not _close(rows[min(j, len(rows) - 1)], row[0], 0.25):
                    _raise_unvectorised(term.name, "model" if term.sign > 0 else "guide")
            for name, site in alone.pairs[0].model.nodes.items():
                if site["type"] == "sample" and site["infer"].get("_deterministic"):
                    event_dim, plates = self._event_dim(name), plates_of(site)
                    value = pair.model.nodes[name]["value"]
                    try:
                        rows = arrange(name, value, event_dim, plates, rank, True)
                    except ValueError:
                        _raise_unvectorised(name, "model")
                    row = arrange(name, site["value"], event_dim, plates, rank, False)
                    if not _close(rows[min(j, len(rows) - 1)], row[0], 0.25):
                        _raise_unvectorised(name, "model")


# --- helpers ----------------------------------------------------------------------------------


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


def arrange(name, tensor, event_dim, plates, rank, particles) -> torch.Tensor:
    """A site's tensor as (particles, *plates from left to right, *event).

    :param plates: plate name -> frame.
    :param rank: the plate nesting, without particles.
    :param particles: whether particles are along batch dimension -rank - 1.
    :raises ValueError: if a batch dimension of size > 1 is no plate, or not of its plate's size.
    """
    lead = rank + bool(particles)
    batch = tuple(tensor.shape[: tensor.dim() - event_dim])
    event = tuple(tensor.shape[tensor.dim() - event_dim :])
    while len(batch) > lead and batch[0] == 1:
        batch = batch[1:]
    padded = (1,) * (lead - len(batch)) + batch
    sizes = {frame.dim: frame.size for frame in plates.values()}
    expanded = list(padded)
    kept = list(padded[:1]) if particles else [1]
    fits = len(padded) == lead
    for dim in range(-rank, 0) if fits else ():
        size = sizes.get(dim, 1)
        found = padded[dim]
        size = found if size == -1 else size
        fits = fits and found in (1, size)
        expanded[dim] = size
        if dim in sizes:
            kept.append(size)
    if not fits:
        shown = ", ".join(f"'{n}' of size {f.size} at dim {f.dim}" for n, f in plates.items())
        raise ValueError(
            f"Site '{name}' has batch shape {batch} but its plates are {shown or 'none'}. Declare "
            "dimensions that are no plates with .to_event(...) (event_dim=... for "
            "pyro.deterministic), or put the site into a plate of that size."
        )
    return tensor.reshape(padded + event).expand((*expanded, *event)).reshape((*kept, *event))


def _from_left(plates: dict) -> list[str]:
    return sorted(plates, key=lambda name: plates[name].dim)


def _has_values(site: dict) -> bool:
    if site["type"] != "sample" or site_is_subsample(site) or site_is_factor(site):
        return False
    return torch.is_tensor(site["value"])


def _masked(tensor: torch.Tensor, site: dict, event_dim: int) -> torch.Tensor:
    """A site's tensor with NaN where the site is masked."""
    _, mask = split_mask(site)
    if not torch.is_tensor(mask) or bool(mask.all()):
        return tensor
    mask = mask.reshape(mask.shape + (1,) * event_dim)
    tensor = tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
    return torch.where(mask, tensor, tensor.new_full((), float("nan")))


def _varies(run: Run, name: str) -> bool:
    """Whether what a site observes differs between draws, so that it is a function of latents."""
    sites = [pair.model.nodes[name] for pair in run.pairs]
    value = sites[0]["value"]
    if run.vectorized:
        rank, event_dim = run.structure.max_plate_nesting, sites[0]["fn"].event_dim
        return run.num_particles > 1 and value.dim() - event_dim > rank and value.shape[0] > 1
    return any(
        other["value"].shape != value.shape or not _close(other["value"], value)
        for other in sites[1:]
    )


def _close(a: torch.Tensor, b: torch.Tensor, power: float = 0.5) -> bool:
    if not a.is_floating_point():
        return bool((a == b).all())
    tolerance = torch.finfo(a.dtype).eps ** power
    return torch.allclose(a, b.to(a), rtol=tolerance, atol=tolerance, equal_nan=True)


def _trim(part: Draws, plate: str | None, valid: int) -> Draws:
    """Drop the repeats that pad a minibatch."""
    for group in GROUPS if plate is not None else ():
        for variable in getattr(part, group).values():
            if plate in variable.plates:
                axis = 1 + variable.plates.index(plate)
                variable.values = variable.values.narrow(axis, 0, valid)
    return part


def _join(parts: list[Draws], plate: str | None) -> Draws:
    """Join minibatches of the same draws along a plate, or batches of draws (``plate=None``)."""
    joined = Draws(has_mixing=parts[0].has_mixing)
    if len(parts) == 1:
        return parts[0]
    for group in GROUPS:
        for name, first in getattr(parts[0], group).items():
            tensors = [getattr(part, group)[name].values for part in parts]
            if plate is not None and plate in first.plates:
                values = torch.cat(tensors, 1 + first.plates.index(plate))
            elif plate is not None:
                if group == "posterior" and not all(_close(t, tensors[0]) for t in tensors):
                    raise ValueError(
                        f"Site '{name}' is outside the subsampled plate '{plate}', but its value "
                        "changes with the minibatch, so it has no value for all data. Move it into "
                        "the plate, or do not subsample the plate."
                    )
                values = tensors[0]
            else:
                values = tensors[0] if group == "observed_data" else torch.cat(tensors)
            getattr(joined, group)[name] = Variable(values, first.plates)
    if plate is None:
        joined.log_p = torch.cat([part.log_p for part in parts])
        joined.log_q = torch.cat([part.log_q for part in parts])
    else:
        joined.log_p = sum(part.log_p for part in parts)
        joined.log_q = sum(part.log_q for part in parts)
    return joined


def _raise_dynamic(name: str):
    raise NotImplementedError(
        f"Site '{name}' is in some draws but not in others, so it has no array of draws. Give the "
        "model and the guide the same sites in every run."
    )


def _raise_unvectorised(name: str, where: str):
    raise ValueError(
        f"Site '{name}' of the {where} mixes draws: run for many draws at once it differs from a "
        "run for one of them. Index and reduce from the right (x[..., 0], x.sum(-1)), or pass "
        "vectorize_particles=False. (Randomness outside pyro.sample, such as dropout, has the "
        "same effect: switch it off by .eval().)"
    )


def _blame_nan(error, guide, args, kwargs) -> None:
    """Name the site of the guide whose draw is NaN, if that is what a failed run comes from."""
    with torch.random.fork_rng(), pyro.validation_enabled(False):
        try:
            trace = trace_inside(guide, args, kwargs)
        except Exception:  # the guide fails for another reason: the first error stands
            return
    for name, site in latent_sites(trace).items():
        value = site["value"]
        if torch.is_tensor(value) and value.is_floating_point():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"The draw at guide site '{name}' is NaN or inf. Check the guide's parameters "
                    "at this site; a fit that ended in NaN has to be repeated."
                ) from error
