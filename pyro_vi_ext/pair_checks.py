"""What is wrong with a model/guide pair, said before a number comes out of it.

Each check raises an error that names the site, says what was found and what to write instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyro.poutine as poutine
import torch
from pyro.poutine.util import site_is_factor, site_is_subsample

from pyro_vi_ext.code_sites import code_site
from pyro_vi_ext.roles import GuideRoles, is_delta
from pyro_vi_ext.tracing import Substitute, TracePair, latent_sites, sample_sites, trace_pair

if TYPE_CHECKING:
    from pyro_vi_ext.run import Run

__all__ = ["check_codes", "check_mixing", "check_plates", "check_single", "check_sites"]


def check_sites(pair: TracePair) -> None:
    """Every latent of the model has a guide site, and every guide site a reason to exist."""
    guide, model = sample_sites(pair.guide), sample_sites(pair.model)
    latents = {name for name, site in model.items() if not site["is_observed"]}
    for name, site in guide.items():
        auxiliary = site["infer"].get("is_auxiliary")
        if site_is_factor(site) and site["fn"].has_rsample is False:
            raise NotImplementedError(
                f"Guide site '{name}' is a factor whose noise has no path (has_rsample=False), and "
                "factors have no score-function term here. Write a distribution with log_prob "
                "instead of pyro.factor."
            )
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


def check_codes(pair: TracePair) -> None:
    """A probability of codes stands beside one, of the same codes."""
    guide, model = latent_sites(pair.guide), latent_sites(pair.model)
    for name in guide.keys() & model.keys():
        q, p = code_site(guide[name]["fn"]), code_site(model[name]["fn"])
        if getattr(q, "quantizer", None) is not getattr(p, "quantizer", None):
            raise ValueError(
                f"Site '{name}' is {_codes(guide[name], q)} in the guide and "
                f"{_codes(model[name], p)} in the model: a density beside a probability, or "
                "probabilities of other codes, make no bound. Write one quantizer in both: "
                "VectorQuantized(z_e, quantizer) in the guide, CodePrior(quantizer) in the model."
            )


def _codes(site: dict, fn) -> str:
    if fn is None:
        return f"a {type(site['fn']).__name__}"
    return f"a {type(fn).__name__} (codes of {type(fn.quantizer).__name__} {id(fn.quantizer):#x})"


def check_plates(pair: TracePair) -> None:
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


def check_mixing(roles: GuideRoles) -> None:
    """:raises NotImplementedError: if the guide has mixing variables, naming the first."""
    if roles.mixing:
        raise NotImplementedError(
            f"Guide site '{roles.mixing[0]}' is a mixing variable: other sites of the guide depend "
            "on it, so log q is the logarithm of an integral, which this objective does not "
            "estimate. Use SemiImplicitELBO (importance_weighted=True for a bound with several "
            f"weights), or make '{roles.mixing[0]}' a latent of the model."
        )


def check_single(run: Run, pair: TracePair) -> None:
    """The first particle, run alone, has the log-probabilities it has among the others."""
    values = {}
    for name, site in latent_sites(pair.guide).items():
        if is_delta(site):
            continue
        value, rank = site["value"][0], run.structure.ranks.get(name)
        while rank is not None and value.dim() > rank and value.shape[0] == 1:
            value = value.squeeze(0)
        if value.dim() != rank:
            return  # a site that the set-up pass did not see
        values[name] = value
    known = Substitute(values)
    with torch.random.fork_rng(), torch.no_grad(), poutine.block():
        inputs = (run.model, run.guide, run.args, run.kwargs, known, run.subsample)
        single, again = trace_pair(*inputs), trace_pair(*inputs)
        for side in ("guide", "model"):
            many, alone, repeated = (sample_sites(getattr(p, side)) for p in (pair, single, again))
            for name in many.keys() & alone.keys() & repeated.keys():
                try:
                    total, b, c = (log_prob(s[name]) for s in (many, alone, repeated))
                except (KeyError, NotImplementedError):  # a flow without an inverse
                    continue
                if total.dim() < -run.particle_dim or not torch.equal(b, c):
                    continue  # not in the particle plate; or random (dropout)
                # Rounding is relative to what is added up, not to a sum that may cancel.
                rounding = torch.finfo(b.dtype).eps ** 0.5 * b.abs().sum()
                a, b = total[0].sum(), b.sum()
                if not torch.isclose(a, b, rtol=0.0, atol=10 * float(rounding) + 1e-12):
                    raise ValueError(
                        f"Site '{name}' of the {side} has log-probability {b:.6g} for a draw "
                        f"run alone and {a:.6g} among {run.num_particles} vectorised "
                        "particles: the code mixes particles. Index with [..., i] and reduce "
                        "dimensions from the right, or pass vectorize_particles=False."
                    )


def log_prob(site: dict) -> torch.Tensor:
    """At another tensor of the same value: what a transform inverts here has no gradient, and it
    remembers its latest."""
    value = site["value"]
    if torch.is_tensor(value) and code_site(site["fn"]) is None:  # codes are known by their tensor
        value = value.detach()
    return site["fn"].log_prob(value, *site["args"], **site["kwargs"])
