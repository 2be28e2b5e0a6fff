r"""Arrays that are polynomials in statistics of latent variables.

.. math::

    E_{o} = \sum_{\text{terms}} c \sum_{s} \prod_j A^{(j)}_{o, s} \prod_i t_i(z_i)_{o, s},

with output labels o, summed labels s, known arrays A and *atoms* :math:`t_i(z_i)`: one statistic of
one latent site, at entries that are labels or known integer indices. A term is an einsum that is
not carried out: no axis that is only summed over is ever materialised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

__all__ = ["Atom", "Expr", "Index", "Known", "Label", "NotRepresentable", "Term", "equal", "merged"]


class NotRepresentable(Exception):
    """A value that is no polynomial in statistics of the latents; says why."""


class Label:
    """An axis: two are the same only if they are the same object."""

    __slots__ = ("size",)

    def __init__(self, size: int):
        self.size = int(size)

    def __repr__(self):
        return f"<{self.size}:{id(self) % 9973}>"


@dataclass(frozen=True, eq=False)
class Index:
    """Known positions along an axis: integers, shape of the labels."""

    array: np.ndarray
    labels: tuple[Label, ...]

    def same(self, other) -> bool:
        return (
            isinstance(other, Index)
            and self.labels == other.labels
            and (self.array is other.array or np.array_equal(self.array, other.array))
        )


def same_entry(a, b) -> bool:
    """Whether two entries of atoms are the same position, whatever the labels' values."""
    return a is b or (isinstance(a, Index) and a.same(b)) or (_is_only(a) and _is_only(b))


def _is_only(entry) -> bool:
    """Whether an entry is that of an axis of size 1, if another entry of that axis is."""
    if isinstance(entry, Label):
        return entry.size == 1
    return not entry.labels and entry.array == 0


@dataclass(frozen=True, eq=False)
class Known:
    """A known array; its axes carry distinct labels."""

    array: np.ndarray
    labels: tuple[Label, ...]


@dataclass(frozen=True, eq=False)
class Atom:
    """A statistic of a latent site at some entries: one for each axis of the statistic.

    :ivar site: name of the site.
    :ivar stat: ``("pow", p)``, ``("log",)``, ``("log1m",)``, ``("onehot",)``, ``("logdet",)``.
    :ivar entries: a :class:`Label` or an :class:`Index` for each axis.
    """

    site: str
    stat: tuple
    entries: tuple

    def labels(self) -> list[Label]:
        found = []
        for entry in self.entries:
            found += [entry] if isinstance(entry, Label) else entry.labels
        return found

    def same_entries(self, other: Atom) -> bool:
        return len(self.entries) == len(other.entries) and all(
            same_entry(a, b) for a, b in zip(self.entries, other.entries, strict=True)
        )


@dataclass(frozen=True, eq=False)
class Term:
    """One einsum: a number times known arrays times atoms."""

    coefficient: float = 1.0
    knowns: tuple[Known, ...] = ()
    atoms: tuple[Atom, ...] = ()
    counted: tuple[Label, ...] = field(default=())  # summed, and in no factor: their size counts

    def labels(self) -> set[Label]:
        found = {label for known in self.knowns for label in known.labels}
        found.update(label for atom in self.atoms for label in atom.labels())
        return found | set(self.counted)

    def counting(self, labels: Iterable[Label]) -> Term:
        """The term summed over labels: the size of those that are in no factor counts."""
        own = self.labels()
        return replace(self, counted=self.counted + tuple(x for x in labels if x not in own))


@dataclass(frozen=True, eq=False)
class Expr:
    """A symbolic array: output labels, one for each axis (distinct), and terms.

    Labels that terms sum over are outputs of no array: so a term may be put under any labels.
    """

    labels: tuple[Label, ...]
    terms: tuple[Term, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(label.size for label in self.labels)

    @staticmethod
    def of(array) -> Expr:
        """A known array as a symbolic one."""
        array = np.asarray(array, float)  # sums of integers may overflow, of booleans saturate
        labels = tuple(Label(size) for size in array.shape)
        if array.size and (array == array.flat[0]).all():
            return Expr(labels, (Term(float(array.flat[0])),))
        return Expr(labels, (Term(1.0, (Known(array, labels),)),))

    def is_known(self) -> bool:
        return not any(term.atoms for term in self.terms)

    # Arithmetic.

    def __add__(self, other: Expr) -> Expr:
        self, other = aligned(self, other)
        return Expr(self.labels, self.terms + other.terms)

    def __neg__(self) -> Expr:
        return self.scaled(-1.0)

    def __sub__(self, other: Expr) -> Expr:
        return self + (-other)

    def scaled(self, factor: float) -> Expr:
        terms = (replace(t, coefficient=t.coefficient * factor) for t in self.terms)
        return Expr(self.labels, tuple(terms))

    def __mul__(self, other: Expr) -> Expr:
        self, other = aligned(self, other)
        terms = []
        for a in self.terms:
            for b in other.terms:
                terms.append(times(a, fresh(b, keep=self.labels)))
        return Expr(self.labels, tuple(simplified(terms, self.labels)))

    def sum(self, axes: Iterable[int]) -> Expr:
        """Sum over axes."""
        gone = dict.fromkeys(self.labels[axis] for axis in axes)
        kept = tuple(label for label in self.labels if label not in gone)
        terms = []
        for term in self.terms:
            terms.append(fresh(term.counting(gone), keep=kept))
        return Expr(kept, tuple(terms))

    def relabelled(self, labels: Sequence[Label]) -> Expr:
        """The same array under other output labels of the same sizes."""
        return self.substituted(dict(zip(self.labels, labels, strict=True)), tuple(labels))

    def relabelled_like(self, other: Expr) -> Expr:
        """The same array under the labels of another of its shape."""
        return self.relabelled(other.labels)

    def substituted(self, entries: dict, labels: tuple[Label, ...]) -> Expr:
        """Replace output labels by other labels, or by known indices; new output labels."""
        terms = (substitute(fresh(term, keep=self.labels), entries) for term in self.terms)
        return Expr(labels, tuple(terms))


def aligned(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Two arrays of one shape (or scalars) under the labels of one of them."""
    if a.labels == b.labels:
        return a, b
    if not a.labels:
        return Expr(b.labels, a.terms), b
    if not b.labels:
        return a, Expr(a.labels, b.terms)
    if a.shape != b.shape:
        raise NotRepresentable(f"shapes {a.shape} and {b.shape} in one operation")
    return a, b.relabelled(a.labels)


def fresh(term: Term, keep: Iterable[Label]) -> Term:
    """The term with new names for the labels that it sums over."""
    keep = set(keep)
    inner = {label: Label(label.size) for label in term.labels() if label not in keep}
    return substitute(term, inner) if inner else term


def substitute(term: Term, entries: dict) -> Term:
    """Replace labels of all factors by labels or indices."""
    if all(label is entry for label, entry in entries.items()):
        return term
    knowns = []
    for known in term.knowns:
        if any(label in entries for label in known.labels):
            if all(isinstance(entries.get(label, label), Label) for label in known.labels):
                labels = tuple(entries.get(label, label) for label in known.labels)
                if len(set(labels)) == len(labels):
                    knowns.append(Known(known.array, labels))
                    continue
            array, labels = taken(
                known.array, [entries.get(label, label) for label in known.labels]
            )
            knowns.append(Known(array, labels))
        else:
            knowns.append(known)
    atoms = tuple(
        replace(atom, entries=tuple(_entry(entry, entries) for entry in atom.entries))
        for atom in term.atoms
    )
    counted = tuple(entries.get(label, label) for label in term.counted)
    return Term(term.coefficient, tuple(knowns), atoms, counted)


def _entry(entry, entries: dict):
    if isinstance(entry, Label):
        return entries.get(entry, entry)
    if not any(label in entries for label in entry.labels):
        return entry
    array, labels = taken(entry.array, [entries.get(label, label) for label in entry.labels])
    return Index(array, labels)


def taken(array, entries: Sequence):
    """An array at entries, one for each axis: labels (all of it) or indices; repeated labels are
    diagonals. The array of shape of the labels found, and the labels."""
    labels: list[Label] = []
    for entry in entries:
        for label in [entry] if isinstance(entry, Label) else entry.labels:
            if label not in labels:
                labels.append(label)
    position = {label: i for i, label in enumerate(labels)}
    index = []
    for entry in entries:
        own = (entry,) if isinstance(entry, Label) else entry.labels
        values = np.arange(entry.size) if isinstance(entry, Label) else entry.array
        order = sorted(range(len(own)), key=lambda i: position[own[i]])
        shape = [1] * len(labels)
        for i in order:
            shape[position[own[i]]] = own[i].size
        index.append(np.transpose(values, order).reshape(shape))
    return array[tuple(index)] if entries else array, tuple(labels)


def times(a: Term, b: Term) -> Term:
    """The product of two terms whose summed labels differ."""
    coefficient = a.coefficient * b.coefficient
    return Term(coefficient, a.knowns + b.knowns, a.atoms + b.atoms, a.counted + b.counted)


def simplified(terms: Iterable[Term], outputs: Iterable[Label]) -> list[Term]:
    """Powers of one variable joined, indicators of one variable identified, zeros dropped."""
    outputs = set(outputs)
    joined = (join_atoms(term, outputs) for term in terms)
    return [term for term in joined if term.coefficient != 0.0 and not _vanishes(term)]


def _vanishes(term: Term) -> bool:
    """Whether known arrays of the same axes are nowhere all there, as complementary masks are."""
    there: dict = {}
    for known in term.knowns:
        labels = tuple(sorted(known.labels, key=id))
        own = np.transpose(known.array, [known.labels.index(label) for label in labels]) != 0
        there[labels] = there.get(labels, True) & own
    return not all(found.any() for found in there.values())


def join_atoms(term: Term, outputs: set[Label]) -> Term:
    """Join atoms of one site at the same entries: powers add up, indicators are idempotent."""
    for i, a in enumerate(term.atoms):
        for j in range(i):
            b = term.atoms[j]
            if a.site != b.site or a.stat[0] != b.stat[0]:
                continue
            rest = term.atoms[:j] + term.atoms[j + 1 : i] + term.atoms[i + 1 :]
            if a.stat[0] == "pow" and a.same_entries(b):
                power = a.stat[1] + b.stat[1]
                atoms = (*rest, replace(a, stat=("pow", power))) if power else rest
                return join_atoms(_counting(replace(term, atoms=atoms), a, outputs), outputs)
            if a.stat[0] == "onehot" and _same_entries(a.entries[:-1], b.entries[:-1]):
                return join_atoms(_identified(term, rest, a, b, outputs), outputs)
    return term


def _same_entries(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(same_entry(x, y) for x, y in zip(a, b, strict=True))


def _counting(term: Term, gone: Atom, outputs: set[Label]) -> Term:
    """Summed labels that were in an atom only, which has gone, still count."""
    lost = set(gone.labels()) - outputs - term.labels()
    return replace(term, counted=term.counted + tuple(lost))


def _identified(term: Term, rest: tuple, a: Atom, b: Atom, outputs: set[Label]) -> Term:
    """[z = k][z = l] = [z = k][k = l]: with l = k, where one of them is summed over."""
    k, other = a.entries[-1], b.entries[-1]
    if same_entry(k, other):
        return replace(term, atoms=(*rest, a))
    for kept, gone in ((k, other), (other, k)):
        own = () if isinstance(kept, Label) else kept.labels
        if isinstance(gone, Label) and gone not in outputs and gone not in own:
            kept = replace(a, entries=(*a.entries[:-1], kept))
            return substitute(replace(term, atoms=(*rest, kept)), {gone: kept.entries[-1]})
    return replace(term, atoms=(*rest, a), knowns=(*term.knowns, equal(k, other)))


def equal(a, b) -> Known:
    """[a = b] for two entries."""
    sizes = [e.size if isinstance(e, Label) else 1 + e.array.max(initial=0) for e in (a, b)]
    return Known(*taken(np.eye(max(sizes)), [a, b]))


def merged(terms: Iterable[Term], fixed: Iterable[Label] = ()) -> list[Term]:
    """Scalar terms that differ in their coefficients and in the names of labels only, added up.

    :param fixed: labels whose names do tell terms apart.
    """
    found, fixed = {}, tuple(fixed)
    for term in terms:
        key = _canonical(term, fixed)
        if key in found:
            coefficient = found[key].coefficient + term.coefficient
            found[key] = replace(found[key], coefficient=coefficient)
        else:
            found[key] = term
    return [term for term in found.values() if term.coefficient]


def _canonical(term: Term, fixed: Iterable[Label]) -> tuple:
    """A key: the same for equal terms whose factors come in one order of sites and arrays."""
    names: dict[Label, int] = {label: i for i, label in enumerate(fixed)}

    def name(label):
        return (names.setdefault(label, len(names)), label.size)

    def entry(x):
        return name(x) if isinstance(x, Label) else (_content(x.array), *map(name, x.labels))

    atoms = sorted(
        term.atoms,
        key=lambda a: (a.site, a.stat, [x.size if isinstance(x, Label) else -1 for x in a.entries]),
    )
    knowns = sorted(((_content(k.array), k) for k in term.knowns), key=lambda pair: pair[0])
    return (
        tuple((a.site, a.stat, tuple(map(entry, a.entries))) for a in atoms),
        tuple((content, tuple(map(name, k.labels))) for content, k in knowns),
        tuple(sorted(label.size for label in term.counted)),
    )


def _content(array: np.ndarray) -> tuple:
    """A key: the same for equal arrays."""
    array = np.asarray(array)
    return array.shape, array.dtype.str, hashlib.blake2b(np.ascontiguousarray(array)).digest()
