"""Where a NaN or infinity comes from: parameters, gradients, data, values or densities of sites."""

from __future__ import annotations

import contextlib
import math

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.util import site_is_subsample
from torch.nn.utils import get_total_norm

__all__ = ["bad_gradients", "is_finite", "listed", "not_finite_sites"]


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all stored values are finite; the tensor may be sparse."""
    tensor = tensor.coalesce().values() if tensor.is_sparse else tensor
    return bool(tensor.isfinite().all())


def bad_gradients(named) -> list[str]:
    """Names of the parameters with a NaN or infinite gradient; one device synchronisation."""
    named = [(name, p) for name, p in named if p.grad is not None]
    dense = [p.grad._values() if p.grad.is_sparse else p.grad for _, p in named]
    if not dense or math.isfinite(float(get_total_norm(dense))):
        return []
    return [name for name, p in named if not is_finite(p.grad)]  # a norm may overflow by itself


def listed(noun: str, names) -> str:
    """Names for a message, at most five of them."""
    names = [f"'{name}'" for name in names]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{noun}{'s' if len(names) > 1 else ''} {shown}"


def not_finite_sites(model, guide, args, kwargs) -> list[str]:
    """Run guide and model once, and describe the sites with NaN or infinite values or densities."""
    found = []
    with torch.no_grad(), pyro.validation_enabled(False), contextlib.suppress(Exception):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        found += _describe(guide_trace, "guide", {})
        replayed = poutine.replay(model, trace=guide_trace)
        found += _describe(poutine.trace(replayed).get_trace(*args, **kwargs), "model", guide_trace)
    return found


def _describe(trace, where: str, seen) -> list[str]:
    found = []
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        density_ok = _density_is_finite(site)
        value = site["value"]
        number = int((~value.isfinite()).sum()) if isinstance(value, torch.Tensor) else 0
        if site["is_observed"] and number and (site["mask"] is None or not density_ok):
            found.append(f"data of observed site '{name}' ({number} of {value.numel()} entries)")
        elif number and not site["is_observed"] and name not in seen:
            found.append(f"value of site '{name}' in the {where} ({number} of {value.numel()})")
        elif not density_ok:
            found.append(f"log-density of site '{name}' in the {where}")
    return found


def _density_is_finite(site) -> bool:
    with contextlib.suppress(Exception):
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        mask = site["mask"]
        if isinstance(mask, bool):
            return is_finite(log_prob) if mask else True
        return is_finite(log_prob if mask is None else torch.where(mask, log_prob, 0.0))
    return True
