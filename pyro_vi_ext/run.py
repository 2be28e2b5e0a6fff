"""One evaluation of a model/guide pair: all of its particles on one subsample.

Every objective sees a pair through a :class:`Run`. It owns what Pyro leaves to each loss: the
particle plate, the plate nesting (found without consuming random numbers), the roles of the guide's
sites, and the checks a user's mistake must not survive.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import pyro.poutine as poutine
import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.util import check_model_guide_match, check_site_shape

from pyro_vi_ext.pair_checks import (
    check_codes,
    check_mixing,
    check_plates,
    check_single,
    check_sites,
)
from pyro_vi_ext.roles import GuideRoles, guide_roles
from pyro_vi_ext.tracing import (
    PARTICLE_PLATE,
    OuterPlate,
    SharedSubsample,
    Substitute,
    TracePair,
    broadcasting,
    latent_sites,
    replay_pair,
    sample_sites,
    signature,
    trace_guide,
    trace_pair,
)

__all__ = ["Run", "Structure"]


@dataclass(frozen=True)
class Structure:
    """What a set-up pass learns of a pair: plate nesting (without particles), supports, roles."""

    max_plate_nesting: int
    supports: dict = field(repr=False)
    ranks: dict = field(repr=False)  # guide site -> dimensions of its value in a single run
    roles: dict = field(default_factory=dict, repr=False)  # guide signature -> GuideRoles
    chains: dict = field(default_factory=dict, repr=False)  # guide signature -> bool, see paths.py
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


class Run:
    """One evaluation of a model/guide pair by an objective.

    :param vectorized: run the particles in one plate.
    :param vectorize_mixing: run extra draws of mixing variables in one plate (as the particles).
    :param subsample: a :class:`SharedSubsample`, if its indices are known beforehand.
    :param given: values of guide sites that are not to be drawn, one dict for each pair.
    :param paths: optional :class:`~pyro_vi_ext.paths.Paths`, for estimators that tell a draw's path
        from its density: what it makes of each guide trace is shown to the model, and is the
        guide's trace in ``pairs``.
    :param mixing: whether the guide may have mixing variables.
    :param check_alone: whether values of sites suffice to score them again, one particle alone.
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
        paths=None,
        mixing=True,
        check_alone=True,
    ):
        self.structure = structure
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.num_particles = num_particles
        self.vectorized = vectorized
        self.vectorize_mixing = vectorized if vectorize_mixing is None else vectorize_mixing
        self.subsample = SharedSubsample() if subsample is None else subsample
        self.particle_dim = -structure.max_plate_nesting - 1
        self.paths, self._mixing, self._check_alone = paths, mixing, check_alone
        given = [{}] * (1 if vectorized else num_particles) if given is None else given
        show = None if paths is None else functools.partial(paths.show, self)
        with broadcasting(vectorized):
            self.pairs = [
                trace_pair(model, guide, args, kwargs, *self._around(values), tap=paths, show=show)
                for values in given
            ]
        for pair in self.pairs:
            self._check(pair)

    def _around(self, values: dict) -> list[Messenger]:
        known = [Substitute(values)] if values else []
        plate = [self.outer_plate(PARTICLE_PLATE, self.num_particles)] if self.vectorized else []
        return [*known, *plate, self.subsample]

    def again(self) -> Run:
        """Another evaluation on the same subsample."""
        return Run(
            self.structure,
            self.model,
            self.guide,
            self.args,
            self.kwargs,
            num_particles=self.num_particles,
            vectorized=self.vectorized,
            vectorize_mixing=self.vectorize_mixing,
            subsample=self.subsample,
            mixing=self._mixing,
            check_alone=self._check_alone,
        )

    def guide_at(self, values: dict) -> Trace:
        """The guide again, of all particles (or of one, if sequential), at the given values."""
        with broadcasting(self.vectorized):
            return trace_guide(self.guide, self.args, self.kwargs, *self._around(values))

    def model_at(self, guide_trace: Trace, *messengers) -> TracePair:
        """The model replayed against a trace of the guide, inside messengers."""
        return replay_pair(self.model, guide_trace, self.args, self.kwargs, *messengers)

    def outer_plate(self, name: str, size: int) -> OuterPlate:
        """A plate left of all the model's plates."""
        return OuterPlate(name, size, self.particle_dim)

    def trace_guide(self, *messengers) -> Trace:
        """Trace the guide again on the same subsample, inside further messengers."""
        with broadcasting(self.vectorize_mixing):
            return trace_guide(self.guide, self.args, self.kwargs, *messengers, self.subsample)

    @property
    def roles(self) -> GuideRoles:
        return self._roles(self.pairs[0].guide)

    def _roles(self, guide_trace: Trace) -> GuideRoles:
        key = signature(guide_trace)
        known = self.structure.roles
        if key not in known:
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
                known[key] = roles
            else:
                known[key] = GuideRoles()
        return known[key]

    def _check(self, pair: TracePair) -> None:
        validate = is_validation_enabled()
        key = (signature(pair.guide, validate), signature(pair.model, validate), validate)
        if key in self.structure.checked:
            return
        check_sites(pair)
        check_codes(pair)
        check_plates(pair)
        if not self._mixing:
            check_mixing(self.roles)
        if validate:
            nesting = self.structure.max_plate_nesting + int(self.vectorized)
            check_model_guide_match(pair.model, pair.guide, nesting)
            effectful = isinstance(poutine.unwrap(self.guide), GuideMessenger)
            if self.vectorized and self._check_alone and not effectful:
                check_single(self, pair)
        if len(self.structure.checked) > 1000:  # every batch has another shape
            self.structure.checked.clear()
        self.structure.checked.add(key)
