r"""The pair run again from given values of some of the guide's draws.

Estimators for discrete draws ask what the log-weight would have been with one draw flipped, relaxed
or replaced by its mean. A *branch* of a run has C copies of its J particles. In each, given draws
have given values; what depends on them is drawn again, what does not stays as it is, and the
subsample is the run's.

In a relaxed branch the discrete draws that are not held are relaxed
(:mod:`~pyro_vi_ext.relaxations`), and log-probabilities are extended to their values linearly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace

from pyro_vi_ext.discrete import stacked
from pyro_vi_ext.paths import draws
from pyro_vi_ext.relaxations import LinearDensity, relaxation_of
from pyro_vi_ext.roles import guide_roles
from pyro_vi_ext.run import Run
from pyro_vi_ext.scoring import Term, pair_terms, site_log_prob
from pyro_vi_ext.tracing import (
    Substitute,
    broadcasting,
    latent_sites,
    sample_sites,
    signature,
    trace_pair,
)

__all__ = ["Branch", "Relaxing", "branch", "descendants"]


class Branch:
    """A branch, scored.

    :ivar run: as a run of C J particles, copies first.
    :ivar rows: the terms of its pairs.
    """

    def __init__(self, run: Run, rows: list[list[Term]]):
        self.run, self.rows = run, rows

    def signal(self, site) -> torch.Tensor:
        """The log-weight that a site can influence: (C, J, \\*batch), with gradients."""
        signal = site.signal_of(self.run, self.rows)
        signal = signal.expand((self.run.num_particles,) + signal.shape[1:])
        return signal.reshape((-1, site.run.num_particles) + signal.shape[1:])

    def total(self, site) -> torch.Tensor:
        """Its terms, each once: what to differentiate."""
        return site.total_of(self.run, self.rows)


def branch(
    run: Run,
    given: dict[str, torch.Tensor],
    copies: int = 1,
    relaxing: Callable[[], Relaxing] | None = None,
) -> Branch:
    r"""Run the pair from given draws.

    :param given: values of some draws: (C, J, \*batch, \*event).
    :param copies: C.
    :param relaxing: makes the :class:`Relaxing` of each pair; ``None``: all values are hard.
    :raises ValueError: if model or guide cannot be run at relaxed values, naming the sites.
    """
    num = run.num_particles
    new = copy.copy(run)
    new.num_particles, new.paths = copies * num, None
    new.vectorized = run.vectorized or (copies > 1 and run.vectorize_mixing)
    held = _held(run, set(given), copies)
    values = {name: value.flatten(0, 1) for name, value in given.items()} | held
    only_model = copies == 1 and _are_last(run, set(given))
    parts = [values] if new.vectorized else _separate(run, values, copies * num)
    new.pairs = []
    with broadcasting(new.vectorized) if relaxing is None else _relaxed(given):
        for k, part in enumerate(parts):
            around = [Substitute(part), *new._around({})]
            if relaxing is not None:
                around.insert(0, relaxing())
            if only_model:
                guide_trace = _replaced(run.pairs[k].guide, {n: part[n] for n in given}, around[0])
                new.pairs.append(run.model_at(guide_trace, *around))
            else:
                new.pairs.append(trace_pair(run.model, run.guide, run.args, run.kwargs, *around))
        scored = [pair_terms(new, pair) for pair in new.pairs]
    if is_validation_enabled() and not only_model:
        _check_held(run, [pair.guide for pair in new.pairs], held, list(given), copies)
        if relaxing is not None and held:
            _check_at_other_values(run, list(given), held)
    return Branch(new, [[*part.model, *part.guide.values()] for part in scored])


def _are_last(run: Run, changed: set[str]) -> bool:
    """Whether nothing in the guide comes after the changed draws: it need not run again."""
    names = list(sample_sites(run.pairs[0].guide))  # factors too
    effectful = isinstance(poutine.unwrap(run.guide), GuideMessenger)
    return not effectful and set(names[-len(changed) :]) == changed


def _replaced(guide_trace: Trace, values: dict, outermost: Messenger) -> Trace:
    """The guide's trace with other values of its last draws, relaxed if the branch is."""
    trace = guide_trace.copy()
    for name, value in values.items():
        node = trace.nodes[name] = {**trace.nodes[name], "value": value}
        node.pop("drawn_log_prob", None)
        if isinstance(outermost, Relaxing):
            node["fn"] = LinearDensity.of(node["fn"])
    return trace


def _held(run: Run, changed: set[str], copies: int) -> dict[str, torch.Tensor]:
    """Draws that depend on none of the changed ones, detached, C times."""
    trace = run.pairs[0].guide
    below = descendants(run)
    moved = changed.union(*(below[name] for name in changed))
    result = {}
    for name, site in draws(trace).items():
        if name in moved:
            continue
        values = [pair.guide.nodes[name]["value"].detach() for pair in run.pairs]
        value = stacked(run, values, site["fn"].event_dim)
        value = value.expand((run.num_particles,) + value.shape[1:])
        result[name] = value.repeat((copies,) + (1,) * (value.dim() - 1))
    return result


def _separate(run: Run, values: dict, total: int) -> list[dict]:
    """The values of each pair of an unvectorised run, with the shapes they had there."""
    nodes = [pair.guide.nodes for pair in run.pairs]
    return [
        {
            name: value[k].reshape(nodes[k % run.num_particles][name]["value"].shape)
            for name, value in values.items()
        }
        for k in range(total)
    ]


class _relaxed:
    """Validation is off, and an error says that values were relaxed."""

    def __init__(self, given: dict):
        self.names = ", ".join(repr(name) for name in given)
        self.validation = pyro.validation_enabled(False)

    def __enter__(self):
        self.validation.__enter__()

    def __exit__(self, kind, error, traceback):
        self.validation.__exit__(kind, error, traceback)
        user = (ValueError, RuntimeError, IndexError, TypeError)
        if not isinstance(error, user) or isinstance(
            error, torch.OutOfMemoryError | NotImplementedError
        ):
            return
        raise ValueError(
            f"Model or guide cannot be run at relaxed values of site {self.names}. Compute with "
            "the value as with a real number (b * w, probs @ table), not as an index or a "
            "condition; or use an objective that needs hard values only, such as TraceRLOO_ELBO. "
            f"Found: {error}"
        ) from error


class Relaxing(Messenger):
    """Replaces the discrete draws that have no value yet by relaxed ones; scores them linearly.

    The outermost of the handlers around a pair. Values drawn in the guide are the model's.

    :param names: the sites that are relaxed, with or without a given value.
    :param draw: makes a relaxed value: ``draw(name, relaxation, logits)``.
    """

    def __init__(self, names: Sequence[str], draw: Callable):
        super().__init__()
        self.names, self.draw = set(names), draw
        self.drawn: dict[str, torch.Tensor] = {}

    def _pyro_sample(self, msg):
        name = msg["name"]
        if name not in self.names or msg["is_observed"]:
            return
        relaxation, logits = relaxation_of(msg["fn"])
        if relaxation is None or not relaxation.relaxes_value:
            raise NotImplementedError(
                f"Site '{name}' ({type(msg['fn']).__name__}) cannot take relaxed values. Use "
                "Bernoulli or OneHotCategorical, or TraceRLOO_ELBO, which takes any distribution."
            )
        if name in self.drawn:
            msg["value"], msg["done"] = self.drawn[name], True
        elif not msg["done"]:
            msg["value"] = self.drawn[name] = self.draw(name, relaxation, logits)
            msg["done"] = True
        msg["fn"] = LinearDensity.of(msg["fn"])


def descendants(run: Run) -> dict[str, set[str]]:
    """For each draw of the guide, the names of the later draws that depend on it, also indirectly.

    Read off one run of the guide; where that is impossible, all later draws.
    """
    trace = run.pairs[0].guide
    key, known = ("descendants", signature(trace)), run.structure.chains
    if key not in known:
        known[key] = _descendants(run, trace)
    return known[key]


def _descendants(run: Run, trace) -> dict[str, set[str]]:
    names = list(latent_sites(trace))  # point masses too: they pass dependence on
    later = {name: set(names[i + 1 :]) for i, name in enumerate(names)}
    try:
        parents = guide_roles(run.guide, run.args, run.kwargs, {}, run.subsample).parents
    except Exception:  # a guide that cannot be followed: later draws are drawn again
        return later
    if not set(names) <= set(parents):
        return later
    below: dict[str, set[str]] = {}
    for name in reversed(names):
        children = {other for other in later[name] if name in parents[other]}
        below[name] = children.union(*(below[child] for child in children))
    return below


def _check_at_other_values(run: Run, changed: list[str], held: dict) -> None:
    """A relaxed value lies where its hard one does: an ``if`` would not tell them apart.

    Checked once for the sites of a guide, at all other hard values; the random state stays.
    """
    nodes = run.pairs[0].guide.nodes
    key = ("other values", *changed, signature(run.pairs[0].guide))
    if key in run.structure.checked:
        return
    relaxations = {name: relaxation_of(nodes[name]["fn"])[0] for name in changed}
    sizes = [nodes[n]["value"].shape[-1] if r.event_dim else 2 for n, r in relaxations.items()]
    for shift in range(1, max(sizes)):
        guides = []
        for pair in run.pairs:
            values = {name: pair.guide.nodes[name]["value"].detach() for name in [*changed, *held]}
            for name, relaxation in relaxations.items():
                b = values[name]
                values[name] = b.roll(shift, -1) if relaxation.event_dim else 1 - b
            with torch.random.fork_rng(), torch.no_grad():
                guides.append(run.guide_at(values))
        _check_held(run, guides, held, changed, 1)
    run.structure.checked.add(key)


@torch.no_grad()
def _check_held(run: Run, guides: list, held: dict, changed, copies: int) -> None:
    """What does not depend on the changed draws has the density it had, and so have they.

    :param guides: the guide's traces at the changed draws.

    :raises ValueError: naming a site of which this is not true.
    """
    before_guides = [pair.guide for pair in run.pairs]
    for name in draws(before_guides[0]):
        if name not in held and name not in changed:
            continue
        before = stacked(run, [site_log_prob(guide.nodes[name]) for guide in before_guides])
        before = before.expand((run.num_particles,) + before.shape[1:])
        before = before.repeat((copies,) + (1,) * (before.dim() - 1))
        values = [guide.nodes[name]["value"].detach() for guide in before_guides]
        if len(guides) == 1:  # all particles in one
            values = [stacked(run, values, before_guides[0].nodes[name]["fn"].event_dim)]
            values = [values[0].repeat((copies,) + (1,) * (values[0].dim() - 1))]
        after = stacked(
            run,
            [
                site_log_prob(guide.nodes[name], value=values[k % len(values)])
                for k, guide in enumerate(guides)
            ],
        )
        rounding = 10 * torch.finfo(before.dtype).eps ** 0.5 * (1 + before.abs())
        if not bool(((before - after).abs() <= rounding).all()):
            raise ValueError(
                f"The distribution of guide site '{name}' depends on an earlier discrete draw, and "
                "this cannot be seen in its graph. Compute it from the draw with torch operations "
                "(no .item(), numpy or if), or, if it is random by itself (dropout), switch that "
                "off."
            )
