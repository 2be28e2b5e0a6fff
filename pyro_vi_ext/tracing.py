"""Running a guide and a model together: one evaluation, all of its particles, one subsample.

Every objective sees a model/guide pair through a :class:`Run`. It owns what Pyro leaves to each
loss: the particle plate, the plate nesting (found without consuming random numbers), the roles of
the guide's sites, the checks a user's mistake must not survive, and one subsample of each plate
shared by every particle, re-scoring and extra draw of the step.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import pyro.poutine as poutine
import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_factor, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape

from pyro_vi_ext.roles import GuideRoles, guide_roles, is_delta

__all__ = ["MIXING_PLATE", "PARTICLE_PLATE", "Run", "SharedSubsample", "Structure", "TracePair"]

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


@dataclass(frozen=True)
class Structure:
    """What a set-up pass learns of a pair: plate nesting (without particles), supports, roles."""

    max_plate_nesting: int
    supports: dict = field(repr=False)
    ranks: dict = field(repr=False)  # guide site -> dimensions of its value in a single run
    roles: dict = field(default_factory=dict, repr=False)  # guide signature -> GuideRoles
    checked: set = field(default_factory=set, repr=False)  # signatures that passed every check

    @staticmethod
    def of(model, guide, args, kwargs, max_plate_nesting=float("inf")) -> Structure:
        """Run the pair once; random state and gradients are as they were before."""
        with torch.random.fork_rng(), torch.no_grad(), poutine.block():
            # Not the numbers of the first step: they would reappear in parameters made here.
            torch.manual_seed(int(torch.randint(2**62, (), device="cpu")))
            pair = trace_pair(model, guide, args, kwargs)
            if is_validation_enabled():  # weaker later: dims left of the plates hold the particles
                for trace in (pair.model, pair.guide):
                    trace.compute_log_prob()
                    for site in sample_sites(trace).values():
                        check_site_shape(site, float("inf"))
        if max_plate_nesting == float("inf"):
            nodes = [*pair.model.nodes.values(), *pair.guide.nodes.values()]
            stacks = [n["cond_indep_stack"] for n in nodes if n["type"] == "sample"]
            dims = [f.dim for stack in stacks for f in stack if f.vectorized]
            max_plate_nesting = -min(dims, default=0)
        supports = {
            name: site["fn"].support
            for name, site in sample_sites(pair.model).items()
            if not site["is_observed"] and hasattr(site["fn"], "support")
        }
        ranks = {name: site["value"].dim() for name, site in latent_sites(pair.guide).items()}
        return Structure(max_plate_nesting, supports, ranks)


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


def trace_pair(model, guide, args, kwargs, *messengers) -> TracePair:
    unwrapped = poutine.unwrap(guide)
    if isinstance(unwrapped, GuideMessenger):  # an effect-based guide runs the model by itself
        run_inside(unwrapped, args, kwargs, *messengers)
        model_trace, guide_trace = unwrapped.get_traces()
        return TracePair(guide_trace, model_trace)
    guide_trace = trace_inside(guide, args, kwargs, *messengers)
    model_trace = trace_inside(model, args, kwargs, ReplayMessenger(guide_trace), *messengers)
    return TracePair(guide_trace, model_trace)


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


class Run:
    """One evaluation of a model/guide pair by an objective.

    :param vectorized: run the particles in one plate.
    :param vectorize_mixing: run extra draws of mixing variables in one plate (as the particles).
    :param subsample: a :class:`SharedSubsample`, if its indices are known beforehand.
    :param given: values of guide sites that are not to be drawn, one dict for each pair.
    :ivar pairs: the particles' traces: a single vectorised :class:`TracePair` whose sites have the
        particles along ``particle_dim``, or ``num_particles`` pairs without such a dimension.
    :ivar roles: the :class:`~pyro_vi_ext.roles.GuideRoles` of the guide.
    :ivar particle_dim: batch dimension of the particle plate, left of all plates of the model.
    """

    def __init__(
        self,
        structure,
        model,
        guide,
        args,
        kwargs,
        *,
        num_particles,
        vectorized,
        vectorize_mixing=None,
        subsample=None,
        given=None,
    ):
        self.structure = structure
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.num_particles = num_particles
        self.vectorized = vectorized
        self.vectorize_mixing = vectorized if vectorize_mixing is None else vectorize_mixing
        self.subsample = SharedSubsample() if subsample is None else subsample
        self.particle_dim = -structure.max_plate_nesting - 1
        outer = [self.outer_plate(PARTICLE_PLATE, num_particles)] if vectorized else []
        given = [{}] * (1 if vectorized else num_particles) if given is None else given
        with broadcasting(vectorized):
            self.pairs = [
                trace_pair(model, guide, args, kwargs, *known, *outer, self.subsample)
                for known in ([Substitute(values)] if values else [] for values in given)
            ]
        for pair in self.pairs:
            self._check(pair)

    def outer_plate(self, name: str, size: int) -> OuterPlate:
        """A plate left of all the model's plates."""
        return OuterPlate(name, size, self.particle_dim)

    def trace_guide(self, *messengers) -> Trace:
        """Trace the guide again on the same subsample, inside further messengers."""
        with broadcasting(self.vectorize_mixing):
            return trace_inside(self.guide, self.args, self.kwargs, *messengers, self.subsample)

    @property
    def roles(self) -> GuideRoles:
        return self._roles(self.pairs[0].guide)

    def _roles(self, guide_trace: Trace) -> GuideRoles:
        signature = _signature(guide_trace)
        known = self.structure.roles
        if signature not in known:
            auxiliary = any(
                s["infer"].get("is_auxiliary") for s in latent_sites(guide_trace).values()
            )
            if auxiliary:
                supports = self.structure.supports
                roles = guide_roles(self.guide, self.args, self.kwargs, supports, self.subsample)
                missing = set(sample_sites(guide_trace)) ^ set(roles.parents)
                if missing:
                    raise NotImplementedError(
                        f"Guide site '{min(missing)}' is in one run of the guide and not in "
                        "another, so the roles of its sites cannot be told. Sample the same sites "
                        "in every call, or choose them by an argument of the guide."
                    )
                known[signature] = roles
            else:
                known[signature] = GuideRoles()
        return known[signature]

    def _check(self, pair: TracePair) -> None:
        validate = is_validation_enabled()
        key = (_signature(pair.guide, validate), _signature(pair.model, validate), validate)
        if key in self.structure.checked:
            return
        _check_sites(pair)
        _check_plates(pair)
        if validate:
            nesting = self.structure.max_plate_nesting + int(self.vectorized)
            check_model_guide_match(pair.model, pair.guide, nesting)
            if self.vectorized and not isinstance(poutine.unwrap(self.guide), GuideMessenger):
                self._check_single(pair)
        if len(self.structure.checked) > 1000:  # every batch has another shape
            self.structure.checked.clear()
        self.structure.checked.add(key)

    def _check_single(self, pair: TracePair) -> None:
        """The first particle, run alone, has the log-probabilities it has among the others."""
        values = {}
        for name, site in latent_sites(pair.guide).items():
            if is_delta(site):
                continue
            value, rank = site["value"][0], self.structure.ranks.get(name)
            while rank is not None and value.dim() > rank and value.shape[0] == 1:
                value = value.squeeze(0)
            if value.dim() != rank:
                return  # a site that the set-up pass did not see
            values[name] = value
        known = Substitute(values)
        with torch.random.fork_rng(), torch.no_grad(), poutine.block():
            run = (self.model, self.guide, self.args, self.kwargs, known, self.subsample)
            single, again = trace_pair(*run), trace_pair(*run)
            for side in ("guide", "model"):
                many, alone, repeated = (
                    sample_sites(getattr(p, side)) for p in (pair, single, again)
                )
                for name in many.keys() & alone.keys() & repeated.keys():
                    total, b, c = (_log_prob(s[name]) for s in (many, alone, repeated))
                    if total.dim() < -self.particle_dim or not torch.equal(b, c):
                        continue  # not in the particle plate; or random (dropout)
                    # Rounding is relative to what is added up, not to a sum that may cancel.
                    rounding = torch.finfo(b.dtype).eps ** 0.5 * b.abs().sum()
                    a, b = total[0].sum(), b.sum()
                    if not torch.isclose(a, b, rtol=0.0, atol=10 * float(rounding) + 1e-12):
                        raise ValueError(
                            f"Site '{name}' of the {side} has log-probability {b:.6g} for a draw "
                            f"run alone and {a:.6g} among {self.num_particles} vectorised "
                            "particles: the code mixes particles. Index with [..., i] and reduce "
                            "dimensions from the right, or pass vectorize_particles=False."
                        )


def _log_prob(site: dict) -> torch.Tensor:
    return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])


@contextmanager
def broadcasting(vectorized: bool):
    """Says what to do when code cannot be run for several draws at once."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as e:
        if not vectorized:
            raise
        raise ValueError(
            "Model or guide cannot be run for several draws at once. Let every operation broadcast "
            "over a batch dimension on the left (index with [..., i], reduce dimensions from the "
            f"right, expand data to the batch), or pass vectorize_particles=False. Found: {e}"
        ) from e


def _signature(trace: Trace, shapes: bool = False) -> tuple:
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


def _check_sites(pair: TracePair) -> None:
    """Every latent of the model has a guide site, and every guide site a reason to exist."""
    guide, model = sample_sites(pair.guide), sample_sites(pair.model)
    latents = {name for name, site in model.items() if not site["is_observed"]}
    for name, site in guide.items():
        auxiliary = site["infer"].get("is_auxiliary")
        if auxiliary and name in latents:
            raise ValueError(
                f"Guide site '{name}' is marked auxiliary but is a latent variable of the model. "
                "Remove infer={'is_auxiliary': True} from it, or rename it."
            )
        if site["is_observed"] and not site_is_factor(site):
            raise ValueError(
                f"Guide site '{name}' is observed: a guide is a distribution over latent variables "
                "only. Remove obs=..., or move the site to the model."
            )
        if not auxiliary and name in model and name not in latents:
            raise ValueError(
                f"Guide site '{name}' is observed in the model, so it is no latent variable. "
                "Remove it from the guide."
            )
        if not auxiliary and name not in model:
            raise ValueError(
                f"Guide site '{name}' is not in the model. If it is noise of the guide (a mixing "
                f"variable), write pyro.sample('{name}', ..., infer={{'is_auxiliary': True}}); "
                "otherwise give it the name of the model's latent it stands for."
            )
    for name in latents - set(guide):
        raise ValueError(
            f"Latent site '{name}' of the model is not in the guide. Add "
            f"pyro.sample('{name}', ...) to the guide, or observe the site; enumerated sites are "
            "supported by pyro.infer.TraceEnum_ELBO."
        )


def _check_plates(pair: TracePair) -> None:
    frames = {}
    for trace in (pair.model, pair.guide):
        for name, site in sample_sites(trace).items():
            for frame in site["cond_indep_stack"]:
                if not frame.vectorized:
                    continue
                other = frames.setdefault(frame.name, frame)
                if (other.dim, other.size) != (frame.dim, frame.size):
                    raise ValueError(
                        f"At site '{name}' plate '{frame.name}' has dim {frame.dim} and size "
                        f"{frame.size}, elsewhere dim {other.dim} and size {other.size}. Give the "
                        "plate the same dim and (sub)sample size in model and guide."
                    )
    in_model = {name for name, site in pair.model.nodes.items() if site["type"] == "sample"}
    for name, site in pair.guide.nodes.items():
        if site["type"] != "sample" or not site_is_subsample(site) or name in in_model:
            continue
        size, drawn = site["fn"].size, site["fn"].subsample_size
        if drawn is not None and drawn < size:
            raise ValueError(
                f"Plate '{name}' is subsampled ({drawn} of {size}) in the guide but is not in the "
                "model, so its latents cannot be matched to data. Use the model's plate name."
            )
