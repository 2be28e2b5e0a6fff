r"""The log joint of a NumPyro model as a polynomial in statistics of its latents.

.. math:: \log p(x, z) = \sum_{\text{sites } s} c_s \sum m_s \log p(v_s \mid \theta_s(z))

with the scales c and masks m of the sites. The model is traced once, from latents to the parameters
:math:`\theta_s` of its distributions; their log-densities are those of :mod:`.densities`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import numpy as np
import numpyro.distributions as dist
from numpyro import handlers

from pyro_vi_ext.cavi.algebra import Algebra, broadcast, contract_known
from pyro_vi_ext.cavi.densities import DENSITIES, density_of
from pyro_vi_ext.cavi.families import FAMILIES
from pyro_vi_ext.cavi.interpreter import Interpreter, Poison, expr
from pyro_vi_ext.cavi.symbolic import (
    Atom,
    Expr,
    Known,
    Label,
    NotRepresentable,
    Term,
    merged,
    simplified,
)

__all__ = ["Derivation", "Latent", "NotConjugateError", "derive"]


class NotConjugateError(NotImplementedError):
    """A model whose coordinate updates have no closed form; the message names the site and why."""


@dataclass(frozen=True)
class Latent:
    """A latent site.

    :ivar name: its name.
    :ivar kind: name of its prior's distribution class.
    :ivar shape: shape of its value.
    :ivar num_values: of a discrete one: values are 0, ..., num_values - 1; otherwise 0.
    :ivar plates: its plates, with the axis of the value that each of them is.
    :ivar weight: product over its plates of size / subsample size.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    num_values: int = 0
    plates: tuple[tuple[str, int], ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Derivation:
    """The log joint, site by site.

    :ivar latents: the latents, in the order of the model.
    :ivar terms: the terms of the log joint; with the site that each comes from in ``sources``.
    :ivar plates: the label that a plate's axis has in all terms.
    :ivar hidden: of a latent that masks hide, whether they do, element by element.
    :ivar priors: the terms of a hidden latent's log-density where it is hidden. They are none of
        the log joint, and the only ones that these elements have.
    """

    latents: dict[str, Latent]
    terms: tuple[Term, ...]
    sources: tuple[str, ...]
    plates: dict[str, Label]
    hidden: dict[str, np.ndarray]
    priors: dict[str, tuple[Term, ...]]
    example: dict  # a draw from the prior
    draws: PriorDraws


def derive(model, args, kwargs, key) -> Derivation:
    """Trace a model and expand its log joint.

    :raises NotConjugateError: naming the site and what it was that is not representable.
    """
    record = _Record(model, args, kwargs, key)
    try:
        draws = PriorDraws(model, args, kwargs)
        example, latents = _latents(draws, key)
        traced, shapes = jax.make_jaxpr(record, return_shape=True)(example)
    except _LOOKS as error:
        raise NotConjugateError(
            "The model looks at a value in Python (an if, a loop bound, float(), NumPy, a boolean "
            f"index) that is known at run time only. {str(error).splitlines()[0]} Its structure "
            "must not depend on latents: select with jnp.where, index with arrays. What depends on "
            "data alone is known if computed with NumPy, or outside of the model."
        ) from error
    if not latents:
        raise NotConjugateError("The model has no latent sites: there is nothing to infer.")
    positive = {n for n, s in latents.items() if s.kind in _POSITIVE}
    unit = {n for n, s in latents.items() if s.kind == "Beta"}
    algebra = Algebra(positive, unit)
    inputs = [_symbol(latents[name]) for name in sorted(latents)]  # the order of a dict's leaves
    outputs = Interpreter(algebra).run(traced.jaxpr, traced.consts, inputs)
    values = jax.tree.unflatten(jax.tree.structure(shapes), outputs)
    terms, sources, plates = [], [], {n: Label(size) for n, size in record.plates.items()}
    hidden, priors = {}, {}
    for name, parameters in values.items():
        site = record.sites[name]
        log_p, masked, mask = _log_density(name, site, parameters, latents, algebra, plates)
        if masked:
            latent = latents[name]
            events = len(latent.shape) - mask.ndim
            mask = mask.reshape(mask.shape + (1,) * events)
            hidden[name] = np.broadcast_to(mask, latent.shape)
            priors[name] = tuple(map(contract_known, _added_up(masked, plates)))
        for term in _added_up(log_p, plates):
            term = contract_known(term)
            numbers = (term.coefficient, *(known.array for known in term.knowns))
            if not all(np.isfinite(x).all() for x in numbers):
                raise NotConjugateError(
                    f"Site '{name}' ({record.sites[name]['fn']}): its log-density has a number "
                    "that is infinite or NaN. Is there an unmasked missing value, a value outside "
                    "of the support, or a known probability, rate or scale of 0?"
                )
            terms.append(term)
            sources.append(name)
    return Derivation(latents, tuple(terms), tuple(sources), plates, hidden, priors, example, draws)


_LOOKS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
_AUGMENTATIONS = {
    "BernoulliLogits": "PolyaGammaReparam",
    "BinomialLogits": "PolyaGammaReparam",
    "NegativeBinomialLogits": "PolyaGammaReparam",
    "NegativeBinomialProbs": "CRTReparam",
}
_POSITIVE = {"Gamma", "Exponential", "InverseGamma", "Beta", "Dirichlet", "LogNormal"}


def _latents(draws: PriorDraws, key) -> tuple[dict, dict[str, Latent]]:
    example, latents = draws(key), {}
    for name, site in draws.sites.items():
        base = unwrapped(site["fn"])[0]
        family = FAMILIES.get(type(base).__name__)  # tables: one with a statistic of the value
        linear = family is not None and "pow1" in family.keys
        num_values = 0 if linear or not base.support.is_discrete else _num_values(name, base)
        rank = len(site["fn"].batch_shape)
        plates = tuple((f.name, rank + f.dim) for f in site["cond_indep_stack"])
        weight = float(np.prod([draws.plates[plate] for plate, _ in plates], initial=1.0))
        shape = np.shape(example[name])
        latents[name] = Latent(name, type(base).__name__, shape, num_values, plates, weight)
    return example, latents


class PriorDraws:
    """Draws of all latents from the prior: a function of a key, compiled once.

    :ivar sites: the latents' sites in the trace, after the first draw.
    :ivar plates: size / subsample size of each plate.
    """

    def __init__(self, model, args, kwargs):
        self.model, self.args, self.kwargs = model, args, kwargs
        self.sites: dict = {}
        self.plates: dict[str, float] = {}
        self._draw = None

    def __call__(self, key) -> dict:
        if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.key_data(key)
        if self._draw is None:
            self._draw = compiled(self._traced, key)
        return jax.tree.map(np.asarray, self._draw(key))

    def _traced(self, key) -> dict:
        trace = handlers.trace(handlers.seed(self.model, key)).get_trace(*self.args, **self.kwargs)
        latent = {n: s for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
        kept = ("fn", "cond_indep_stack")
        self.sites.update({n: {key: s[key] for key in kept} for n, s in latent.items()})
        plates = {n: s["args"] for n, s in trace.items() if s["type"] == "plate"}
        self.plates.update({n: size / (part or size or 1) for n, (size, part) in plates.items()})
        return {name: site["value"] for name, site in latent.items()}


def compiled(function, *args):
    """A function compiled in a hurry, for what runs once or twice: optimising it takes longer."""
    fast = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function).lower(*args).compile(compiler_options=fast)


def _num_values(name: str, fn) -> int:
    if not getattr(fn, "has_enumerate_support", False):
        raise NotConjugateError(
            f"Latent site '{name}' ({type(fn).__name__}) is discrete without a finite support, "
            "which has no closed-form factor here. Use Categorical or Bernoulli."
        )
    values = np.asarray(fn.enumerate_support(expand=False)).reshape(-1)
    if not np.array_equal(values, np.arange(len(values))):
        raise NotConjugateError(f"Latent site '{name}' has values {values}, expected 0, 1, ...")
    return len(values)


def unwrapped(fn):
    """A distribution without its wrappers, its masks, and how many axes its events claim.

    Each mask comes with how many of the claimed axes are on its right.
    """
    masks, claimed = [], 0
    while True:
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((fn._mask, claimed))
        elif isinstance(fn, dist.Independent):
            claimed += fn.reinterpreted_batch_ndims
        elif not isinstance(fn, dist.ExpandedDistribution):
            return fn, [(mask, claimed - before) for mask, before in masks], claimed
        fn = fn.base_dist


class _Record:
    """The model as a function from latents to what its log-densities need."""

    def __init__(self, model, args, kwargs, key):
        self.model, self.args, self.kwargs, self.key = model, args, kwargs, key
        self.sites: dict[str, dict] = {}
        self.plates: dict[str, int] = {}

    def __call__(self, values: dict) -> dict:
        model = handlers.substitute(handlers.seed(self.model, self.key), data=values)
        trace = handlers.trace(model).get_trace(*self.args, **self.kwargs)
        result = {}
        for name, site in trace.items():
            if site["type"] != "sample":
                continue
            whole = site["fn"]
            fn, masks, claimed = unwrapped(whole)
            found = density_of(fn)
            if found is None:
                raise NotConjugateError(
                    f"Site '{name}' has the distribution {type(fn).__name__}, whose expected "
                    f"log-density is not known here. Supported: {', '.join(sorted(DENSITIES))}."
                    f"{_hint(name, type(fn).__name__)}"
                )
            scale = site.get("scale")
            result[name] = {
                "parameters": found.parameters(fn),
                "value": site["value"],
                "masks": [mask for mask, _ in masks],
                "scales": [] if scale is None else [scale],
            }
            self.sites[name] = {
                "density": found,
                "fn": type(fn).__name__,
                "shape": whole.batch_shape + whole.event_shape[:claimed],
                "event_dim": fn.event_dim,
                "masks": [right for _, right in masks],
                "claimed": claimed,
                "frames": site["cond_indep_stack"],
            }
            for frame in site["cond_indep_stack"]:
                size = self.plates.setdefault(frame.name, frame.size)
                if size != frame.size:
                    raise NotConjugateError(
                        f"Plate '{frame.name}' has {size} and {frame.size} rows in one model. Give "
                        "its two uses different names."
                    )
        return result


def _symbol(latent: Latent) -> Expr:
    """The value of a latent as a symbolic array."""
    labels = tuple(Label(size) for size in latent.shape)
    if not latent.num_values:
        return Expr(labels, (Term(1.0, (), (Atom(latent.name, ("pow", 1), labels),)),))
    k = Label(latent.num_values)
    values = Known(np.arange(latent.num_values, dtype=float), (k,))
    return Expr(labels, (Term(1.0, (values,), (Atom(latent.name, ("onehot",), (*labels, k)),)),))


def _added_up(terms: list[Term], plates: dict[str, Label]) -> list[Term]:
    return merged(simplified(terms, ()), plates.values())


def _log_density(name, site, found, latents, algebra, plates):
    """The terms of a site's log-density, summed; axes of plates have the plates' labels.

    :returns: the terms; those of a latent where masks hide it, and where that is.
    """
    for key, value in {**found["parameters"], "value": found["value"]}.items():
        if isinstance(value, Poison):
            raise NotConjugateError(
                f"Site '{name}' ({site['fn']}): its {key} is no polynomial in statistics of the "
                f"latents, because of {value}.{_hint(name, site['fn'])}"
            )
    parameters = {key: expr(value) for key, value in found["parameters"].items()}
    value = found["value"]
    try:
        masks = zip(found["masks"], site["masks"], strict=False)
        weights = [_weight(x, right, "mask") for x, right in masks]
        is_hidden = name in latents and any((weight == 0).any() for weight in weights)
        num_masks = len(weights)
        if isinstance(value, np.ndarray) and weights:
            value = _filled(value, weights, site)
        weights += [_weight(x, site["claimed"], "scale") for x in found["scales"]]
        log_p = site["density"].log_density(algebra, expr(value), parameters)
        shape = np.broadcast_shapes(log_p.shape, site["shape"], *(w.shape for w in weights))
        right = len(shape) - site["claimed"]
        labels = {right + frame.dim: plates[frame.name] for frame in site["frames"]}

        def summed(*weights: np.ndarray) -> list[Term]:
            total = broadcast(log_p, shape)
            for weight in weights:
                total = total * broadcast(Expr.of(weight), shape)
            total = total.relabelled([labels.get(axis, Label(n)) for axis, n in enumerate(shape)])
            total = total.sum(axis for axis in range(len(shape)) if axis not in labels)
            return [term.counting(total.labels) for term in total.terms]

        if not is_hidden:
            return summed(*weights), [], None
        mask = np.broadcast_to(functools.reduce(np.multiply, weights[:num_masks]), shape) == 0
        scale = np.asarray(latents[name].weight)
        return summed(*weights), summed(mask.astype(float), scale), mask
    except NotRepresentable as error:
        raise NotConjugateError(
            f"Site '{name}' ({site['fn']}): its log-density is no polynomial in statistics of the "
            f"latents, because of {error}.{_hint(name, site['fn'])}"
        ) from error


def _hint(name: str, kind: str) -> str:
    """What makes a likelihood conditionally conjugate, if anything."""
    augmentation = _AUGMENTATIONS.get(kind)
    if augmentation is None:
        return ""
    return (
        " With an auxiliary latent it is conditionally conjugate: "
        f"CAVI(numpyro.handlers.reparam(model, config={{'{name}': {augmentation}()}}), ...), "
        "from pyro_vi_ext.cavi."
    )


def _weight(x, right: int, what: str) -> np.ndarray:
    """A mask or a scale as an array, with axes of size 1 for what events claim on its right."""
    if isinstance(x, Expr | Poison):
        raise NotRepresentable(f"a {what} that depends on latents")
    x = np.asarray(x, float)
    return x.reshape(x.shape + (1,) * right) if x.ndim else x


def _filled(value: np.ndarray, masks: list, site: dict) -> np.ndarray:
    """A known value that is no longer NaN where masks hide it."""
    mask = functools.reduce(np.multiply, masks)
    mask = mask.reshape(mask.shape + (1,) * site["event_dim"]) if mask.ndim else mask
    return np.where((mask == 0) & np.isnan(value), 0.5, value)  # in the interior of all supports
