"""Refusals: pairs whose draws would have no array, or no density, that holds for all data.

Each check names the site, what was found, and what to write instead.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch

from pyro_vi_ext.arrange import arrange, close, event_dim_of, raise_dynamic
from pyro_vi_ext.roles import is_delta
from pyro_vi_ext.run import Run
from pyro_vi_ext.scoring import Scored, Term, pair_terms, plates_of
from pyro_vi_ext.tracing import latent_sites, sample_sites, trace_inside

__all__ = ["blame_nan", "check_global", "check_structure", "check_vectorised", "soft_sites"]


def check_structure(run: Run, scored: Scored, plate: str | None) -> None:
    """The same sites in every draw; latents in the model's plates; no stray dimension."""
    model = sample_sites(run.pairs[0].model)
    for pair in run.pairs[1:]:
        for name in set(model) ^ set(sample_sites(pair.model)):
            raise_dynamic(name)
    guide = sample_sites(run.pairs[0].guide)
    for name, site in model.items():
        if name in guide and plate in plates_of(site):
            if plate not in plates_of(guide[name]):
                raise ValueError(
                    f"Site '{name}' is in the subsampled plate '{plate}' in the "
                    "model but not in the guide, so its draws cannot be matched to the data. "
                    "Put it into that plate in the guide."
                )
    for term in (*scored.model, *scored.guide.values()):
        rank = run.structure.max_plate_nesting
        arrange(term.name, term.log_prob, 0, term.plates, rank, run.vectorized)


def soft_sites(run: Run) -> set[str]:
    """Sites observed at what differs between draws: at a function of latents, which is no data."""
    sites = sample_sites(run.pairs[0].model)
    return {name for name, site in sites.items() if site["is_observed"] and _varies(run, name)}


def check_global(plate: str | None, rows: list[list[Term]], known: dict) -> None:
    """Terms outside the subsampled plate must not depend on the minibatch."""
    if plate is None:
        return
    for i, row in enumerate(rows):
        for term in row:
            if plate in term.plates:
                continue
            other = known.setdefault((i, term.sign, term.name), term.log_prob)
            if not close(term.log_prob, other):
                where = "model" if term.sign > 0 else "guide"
                raise ValueError(
                    f"Site '{term.name}' of the {where} is outside the subsampled plate "
                    f"'{plate}', but its log-probability changes with the minibatch, "
                    "so it has no value for all data. Move it into the plate, let it not "
                    "depend on the minibatch, or do not subsample the plate."
                )


def check_vectorised(run: Run, scored: Scored, reference: Run, run_alone: Callable) -> None:
    """Running a draw by itself must give what it has among the others.

    :param reference: a run of a single draw.
    :param run_alone: makes such a run with given indices of plates and values of guide sites.
    """
    pair, single = run.pairs[0], reference.pairs[0]
    rank = run.structure.max_plate_nesting
    for j in (0, run.num_particles - 1):
        given = {}
        for name, site in latent_sites(pair.guide).items():
            if is_delta(site):
                continue
            if name not in single.guide:
                raise_dynamic(name)
            value, event_dim = site["value"], site["fn"].event_dim
            if value.dim() - event_dim == rank + 1:
                value = value[j] if value.shape[0] > 1 else value[0]
            given[name] = value.reshape(single.guide.nodes[name]["value"].shape)
        alone = run_alone(run.subsample.indices, given)
        expected = pair_terms(alone, alone.pairs[0])
        terms = {(t.sign, t.name): t for t in (*scored.model, *scored.guide.values())}
        for term in (*expected.model, *expected.guide.values()):
            many = terms.get((term.sign, term.name))
            if many is None:
                raise_dynamic(term.name)
            rows = arrange(term.name, many.log_prob, 0, many.plates, rank, True)
            row = arrange(term.name, term.log_prob, 0, term.plates, rank, False)
            if not close(rows[min(j, len(rows) - 1)], row[0], 0.25):
                _raise_unvectorised(term.name, "model" if term.sign > 0 else "guide")
        for name, site in alone.pairs[0].model.nodes.items():
            if site["type"] == "sample" and site["infer"].get("_deterministic"):
                event_dim, plates = event_dim_of(reference, name), plates_of(site)
                value = pair.model.nodes[name]["value"]
                try:
                    rows = arrange(name, value, event_dim, plates, rank, True)
                except ValueError:
                    _raise_unvectorised(name, "model")
                row = arrange(name, site["value"], event_dim, plates, rank, False)
                if not close(rows[min(j, len(rows) - 1)], row[0], 0.25):
                    _raise_unvectorised(name, "model")


def blame_nan(error, guide, args, kwargs) -> None:
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


def _varies(run: Run, name: str) -> bool:
    """Whether what a site observes differs between draws, so that it is a function of latents."""
    sites = [pair.model.nodes[name] for pair in run.pairs]
    value = sites[0]["value"]
    if run.vectorized:
        rank, event_dim = run.structure.max_plate_nesting, sites[0]["fn"].event_dim
        return run.num_particles > 1 and value.dim() - event_dim > rank and value.shape[0] > 1
    return any(
        other["value"].shape != value.shape or not close(other["value"], value)
        for other in sites[1:]
    )


def _raise_unvectorised(name: str, where: str):
    raise ValueError(
        f"Site '{name}' of the {where} mixes draws: run for many draws at once it differs from a "
        "run for one of them. Index and reduce from the right (x[..., 0], x.sum(-1)), or pass "
        "vectorize_particles=False. (Randomness outside pyro.sample, such as dropout, has the "
        "same effect: switch it off by .eval().)"
    )
