"""Traces of a guide and of the model replayed against it, and the handlers they are made inside.

One subsample of each plate is shared by every particle, re-scoring and extra draw of a step.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pyro.poutine as poutine
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer.util import is_validation_enabled
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample

__all__ = ["MIXING_PLATE", "PARTICLE_PLATE", "SharedSubsample", "Substitute", "TracePair"]

PARTICLE_PLATE = "num_particles_vectorized"
MIXING_PLATE = "num_mixing_particles_vectorized"


class SharedSubsample(Messenger):
    """Draws the subsample of each plate once, and repeats it wherever the plate appears again.

    :raises ValueError: if a plate fixes ``subsample=...`` and another plate of the same name has
        drawn other indices already: the data would be scored against the wrong latents.
    """

    def __init__(self):
        super().__init__()
        self.indices: dict[str, torch.Tensor] = {}

    def _pyro_sample(self, msg):
        if not site_is_subsample(msg) or msg["name"] not in self.indices:
            return
        drawn, given = self.indices[msg["name"]], msg["value"]
        if given is not None and given is not drawn and not _same_indices(given, drawn):
            raise ValueError(
                f"Plate '{msg['name']}' fixes its subsample in one place and draws other indices "
                "in another (an AutoGuide draws its own unless told otherwise). Give both the same "
                "indices: pass create_plates=... to the AutoGuide, or use subsample_size in both."
            )
        msg["value"] = drawn
        msg["done"] = True

    def _pyro_post_sample(self, msg):
        if site_is_subsample(msg):
            self.indices.setdefault(msg["name"], msg["value"])


def _same_indices(a, b) -> bool:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.shape != b.shape:
        return False
    return not is_validation_enabled() or bool((a == b.to(a.device)).all())


class OuterPlate(IndepMessenger):
    """A full plate left of all others, as ``pyro.plate`` but without a subsample site."""

    def _process_message(self, msg):
        super()._process_message(msg)
        BroadcastMessenger._pyro_sample(msg)


class Substitute(Messenger):
    """Gives the named sample sites fixed values; their distributions stay the code's."""

    def __init__(self, values: dict[str, torch.Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


@dataclass
class TracePair:
    """A guide trace and the model trace replayed against it."""

    guide: Trace
    model: Trace


def sample_sites(trace: Trace) -> dict[str, dict]:
    """The sample sites of a trace that can carry a density, in order."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    }


def latent_sites(trace: Trace) -> dict[str, dict]:
    """The unobserved sample sites of a trace, in order."""
    return {n: s for n, s in sample_sites(trace).items() if not s["is_observed"]}


def trace_pair(model, guide, args, kwargs, *messengers, tap=None, show=None) -> TracePair:
    """Trace the guide, and the model replayed against it, both inside messengers.

    :param tap: optional messenger around the guide alone, inside all others.
    :param show: optional function of the guide's trace; what it returns stands for the guide's
        trace from then on, and is what the model sees.
    """
    unwrapped = poutine.unwrap(guide)
    around = messengers if tap is None else (*messengers, tap)
    if isinstance(unwrapped, GuideMessenger):  # an effect-based guide runs the model by itself
        model_trace, guide_trace = _trace_effectful(unwrapped, args, kwargs, *around)
        _score_flows(guide_trace)
        if show is None:
            return TracePair(guide_trace, model_trace)
    else:
        guide_trace = trace_inside(guide, args, kwargs, *around)
        _score_flows(guide_trace)
    if show is not None:
        guide_trace = show(guide_trace)
    return replay_pair(model, guide_trace, args, kwargs, *messengers)


def replay_pair(model, guide_trace, args, kwargs, *messengers) -> TracePair:
    """A guide's trace, and the model replayed against it inside messengers."""
    model_trace = trace_inside(model, args, kwargs, ReplayMessenger(guide_trace), *messengers)
    return TracePair(guide_trace, model_trace)


def _score_flows(guide_trace: Trace) -> None:
    """Score the draws of flows that remember only their latest: without an inverse, now or never.

    Adds ``"drawn_log_prob"`` to such a site: unmasked, unscaled.
    """
    for site in latent_sites(guide_trace).values():
        fn = site["fn"]
        while isinstance(fn, MaskedDistribution):
            fn = fn.base_dist
        if is_flow(fn):
            with suppress(KeyError, ValueError, NotImplementedError):  # said when it is needed
                site["drawn_log_prob"] = fn.log_prob(site["value"], *site["args"], **site["kwargs"])


def is_flow(fn) -> bool:
    """Whether a distribution has transforms that remember their latest input and output."""
    while not hasattr(fn, "transforms") and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return any(getattr(part, "_cache_size", 0) for part in getattr(fn, "transforms", ()))


def trace_guide(guide, args, kwargs, *messengers) -> Trace:
    """Trace a guide alone."""
    unwrapped = poutine.unwrap(guide)
    if isinstance(unwrapped, GuideMessenger):
        return _trace_effectful(unwrapped, args, kwargs, *messengers)[1]
    return trace_inside(guide, args, kwargs, *messengers)


def _trace_effectful(guide: GuideMessenger, args, kwargs, *messengers) -> tuple[Trace, Trace]:
    run_inside(guide, args, kwargs, *messengers)
    return guide.get_traces()


def run_inside(fn, args, kwargs, *messengers):
    """Call ``fn`` inside messengers, the last of which is the innermost."""
    if not messengers:
        return fn(*args, **kwargs)
    with messengers[0]:
        return run_inside(fn, args, kwargs, *messengers[1:])


def trace_inside(fn, args, kwargs, *messengers) -> Trace:
    """Trace ``fn`` inside messengers, the last of which is the innermost."""
    tracer = poutine.trace(lambda *a, **k: run_inside(fn, a, k, *messengers))
    return tracer.get_trace(*args, **kwargs)


def signature(trace: Trace, shapes: bool = False) -> tuple:
    """What the structural checks depend on; with shapes, also what the shape checks depend on."""
    return tuple(
        (
            name,
            type(site["fn"]),
            site["is_observed"],
            bool(site["infer"].get("is_auxiliary")),
            tuple(f[:3] if shapes else f[:2] for f in site["cond_indep_stack"]),
            getattr(site["fn"], "batch_shape", None) if shapes else None,
            getattr(site["fn"], "event_shape", None) if shapes else None,
        )
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
    )


@contextmanager
def broadcasting(vectorized: bool):
    """Says what to do when code cannot be run for several draws at once."""
    try:
        yield
    except (torch.OutOfMemoryError, NotImplementedError):  # no matter of shapes
        raise
    except (RuntimeError, IndexError) as e:
        if not vectorized:
            raise
        raise ValueError(
            "Model or guide cannot be run for several draws at once. Let every operation broadcast "
            "over a batch dimension on the left (index with [..., i], reduce dimensions from the "
            f"right, expand data to the batch), or pass vectorize_particles=False. Found: {e}"
        ) from e
