r"""From terms to a function: the expected log joint, and the test that every update is closed.

.. math:: F(\mathbb{E}[t_1], \ldots, \mathbb{E}[t_n]) = \mathbb{E}_q \log p(x, z)

holds if each term has exactly one allowed moment of each site. That is tested here, term by term;
it also makes a parallel update of all elements of a plate exact: no term then has two of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from pyro_vi_ext.cavi.derivation import Derivation, NotConjugateError
from pyro_vi_ext.cavi.families import FAMILIES, GAUSSIAN, LOG_NORMAL, Factor, GaussianAxes
from pyro_vi_ext.cavi.symbolic import Atom, Label, Term, same_entry

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Moment:
    """An expected statistic at some entries; indices are positions in the arrays of a plan."""

    site: str
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
    def sites(self) -> set[str]:
        return {moment.site for moment in self.moments}


@dataclass(frozen=True)
class Plan:
    """The expected log joint of a model: products of known arrays and moments.

    :ivar factors: the factors of q, by site.
    :ivar products: the terms.
    :ivar arrays: the numbers in them; other data of the same shapes have others.
    """

    factors: dict[str, Factor]
    products: tuple[Product, ...]
    arrays: list

    @property
    def order(self) -> list[str]:
        """The order of updates: the discrete latents last, after what they select among."""
        return sorted(self.factors, key=lambda name: bool(self.factors[name].num_values))

    @property
    def structure(self) -> tuple:
        """All but the numbers: plans of one structure share compiled code."""
        shapes = tuple((array.shape, array.dtype.str) for array in self.arrays)
        products = tuple((p.source, p.coefficient, _outline(p)) for p in self.products)
        factors = tuple((f.name, f.kind, f.axes, f.num_values) for f in self.factors.values())
        return shapes, products, factors

    def with_arrays(self, arrays: list) -> Plan:
        return replace(self, arrays=arrays)

    def expected_log_joint(self, arrays, moments, *, of=None, without=None, xp=jnp):
        """F; or only its terms that have the site ``of``, or only those ``without`` a site."""
        total = 0.0
        for product in self.products:
            if (of is None or of in product.sites) and without not in product.sites:
                total = total + _value(product, arrays, moments, xp)
        return total

    def natural_parameters(self, arrays, moments, site: str) -> dict:
        """The derivatives of F by the expected statistics of a site."""

        def part(own):
            return self.expected_log_joint(arrays, {**moments, site: own}, of=site)

        return jax.grad(part)(moments[site])


def make_plan(derivation: Derivation) -> Plan:
    """:raises NotConjugateError: if a term has a moment of which no closed form is known."""
    joint = {name: set() for name in derivation.latents}
    for term, source in zip(derivation.terms, derivation.sources, strict=True):
        for name in dict.fromkeys(atom.site for atom in term.atoms):
            joint[name] |= _joint_axes(derivation, name, term, source)
    factors = {}
    for name, latent in derivation.latents.items():
        family = FAMILIES.get(latent.kind)
        if family is None:
            raise NotConjugateError(
                f"Latent site '{name}': no closed-form factor is known for the prior {latent.kind}."
            )
        axes = GaussianAxes(latent.shape, tuple(sorted(joint[name])))
        factors[name] = Factor(name, latent.kind, family, axes, latent.num_values)
    arrays: list = []
    products = tuple(
        _product(term, source, factors, arrays)
        for term, source in zip(derivation.terms, derivation.sources, strict=True)
    )
    return Plan(factors, products, arrays)


# --- the conjugacy test --------------------------------------------------------------------------


def _joint_axes(derivation: Derivation, name: str, term: Term, source: str) -> set[int]:
    """Axes of a Gaussian latent in which two of its entries meet; raises if the term is refused."""
    atoms = [atom for atom in term.atoms if atom.site == name]
    latent = derivation.latents[name]
    family = FAMILIES.get(latent.kind)
    powers = sum(atom.stat[1] for atom in atoms if atom.stat[0] == "pow")
    shown = " x ".join(map(_show, atoms))
    if family in (GAUSSIAN, LOG_NORMAL):
        base = "log" if family is LOG_NORMAL else "pow"
        if any(atom.stat[0] != base for atom in atoms):
            raise _refused(source, name, latent.kind, shown)
        degree = len(atoms) if base == "log" else powers
        if degree not in (1, 2) or any(len(a.stat) > 1 and a.stat[1] not in (1, 2) for a in atoms):
            raise _refused(source, name, latent.kind, shown)
        if len(atoms) == 2:
            pairs = zip(*(atom.entries for atom in atoms), strict=True)
            return {axis for axis, (a, b) in enumerate(pairs) if not same_entry(a, b)}
        return set()
    key = _key(atoms[0]) if len(atoms) == 1 else None
    if family is not None and key not in family.keys:
        raise _refused(source, name, latent.kind, shown)
    return set()


def _refused(source: str, name: str, kind: str, shown: str) -> NotConjugateError:
    return NotConjugateError(
        f"Site '{source}': its log-density has {shown}, and the factor of latent '{name}' "
        f"({kind}) has a closed-form update for "
        f"{_allowed(kind)} only. Change its prior or its place in the model, or use a stochastic "
        "guide for it."
    )


def _allowed(kind: str) -> str:
    texts = {
        "x": "the value", "xx": "products of two values", "log": "its logarithm",
        "log1m": "the logarithm of 1 less it", "pow1": "the value", "pow-1": "its reciprocal",
        "onehot": "one indicator", "logdet": "its log-determinant",
    }  # fmt: skip
    family = FAMILIES.get(kind)
    return "no statistic" if family is None else " and ".join(texts[key] for key in family.keys)


def _show(atom: Atom) -> str:
    kind = atom.stat[0]
    if kind == "pow":
        power = atom.stat[1]
        return atom.site if power == 1 else f"{atom.site}^{power:g}"
    names = {"log": "log {}", "log1m": "log(1 - {})", "onehot": "[{} = k]", "logdet": "log |{}|"}
    return names[kind].format(atom.site)


def _key(atom: Atom) -> str:
    return f"pow{atom.stat[1]:g}" if atom.stat[0] == "pow" else atom.stat[0]


# --- products ------------------------------------------------------------------------------------


def _product(term: Term, source: str, factors: dict[str, Factor], arrays: list) -> Product:
    def slot(array) -> int:
        arrays.append(np.asarray(array, float) if not _whole(array) else np.asarray(array))
        return len(arrays) - 1

    def entry(x):
        return x if isinstance(x, Label) else (slot(x.array), x.labels)

    knowns = tuple((slot(known.array), known.labels) for known in term.knowns)
    moments = []
    for name in dict.fromkeys(atom.site for atom in term.atoms):
        atoms = [atom for atom in term.atoms if atom.site == name]
        factor = factors[name]
        if factor.family not in (GAUSSIAN, LOG_NORMAL):
            (atom,) = atoms
            moments.append(Moment(name, _key(atom), tuple(map(entry, atom.entries))))
            continue
        first, second = atoms[0], atoms[-1]
        squared = len(atoms) == 2 or (first.stat[0] == "pow" and first.stat[1] == 2)
        entries = [entry(x) for x in first.entries]
        if squared:
            entries += [entry(second.entries[axis]) for axis in factor.axes.joint]
        moments.append(Moment(name, "xx" if squared else "x", tuple(entries)))
    return Product(source, slot(term.coefficient), knowns, tuple(moments))


def _outline(product: Product) -> tuple:
    """A product up to the names of labels."""
    names: dict[Label, int] = {}

    def name(label: Label) -> tuple:
        return names.setdefault(label, len(names)), label.size

    def entry(x):
        return name(x) if isinstance(x, Label) else (x[0], *map(name, x[1]))

    knowns = tuple((slot, tuple(map(name, labels))) for slot, labels in product.knowns)
    moments = tuple((m.site, m.key, tuple(map(entry, m.entries))) for m in product.moments)
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
        array, labels = _taken(moments[moment.site][moment.key], moment.entries, arrays, xp)
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
