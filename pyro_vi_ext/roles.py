r"""What each site of a guide is for.

A *mixing* site is an auxiliary site (``infer={"is_auxiliary": True}``) on which the distribution of
another, non-``Delta`` site of the guide directly depends: it is the noise :math:`\psi` of a
semi-implicit guide (arXiv:1805.11183). Every other site is a *conditional*: its
density belongs to :math:`\log q`. In particular the auxiliary latent that ``AutoNormal`` or
``AutoMultivariateNormal`` samples in unconstrained coordinates feeds only ``Delta`` sites, and is a
conditional.

Dependence is read off one run of the guide in which the value of every stochastic site carries its
name (Pyro's provenance tracking), so that ``z2`` given ``z1`` given ``psi`` depends on ``z1`` only.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import Delta
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch.distributions import Distribution, biject_to

from pyro_vi_ext.code_sites import VectorQuantized, code_site

__all__ = ["GuideRoles", "TrackSites", "guide_roles"]


@dataclass(frozen=True)
class GuideRoles:
    """Dependence among the sites of a guide.

    :param parents: site name -> names of the stochastic guide sites its distribution directly
        depends on (auxiliary ``Delta`` sites are transparent).
    :param mixing: names of the mixing sites, in the order of the guide.
    :param deltas: names of the ``Delta`` sites.
    :param derived: auxiliary ``Delta`` sites that are functions of mixing variables.
    """

    parents: dict[str, frozenset[str]] = field(default_factory=dict)
    mixing: tuple[str, ...] = ()
    deltas: frozenset[str] = frozenset()
    derived: frozenset[str] = frozenset()

    @property
    def unscored(self) -> frozenset[str]:
        """Names of the sites whose density is no part of log q."""
        return self.derived | frozenset(self.mixing)

    def given_mixing(self) -> tuple[str, ...]:
        """Names of the conditionals q(z | psi) that directly depend on a mixing site."""
        mixing, skip = set(self.mixing), self.unscored
        return tuple(n for n, up in self.parents.items() if n not in skip and up & mixing)

    def delta_children(self, name: str) -> tuple[str, ...]:
        """Names of the ``Delta`` sites that are functions of conditional ``name``."""
        return tuple(n for n in self.parents if n in self.deltas and name in self.parents[n])

    def conditional_parents(self, name: str) -> frozenset[str]:
        """The conditionals on which site ``name`` directly depends."""
        return self.parents.get(name, frozenset()) - set(self.mixing)


def is_delta(site: dict) -> bool:
    """Whether a site is a point mass, whatever it is wrapped in: a ``Delta``, or one on a code."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta | VectorQuantized)


class TrackSites(Messenger):
    """Marks the value of every stochastic site with the site's name (direct dependence only)."""

    def _pyro_post_sample(self, msg):
        transparent = is_delta(msg) and msg["infer"].get("is_auxiliary")
        if site_is_subsample(msg) or msg["is_observed"] or transparent:
            return
        value = detach_provenance(msg["value"])
        if isinstance(value, torch.Tensor):
            msg["value"] = ProvenanceTensor(value, frozenset({msg["name"]}))


def _provenance(site: dict) -> frozenset[str]:
    try:
        result = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except KeyError:  # a flow without an inverse has no density at a marked value
        result = site["fn"].sample()
    return get_provenance(result) - {site["name"]}


def guide_roles(guide, args=(), kwargs=None, supports=None, subsample=None) -> GuideRoles:
    """Find the roles of a guide's sites in one run of it, without touching the random state.

    :param supports: optional dict, site name -> support of the model's latent of that name.
    :param subsample: optional :class:`~pyro_vi_ext.tracing.SharedSubsample` of the step.
    :raises ValueError: if nothing is seen to depend on an auxiliary site; if a ``Delta`` site is a
        function of a mixing site (its density cannot be averaged), or of auxiliary noise of another
        dimension (no change of variables).
    """
    with torch.random.fork_rng(), torch.no_grad(), pyro.validation_enabled(False):
        with poutine.block(), TrackSites(), subsample or nullcontext():
            trace = poutine.trace(guide).get_trace(*args, **(kwargs or {}))
        sites = {
            name: site
            for name, site in trace.nodes.items()
            if site["type"] == "sample"
            and not site_is_subsample(site)
            and not site["infer"].get("_deterministic")
            and isinstance(site["fn"], Distribution | pyro.distributions.Distribution)
        }
        parents = {name: frozenset(_provenance(site)) & set(sites) for name, site in sites.items()}

    deltas = frozenset(name for name, site in sites.items() if is_delta(site))
    transparent = deltas | {name for name, site in sites.items() if site_is_factor(site)}
    upstream = frozenset().union(*(parents[n] for n in sites if n not in transparent))
    mixing = tuple(n for n, s in sites.items() if s["infer"].get("is_auxiliary") and n in upstream)
    derived = frozenset(
        n for n in deltas if sites[n]["infer"].get("is_auxiliary") and parents[n] & set(mixing)
    )
    roles = GuideRoles(parents, mixing, deltas, derived)
    _check_used(sites, roles)
    _check_deltas(sites, roles, supports or {})
    return roles


def _check_used(sites: dict, roles: GuideRoles) -> None:
    used = frozenset().union(*roles.parents.values())
    for name, site in sites.items():
        if not site["infer"].get("is_auxiliary") or name in used or name in roles.deltas:
            continue
        if not site_is_factor(site):
            raise ValueError(
                f"Nothing in the guide is seen to depend on the auxiliary site '{name}'. If it is "
                "not needed, do not sample it. If it is, compute what depends on it with torch "
                "operations that return new tensors (no numpy, .item(), out= or assignment into a "
                "tensor), so that the dependence can be followed."
            )


def _check_deltas(sites: dict, roles: GuideRoles, supports: dict) -> None:
    for name, site in sites.items():
        auxiliary = [n for n in roles.parents[name] if sites[n]["infer"].get("is_auxiliary")]
        if isinstance(code_site(site["fn"]), VectorQuantized) and auxiliary:
            raise ValueError(
                f"Guide site '{name}' is the code of a function of the auxiliary site "
                f"'{min(auxiliary)}', so the probability of a code is an integral that is not "
                f"computed. Let the code depend on data and latents only, or make "
                f"'{min(auxiliary)}' a latent of the model."
            )
    for name in sites:
        direct = sorted(roles.parents[name] & set(roles.mixing))
        if name in roles.derived:
            continue
        if direct and (name in roles.deltas or site_is_factor(sites[name])):
            what = "a Delta" if name in roles.deltas else "a factor"
            raise ValueError(
                f"Guide site '{name}' is {what} that depends directly on the mixing variable "
                f"'{direct[0]}', so q({name}) has no density to average. Sample '{name}' from a "
                f"distribution with a density whose parameters depend on '{direct[0]}', for "
                "example a Normal around the same value."
            )
    for name, site in sites.items():
        children = roles.delta_children(name)
        if name in roles.mixing or not site["infer"].get("is_auxiliary") or not children:
            continue
        if any(len(roles.parents[child]) > 1 for child in children):
            continue  # several sources: their dimensions cannot be told apart
        source = detach_provenance(site["value"]).numel()
        sizes = [_unconstrained_size(sites[child], supports.get(child)) for child in children]
        target = None if None in sizes else sum(sizes)
        if target is not None and source != target:
            raise ValueError(
                f"Guide site '{name}' has {source} dimensions, but the Delta sites that are "
                f"functions of it ({', '.join(map(repr, children))}) have {target}: that is no "
                "change of variables, so log q is undefined. For a semi-implicit guide, sample "
                f"{', '.join(map(repr, children))} from a distribution with a density whose "
                f"parameters depend on '{name}'."
            )


def _unconstrained_size(site: dict, support) -> int | None:
    if support is None:
        return None
    try:
        return biject_to(support).inv(detach_provenance(site["value"])).numel()
    except NotImplementedError:
        return None
