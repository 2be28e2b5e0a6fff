r"""Log-probabilities of a pair of traces, site by site, and the two ways to add them up.

A *term* is one site's unscaled log-probability with its mask applied, its scale, and its plates.
Objectives that are linear in the log-density add scaled terms (:func:`linear_bound`). A bound with
a logarithm outside an average over :math:`K` particles is formed per *unit*, one element of the
plates common to all terms, and only then scaled (:func:`log_mean_bound`):

.. math::

    \log w_{k,u} = \log p(x_u, z_{uk}) - \log q(z_{uk} \mid x_u), \qquad
    L = \sum_u s_u \log \frac{1}{K} \sum_{k=1}^K \exp(\log w_{k,u}).

The scale :math:`s_u` (:math:`N/B` under subsampling) never enters the exponential.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.util import check_site_shape
from torch.distributions import Independent

from pyro_vi_ext.has_values import has_values
from pyro_vi_ext.run import Run
from pyro_vi_ext.tracing import MIXING_PLATE, PARTICLE_PLATE, TracePair, is_flow, sample_sites

__all__ = ["Term", "check_finite", "linear_bound", "log_mean_bound", "pair_terms", "unit_plates"]


@dataclass
class Term:
    """One site's contribution to a log-weight.

    :ivar name: the site.
    :ivar log_prob: unscaled, masked log-probability in nats; batch shape of the site, with the
        particles (if vectorised) along the particle dimension.
    :ivar scale: positive number or tensor, N/B times any ``poutine.scale``.
    :ivar plates: the site's vectorised plates, plate name -> frame, without the particle plate.
    :ivar sign: +1 for the model, -1 for the guide.
    :ivar site: the site itself, for error messages.
    """

    name: str
    log_prob: torch.Tensor
    scale: float | torch.Tensor
    plates: dict
    sign: int
    site: dict | None = None


# --- from sites to terms ---------------------------------------------------------------------


@dataclass
class Scored:
    """Terms of the model, terms of the guide by name (no mixing sites), masks of the latents."""

    model: list[Term]
    guide: dict[str, Term]
    masks: dict[str, object]


def pair_terms(run: Run, pair: TracePair) -> Scored:
    """Score both traces of a pair.

    A mask of the model at a latent also masks the guide's density there, together with the
    auxiliary site of which a ``Delta`` is the image; where that density does not factor over the
    mask, the model's mask at the latent is dropped instead, which leaves the evidence unchanged.

    :raises ValueError: for a site masked in the guide but not in the model; for a density that
        cannot be evaluated. The site is named.
    """
    masks = latent_masks(run, pair)
    nesting = run.structure.max_plate_nesting + int(run.vectorized)
    model = []
    for name, site in sample_sites(pair.model).items():
        fn, mask = split_mask(site)
        mask = masks.get(name, mask) if not site["is_observed"] else mask
        if mask is not False:
            model.append(_term(site, fn, mask, +1, nesting))
    guide = {}
    for name, site in sample_sites(pair.guide).items():
        if name not in run.roles.unscored:
            fn, mask = split_mask(site)
            guide[name] = _term(site, fn, masks.get(name, mask), -1, nesting)
    return Scored(model, guide, masks)


def _term(site, fn, mask, sign, nesting) -> Term:
    log_prob = scale_and_mask(site_log_prob(site, fn), 1.0, mask)
    if is_validation_enabled():
        site["log_prob"] = log_prob
        check_site_shape(site, nesting)
        _check_batch(site, log_prob)
    return Term(site["name"], log_prob, site["scale"], plates_of(site), sign, site)


def _check_batch(site: dict, log_prob: torch.Tensor) -> None:
    """No batch dimension but those of plates: Pyro's own check lets some pass among particles."""
    dims = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    for d in range(-log_prob.dim(), 0):
        if d not in dims and log_prob.shape[d] != 1:
            raise ValueError(
                f"The log-probability of site '{site['name']}' has shape {tuple(log_prob.shape)}, "
                f"and dimension {d} belongs to no plate. Enclose the site in a pyro.plate, or use "
                ".to_event(...); if it is right for a single particle, the code does not broadcast "
                "over particles on the left: index with [..., i], reduce dimensions from the "
                "right, or pass vectorize_particles=False."
            )


def site_log_prob(site: dict, fn=None, value=None) -> torch.Tensor:
    """Unmasked, unscaled log-probability of a site's value; errors name the site."""
    if value is None and "drawn_log_prob" in site:
        return site["drawn_log_prob"]
    fn = site["fn"] if fn is None else fn
    value = site["value"] if value is None else value
    try:
        return fn.log_prob(value, *site["args"], **site["kwargs"])
    except (KeyError, ValueError, NotImplementedError) as e:
        if is_flow(fn) and not isinstance(e, ValueError):  # an inverse at its own draws, or none
            raise NotImplementedError(
                f"The density of site '{site['name']}' is needed at a given value, and the flow "
                f"{_flows(fn)} has no inverse. Use a flow with an inverse (affine_autoregressive, "
                "affine_coupling, spline), or an estimator that scores draws as they are drawn: "
                "gradient='pathwise'."
            ) from e
        raise type(e)(f"Cannot evaluate the density of site '{site['name']}': {e}") from e


def _flows(fn) -> str:
    while not hasattr(fn, "transforms") and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return ", ".join(type(transform).__name__ for transform in getattr(fn, "transforms", [fn]))


def plates_of(site: dict) -> dict:
    """The vectorised plates of a site, by name, without those of the particles."""
    return {
        f.name: f
        for f in site["cond_indep_stack"]
        if f.vectorized and f.name not in (PARTICLE_PLATE, MIXING_PLATE)
    }


def split_mask(site: dict):
    """A site's distribution without its outer masks, and all its masks as one (None: no mask)."""
    fn, mask = site["fn"], site["mask"]
    while isinstance(fn, MaskedDistribution):
        inner = fn._mask
        mask = inner if mask is None else mask & inner
        fn = fn.base_dist
    if mask is True:
        mask = None
    if not site["is_observed"]:
        base = fn
        while isinstance(base, Independent):
            base = base.base_dist
        if isinstance(base, MaskedDistribution):
            raise NotImplementedError(
                f"Latent site '{site['name']}' has a mask inside .to_event(), which masks part of "
                "an event. Mask whole events instead: apply .mask(...) after .to_event(...)."
            )
    return fn, mask


def latent_masks(run: Run, pair: TracePair) -> dict[str, object]:
    """The mask in force at each latent, for the model's density and the guide's alike."""
    model, guide, roles = sample_sites(pair.model), sample_sites(pair.guide), run.roles
    masks = {name: split_mask(site)[1] for name, site in model.items() if not site["is_observed"]}
    for name in list(guide):
        if name in roles.unscored or name in masks:
            continue
        children = [child for child in roles.delta_children(name) if child in masks]
        child_masks = [masks[child] for child in children]
        if all(mask is None for mask in child_masks):
            masks[name] = None
        elif len(children) == 1 and _factors_over(guide[name], child_masks[0]):
            masks[name] = child_masks[0]
        else:
            masks[name] = None
            masks.update(dict.fromkeys(children))
    for name, site in guide.items():
        if name not in roles.unscored:
            _check_guide_mask(name, split_mask(site)[1], masks[name])
    return masks


def _factors_over(site: dict, mask) -> bool:
    if isinstance(mask, bool):
        return True
    batch_shape = site["fn"].batch_shape
    try:
        return torch.broadcast_shapes(mask.shape, batch_shape) == batch_shape
    except RuntimeError:
        return False


def _check_guide_mask(name: str, guide_mask, mask) -> None:
    if guide_mask is None or guide_mask is mask or not has_values(guide_mask, mask):
        return
    if mask is None:
        hidden = True if guide_mask is False else not bool(guide_mask.all())
    elif mask is False:
        hidden = False
    elif guide_mask is False:
        hidden = bool(mask.any())
    else:
        hidden = bool((mask & ~guide_mask).any())
    if hidden:
        raise ValueError(
            f"Site '{name}' is masked in the guide where it is not masked in the model: its "
            "density would be missing from log q. Apply the same poutine.mask to the model, or "
            "remove it from the guide."
        )


# --- from terms to bounds --------------------------------------------------------------------


def linear_bound(terms: Iterable[Term], run: Run) -> torch.Tensor:
    """Mean over particles of the sum of signed, scaled terms: a scalar, in nats.

    :param terms: the terms of all pairs of the run.
    """
    total = 0.0
    for term in terms:
        log_prob = term.log_prob
        copies = 1
        if run.vectorized and log_prob.dim() >= -run.particle_dim:
            copies = log_prob.shape[run.particle_dim]
        if not run.vectorized:
            copies = run.num_particles
        scale = term.scale
        if isinstance(scale, numbers.Number):
            total = total + log_prob.sum() * (term.sign * scale / copies)
        else:
            total = total + (log_prob * scale).sum() * (term.sign / copies)
    return total


def unit_plates(terms: Iterable[Term]) -> dict:
    """The plates common to all terms: one element of them is a unit. Plate name -> frame."""
    common = None
    for term in terms:
        if common is None:
            common = dict(term.plates)
        else:
            common = {name: frame for name, frame in common.items() if name in term.plates}
    return common or {}


def sum_to_units(tensor: torch.Tensor, plates: dict, keep: int = 0) -> torch.Tensor:
    """Sum a batch over every dimension but the units' plates and ``keep`` leftmost ones."""
    dims = {frame.dim for frame in plates.values()}
    summed = [d for d in range(-tensor.dim() + keep, 0) if d not in dims and tensor.shape[d] != 1]
    return tensor.sum(summed, keepdim=True) if summed else tensor


def unit_scale(terms: Sequence[Term], plates: dict, what: str) -> float | torch.Tensor:
    """The one scale that all terms of a unit share.

    :raises ValueError: naming two sites whose scales differ within a unit.
    """
    first = terms[0]
    reference = _scale_per_unit(first, plates)
    for term in terms:
        scale = _scale_per_unit(term, plates) if term is not first else reference
        if scale is None or not _same_scale(scale, reference):
            raise ValueError(
                f"{what} needs one scale per unit, but site '{first.name}' has scale "
                f"{_show(first.scale)} and site '{term.name}' has {_show(term.scale)} (a unit is "
                f"one element of {_show_plates(plates)}). With subsampling every latent must be "
                "inside the subsampled plate, in model and guide, and poutine.scale must apply to "
                "all sites alike; otherwise use a single particle or an objective that is linear "
                "in the log-density."
            )
    return 1.0 if reference is None else reference


def _scale_per_unit(term: Term, plates: dict):
    scale = term.scale
    if isinstance(scale, numbers.Number):
        return float(scale)
    if scale.numel() == 1:
        return scale.reshape(())
    dims = {frame.dim for frame in plates.values()}
    for d in range(-scale.dim(), 0):
        if d not in dims and scale.shape[d] != 1:
            if not bool((scale == scale.narrow(d, 0, 1)).all()):
                return None
            scale = scale.narrow(d, 0, 1)
    return scale


def _same_scale(a, b) -> bool:
    if b is None:
        return False
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9)
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    a, b = (
        torch.broadcast_tensors(a.to(b), b)
        if a.dim() <= b.dim()
        else torch.broadcast_tensors(a, b.to(a))
    )
    return bool(torch.isclose(a, b, rtol=1e-6, atol=0.0).all())


def _show(scale) -> str:
    return f"{scale:g}" if isinstance(scale, numbers.Number) else f"of shape {tuple(scale.shape)}"


def _show_plates(plates: dict) -> str:
    if not plates:
        return "the whole model"
    return "plate " + " x ".join(f"'{name}'" for name in plates)


def log_weights(particles: Sequence[Sequence[Term]], plates: dict, run: Run) -> torch.Tensor:
    """log w[k, u]: particles along dimension 0, then one dimension per plate dim of the model.

    :param particles: the terms of each pair of the run (a single list when vectorised).
    """
    rank = run.structure.max_plate_nesting
    rows = []
    for terms in particles:
        total = 0.0
        for term in terms:
            shape = term.log_prob.shape
            log_prob = term.log_prob.reshape((1,) * (rank + 1 - len(shape)) + shape)
            total = total + term.sign * sum_to_units(log_prob, plates, keep=1)
        rows.append(total)
    log_w = rows[0] if len(rows) == 1 else torch.cat(rows, 0)
    return log_w.expand((run.num_particles,) + log_w.shape[1:])


def units(particles: Sequence[Sequence[Term]], run: Run) -> tuple[dict, float | torch.Tensor]:
    """The plates whose elements are the units of a multi-sample bound, and the units' scale.

    :param particles: the terms of each pair of the run (a single list when vectorised).
    :raises ValueError: naming two sites whose scales differ within a unit.
    """
    everything = [term for terms in particles for term in terms]
    plates = unit_plates(everything)
    return plates, unit_scale(everything, plates, f"A {run.num_particles}-sample bound")


def log_mean_bound(particles: Sequence[Sequence[Term]], run: Run) -> torch.Tensor:
    """The multi-sample bound of the module docstring: a scalar, in nats.

    :param particles: the terms of each pair of the run (a single list when vectorised).
    """
    plates, scale = units(particles, run)
    log_w = log_weights(particles, plates, run)
    per_unit = torch.logsumexp(log_w, 0) - math.log(run.num_particles)
    return (per_unit * scale).sum()


def check_finite(loss: torch.Tensor | float, terms: Iterable[Term]) -> None:
    """Raise a ValueError that names the first site to blame if the loss is NaN or infinite."""
    if math.isfinite(loss):
        return
    for term in terms:
        site, name = term.site, term.name
        if (
            site is not None
            and torch.is_tensor(site["value"])
            and site["value"].is_floating_point()
        ):
            if not bool(torch.isfinite(site["value"]).all()):
                if site["is_observed"]:
                    raise ValueError(
                        f"The data observed at site '{name}' contain NaN or inf. Remove those "
                        "entries, or impute them: pyro.sample(..., obs_mask=...)."
                    )
                raise ValueError(
                    f"The draw at latent site '{name}' is NaN or inf. Lower the learning rate, or "
                    "check the parameters of the guide at this site."
                )
        if not bool(torch.isfinite(term.log_prob).all()):
            where = "model" if term.sign > 0 else "guide"
            raise ValueError(
                f"The log-probability of site '{name}' in the {where} is NaN or inf, so the loss "
                f"is {float(loss)}. Check that its value lies in its support and that its "
                "parameters are valid; a lower learning rate often helps."
            )
    raise ValueError(f"The loss is {float(loss)} although every site's log-probability is finite.")
