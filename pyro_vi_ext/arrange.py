"""Arrays of draws: laid out by the plates of a site, trimmed, and joined along plate or draws."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pyro_vi_ext.run import Run
from pyro_vi_ext.scoring import plates_of, split_mask

__all__ = ["Draws", "Variable", "arrange", "event_dim_of", "from_left", "join", "masked", "trim"]

GROUPS = ("posterior", "log_likelihood", "posterior_predictive", "observed_data")


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
    """All that is drawn: groups of variables by site name, and one number per draw.

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


def from_left(plates: dict) -> list[str]:
    """Names of the plates in the order of their dimensions."""
    return sorted(plates, key=lambda name: plates[name].dim)


def event_dim_of(run: Run, name: str) -> int:
    """Event dimensions of a deterministic site, which Pyro takes all to be by default."""
    site = run.pairs[0].model.nodes.get(name)
    if site is None:
        raise_dynamic(name)
    value, plates = site["value"], plates_of(site)
    declared = min(site["fn"].event_dim, value.dim())
    if declared < value.dim():
        return declared
    depth = -min((frame.dim for frame in plates.values()), default=0)
    for event_dim in range(max(0, value.dim() - depth), value.dim()):
        try:
            arrange(name, value, event_dim, plates, run.structure.max_plate_nesting, False)
            return event_dim
        except ValueError:
            continue
    return value.dim()


def masked(tensor: torch.Tensor, site: dict, event_dim: int) -> torch.Tensor:
    """A site's tensor with NaN where the site is masked."""
    _, mask = split_mask(site)
    if not torch.is_tensor(mask) or bool(mask.all()):
        return tensor
    mask = mask.reshape(mask.shape + (1,) * event_dim)
    tensor = tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
    return torch.where(mask, tensor, tensor.new_full((), float("nan")))


def trim(part: Draws, plate: str | None, valid: int) -> Draws:
    """Drop the repeats that pad a minibatch."""
    for group in GROUPS if plate is not None else ():
        for variable in getattr(part, group).values():
            if plate in variable.plates:
                axis = 1 + variable.plates.index(plate)
                variable.values = variable.values.narrow(axis, 0, valid)
    return part


def join(parts: list[Draws], plate: str | None) -> Draws:
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
                if group == "posterior" and not all(close(t, tensors[0]) for t in tensors):
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


def close(a: torch.Tensor, b: torch.Tensor, power: float = 0.5) -> bool:
    """Whether two tensors agree to within ``eps ** power``."""
    if not a.is_floating_point():
        return bool((a == b).all())
    tolerance = torch.finfo(a.dtype).eps ** power
    return torch.allclose(a, b.to(a), rtol=tolerance, atol=tolerance, equal_nan=True)


def raise_dynamic(name: str):
    """:raises NotImplementedError: always."""
    raise NotImplementedError(
        f"Site '{name}' is in some draws but not in others, so it has no array of draws. Give the "
        "model and the guide the same sites in every run."
    )
