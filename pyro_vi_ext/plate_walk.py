"""Visiting every element of a subsampled plate once, in minibatches."""

from __future__ import annotations

import pyro
import torch
from pyro.ops.provenance import (
    ProvenanceTensor,
    detach_provenance,
    extract_provenance,
    get_provenance,
)
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample

from pyro_vi_ext.roles import is_delta
from pyro_vi_ext.run import Run
from pyro_vi_ext.scoring import plates_of
from pyro_vi_ext.tracing import SharedSubsample, sample_sites, trace_pair

__all__ = ["PlateSubsample", "Walk"]

_LATENT = object()  # provenance of a value computed from latents


class Walk:
    """Minibatches that cover each index of the one subsampled plate exactly once.

    :ivar plate: its name, ``None`` without such a plate (then there is one minibatch, everything).
    :ivar frame: its frame in the plate stack.
    :ivar minibatches: pairs (indices, number of valid ones); the last is padded with repeats.
    """

    def __init__(self, reference: Run):
        self.plate, self.frame, self.minibatches = None, None, [(None, None)]
        frames = {}
        pair = reference.pairs[0]
        for trace in (pair.model, pair.guide):
            for name, site in sample_sites(trace).items():
                for frame in site["cond_indep_stack"]:
                    if frame.full_size in (None, frame.size):
                        continue
                    if not frame.vectorized:
                        raise NotImplementedError(
                            f"Site '{name}' is in the sequential plate '{frame.name}', which is "
                            f"subsampled ({frame.size} of {frame.full_size}), and cannot be "
                            "walked. Write it as a vectorised plate: with pyro.plate(...) as ind."
                        )
                    frames[frame.name] = frame
        if len(frames) > 1:
            names = ", ".join(f"'{name}'" for name in sorted(frames))
            raise NotImplementedError(
                f"Plates {names} are subsampled, and only one such plate can be walked. Export "
                "with full plates (pass no subsample_size), or with one of them subsampled."
            )
        for self.plate, self.frame in frames.items():
            full, size = self.frame.full_size, self.frame.size
            index = reference.subsample.indices[self.plate].new_tensor(range(full))
            self.minibatches = []
            for chunk in index.split(size):
                padded = chunk.repeat(-(-size // len(chunk)))[:size]
                self.minibatches.append((padded, len(chunk)))

    def check_indices(self, reference: Run) -> None:
        """What belongs to an index must be picked by the plate's indices.

        :raises ValueError: naming a site whose data do not carry the indices' provenance.
        :raises NotImplementedError: naming a point mass of the guide that does not.
        """
        if self.plate is None:
            return
        subsample = PlateSubsample()
        subsample.indices[self.plate] = ProvenanceTensor(
            self.minibatches[0][0], frozenset({self.plate})
        )
        run = reference
        with torch.random.fork_rng(), pyro.validation_enabled(False):
            pair = trace_pair(
                run.model, run.guide, run.args, run.kwargs, _Track(self.plate), subsample
            )
        for name, site in sample_sites(pair.guide).items():
            if self.plate in plates_of(site) and is_delta(site):
                self._check_point_mass(name, site)
        for name, site in sample_sites(pair.model).items():
            if site["is_observed"] and not site_is_factor(site) and self.plate in plates_of(site):
                self._check_data(name, get_provenance(site["value"]))

    def _check_data(self, name: str, provenance: frozenset) -> None:
        if self.plate in provenance or _LATENT in provenance:
            return
        full, size = self.frame.full_size, self.frame.size
        raise ValueError(
            f"The data of site '{name}' do not follow the indices of its subsampled plate "
            f"'{self.plate}' ({size} of {full}): they look like a minibatch passed as an argument, "
            f"which would be exported {-(-full // size)} times over. Pass all data and index them "
            f"in the model: with pyro.plate('{self.plate}', {full}, subsample_size={size}) as ind: "
            f"pyro.sample('{name}', ..., obs=data[ind]), or obs=pyro.subsample(data, event_dim=0). "
            "(data must be a tensor: a NumPy array loses track of the indices.)"
        )

    def _check_point_mass(self, name: str, site: dict) -> None:
        value = detach_provenance(site["value"])
        dim = self.frame.dim - site["fn"].event_dim
        if self.plate in get_provenance(site["value"]) or value.dim() < -dim:
            return
        if bool((value == value.narrow(dim, 0, 1)).all()):
            return
        raise NotImplementedError(
            f"Guide site '{name}' is a Delta in the subsampled plate '{self.plate}' whose value "
            "does not follow the plate's indices, as if the guide had coordinates for one "
            "minibatch only (AutoMultivariateNormal and its kin do). Use a guide that draws it "
            "within the plate, such as AutoNormal, or do not subsample."
        )


class PlateSubsample(SharedSubsample):
    """Shared, known indices; a plate that fixes other ones than all, in order, cannot be walked."""

    def _pyro_sample(self, msg):
        if site_is_subsample(msg) and msg["value"] is not None:
            given = detach_provenance(torch.as_tensor(msg["value"]))
            size = msg["fn"].size
            if len(given) != size or bool((given.cpu() != torch.arange(size)).any()):
                raise ValueError(
                    f"Plate '{msg['name']}' fixes its subsample ({len(given)} of {size} indices), "
                    "so it cannot be walked over all its data. Use subsample_size=... in its "
                    "place, and index the data with the indices that the plate returns."
                )
        super()._pyro_sample(msg)


class _Track(Messenger):
    """Marks draws: those in the plate as following its indices, the others as computed latents."""

    def __init__(self, plate: str):
        super().__init__()
        self.plate = plate

    def _pyro_post_sample(self, msg):
        if site_is_subsample(msg) or msg["is_observed"] or not torch.is_tensor(msg["value"]):
            return
        value, provenance = extract_provenance(msg["value"])
        if self.plate not in plates_of(msg):
            provenance = provenance | {_LATENT}
        elif not is_delta(msg):
            provenance = provenance | {self.plate}
        msg["value"] = ProvenanceTensor(value, provenance)
