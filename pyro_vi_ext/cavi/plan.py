r"""From terms to a function: the expected log joint, and the test that every update is closed.

.. math:: F(\mathbb{E}[t_1], \ldots, \mathbb{E}[t_n]) = \mathbb{E}_q \log p(x, z)

holds if each term has exactly one allowed moment of each site. That is tested here, term by term;
it also makes a parallel update of all elements of a plate exact: no term then has two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from pyro_vi_ext.cavi.conjugacy import Use, make_block, make_factor, moment_of
from pyro_vi_ext.cavi.derivation import Derivation, NotConjugateError
from pyro_vi_ext.cavi.symbolic import Label, Term

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Moment:
    """An expected statistic of a factor at some entries; indices are positions in the arrays."""

    factor: str
    key: str
    entries: tuple  # a label, or (position of an index array, its labels)


@dataclass(frozen=True)
class Product:
    """A term: positions of its coefficient and of its known arrays, and its moments."""

    source: str
    coefficient: int
    knowns: tuple[tuple[int, tuple[Label, ...]], ...]
    moments: tuple[Moment, ...]

    @property
    def factors(self) -> set[str]:
        return {moment.factor for moment in self.moments}


@dataclass(frozen=True)
class Plan:
    """The expected log joint of a model: products of known arrays and moments.

    :ivar factors: the factors of q, by name: that of the site, or those of a block's sites.
    :ivar products: the terms.
    :ivar arrays: the numbers in them; other data of the same shapes have others.
    :ivar plates: the label of each plate's axis.
    :ivar priors: by factor, the terms that only its hidden elements have; none of F.
    :ivar hidden: by factor, the position of the array that says which elements are hidden.
    """

    factors: dict
    products: tuple[Product, ...]
    arrays: list
    plates: dict[str, Label] = field(default_factory=dict)
    priors: dict[str, tuple[Product, ...]] = field(default_factory=dict)
    hidden: dict[str, int] = field(default_factory=dict)

    @property
    def order(self) -> list[str]:
        """The order of updates: the discrete latents last, after what they select among."""
        return sorted(self.factors, key=lambda name: bool(self.factors[name].num_values))

    @property
    def structure(self) -> tuple:
        """All but the numbers: plans of one structure share compiled code."""
        shapes = tuple((array.shape, array.dtype.str) for array in self.arrays)
        every = [*self.products, *(p for own in self.priors.values() for p in own)]
        products = tuple((p.source, p.coefficient, _outline(p)) for p in every)
        return shapes, products, tuple(self.factors.values()), tuple(self.hidden.items())

    def with_arrays(self, arrays: list) -> Plan:
        return replace(self, arrays=arrays)

    def expected_log_joint(self, arrays, moments, *, of=None, without=None, xp=jnp):
        """F; or only its terms that have the factor ``of``, or only those ``without`` a factor."""
        total = 0.0
        for product in self.products:
            if (of is None or of in product.factors) and without not in product.factors:
                total = total + _value(product, arrays, moments, xp)
        return total

    def natural_parameters(self, arrays, moments, name: str) -> dict:
        """The derivatives of F by the expected statistics of a factor."""

        def part(own):
            return self.expected_log_joint(arrays, {**moments, name: own}, of=name)

        return jax.grad(part)(moments[name])

    def update(self, arrays, moments, name: str) -> tuple[dict, dict]:
        """Natural parameters of a factor, and the parameters of the best one.

        Elements that masks hide have no term in F: their factor is exp E[log prior].
        """
        eta = self.natural_parameters(arrays, moments, name)
        if name not in self.priors:
            return eta, self.factors[name].update(eta)

        def part(own):
            terms = (_value(p, arrays, {**moments, name: own}, jnp) for p in self.priors[name])
            return sum(terms)

        whole = jax.tree.map(jnp.add, eta, jax.grad(part)(moments[name]))
        return eta, self.factors[name].update(whole)

    def entropy(self, arrays, params):
        """Entropy of q, without that of hidden elements."""
        total = 0.0
        for name, factor in self.factors.items():
            total = total + factor.entropy(params[name])
            if name in self.hidden:
                total = total - factor.hidden_entropy(params[name], arrays[self.hidden[name]])
        return total


def make_plan(derivation: Derivation, blocks: Sequence[Sequence[str]] = ()) -> Plan:
    """:raises NotConjugateError: if a term has a moment of which no closed form is known."""
    groups = _groups(derivation, blocks)
    pairs = list(zip(derivation.terms, derivation.sources, strict=True))
    factors = {}
    for group in groups:
        own = [(term, name) for name in group for term in derivation.priors.get(name, ())]
        uses = [use for term, source in [*pairs, *own] if (use := _use(term, source, group))]
        latents = [derivation.latents[name] for name in group]
        one = len(group) == 1
        masked = next((name for name in group if name in derivation.hidden), None)
        if masked and not one:
            raise NotConjugateError(f"Site '{masked}' is masked: leave it out of block {group}.")
        factor = make_factor(latents[0], uses) if one else make_block(latents, uses)
        factors[factor.name] = factor
    arrays: list = []
    products = tuple(_product(term, source, factors, arrays) for term, source in pairs)
    priors, hidden = {}, {}
    for name, mask in derivation.hidden.items():
        own = derivation.priors[name]
        priors[name] = tuple(_product(term, name, factors, arrays) for term in own)
        hidden[name] = len(arrays)
        arrays.append(mask.astype(float))
    return Plan(factors, products, arrays, derivation.plates, priors, hidden)


def _groups(derivation: Derivation, blocks: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The sites of each factor, in the order of the model."""
    owner: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        if isinstance(block, str) or len(set(block)) < 2:
            raise ValueError(f"A block is a tuple of two site names or more, got {block!r}.")
        for name in block:
            if name not in derivation.latents:
                known = ", ".join(map(repr, derivation.latents))
                raise ValueError(f"Block {tuple(block)}: no latent site {name!r}; found {known}.")
            if name in owner:
                raise ValueError(f"Site '{name}' is in two blocks.")
            owner[name] = tuple(n for n in derivation.latents if n in block)
    return list(dict.fromkeys(owner.get(name, (name,)) for name in derivation.latents))


def _use(term: Term, source: str, group: Sequence[str]) -> Use | None:
    """What a term has of some sites, if anything."""
    own = tuple(atom for atom in term.atoms if atom.site in group)
    if not own:
        return None
    rest = replace(term, atoms=tuple(atom for atom in term.atoms if atom.site not in group))
    return Use(source, own, frozenset(rest.labels()))


# --- products ------------------------------------------------------------------------------------


def _product(term: Term, source: str, factors: dict, arrays: list) -> Product:
    def slot(array) -> int:
        arrays.append(np.asarray(array, float) if not _whole(array) else np.asarray(array))
        return len(arrays) - 1

    def entry(x):
        return x if isinstance(x, Label) else (slot(x.array), x.labels)

    knowns = tuple((slot(known.array), known.labels) for known in term.knowns)
    moments = []
    for factor in factors.values():
        use = _use(term, source, factor.sites)
        if use is not None:
            key, entries = moment_of(factor, use)
            moments.append(Moment(factor.name, key, tuple(map(entry, entries))))
    return Product(source, slot(term.coefficient), knowns, tuple(moments))


def _outline(product: Product) -> tuple:
    """A product up to the names of labels."""
    names: dict[Label, int] = {}

    def name(label: Label) -> tuple:
        return names.setdefault(label, len(names)), label.size

    def entry(x):
        return name(x) if isinstance(x, Label) else (x[0], *map(name, x[1]))

    knowns = tuple((slot, tuple(map(name, labels))) for slot, labels in product.knowns)
    moments = tuple((m.factor, m.key, tuple(map(entry, m.entries))) for m in product.moments)
    return knowns, moments


def _whole(array) -> bool:
    return np.issubdtype(np.asarray(array).dtype, np.integer)


def _value(product: Product, arrays, moments, xp):
    names: dict[Label, int] = {}

    def name(label: Label) -> int:
        return names.setdefault(label, len(names))

    operands = []
    for slot, labels in product.knowns:
        operands += [arrays[slot], [name(label) for label in labels]]
    for moment in product.moments:
        array, labels = _taken(moments[moment.factor][moment.key], moment.entries, arrays, xp)
        operands += [array, [name(label) for label in labels]]
    if not operands:
        return arrays[product.coefficient]
    return arrays[product.coefficient] * xp.einsum(
        *operands, [], optimize="optimal" if len(operands) <= 12 else "greedy"
    )


def _taken(array, entries: tuple, arrays, xp):
    """A moment at entries, and its labels: indices are gathered, repeated labels are diagonals."""
    if all(isinstance(e, Label) for e in entries) and len(set(entries)) == len(entries):
        return array, entries
    labels: list[Label] = []
    for e in entries:
        for label in [e] if isinstance(e, Label) else e[1]:
            if label not in labels:
                labels.append(label)
    index = []
    for e in entries:
        own = (e,) if isinstance(e, Label) else e[1]
        values = xp.arange(e.size) if isinstance(e, Label) else arrays[e[0]]
        order = sorted(range(len(own)), key=lambda i: labels.index(own[i]))
        shape = [1] * len(labels)
        for i in order:
            shape[labels.index(own[i])] = own[i].size
        index.append(xp.transpose(values, order).reshape(shape))
    return array[tuple(index)], tuple(labels)
