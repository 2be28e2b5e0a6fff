r"""What can be computed with symbolic arrays: shapes, powers, logarithms, functions of labels.

.. math::

    f\Big(\sum_k [z = k]\, g_k\Big) = \sum_k [z = k]\, f(g_k), \qquad
    \log \prod_i t_i^{p_i} = \sum_i p_i \log t_i .

The first holds for every function, because exactly one indicator is 1: so tables of discrete
latents follow, and what is done to ``mu[z]`` is done to every ``mu[k]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from pyro_vi_ext.cavi.symbolic import (
    Atom,
    Expr,
    Index,
    Known,
    Label,
    NotRepresentable,
    Term,
    equal,
    fresh,
    same_entry,
    simplified,
    substitute,
    times,
)

__all__ = [
    "Algebra", "broadcast", "compact", "concrete", "contract_known", "picked", "positions", "table",
]  # fmt: skip


class Algebra:
    """Functions of symbolic arrays that need to know what the sites are.

    :param positive: names of sites whose values are positive.
    :param unit: names of sites whose values are in (0, 1), with a ``log1m`` statistic.
    """

    def __init__(self, positive: set[str], unit: set[str]):
        self.positive, self.unit = positive, unit

    # Functions.

    def power(self, x: Expr, exponent: float) -> Expr:
        if x.is_known():
            return table(compact(x) ** exponent, x.labels)
        if exponent == 0:
            return Expr(x.labels, (Term(),))
        if exponent == 1:
            return x
        if len(x.terms) == 1:
            (term,) = x.terms
            if self._is_monomial(term, x.labels, exponent):
                knowns = tuple(
                    replace(k, array=np.asarray(k.array, float) ** exponent) for k in term.knowns
                )
                atoms = tuple(replace(a, stat=("pow", a.stat[1] * exponent)) for a in term.atoms)
                return Expr(x.labels, (Term(term.coefficient**exponent, knowns, atoms),))
        if float(exponent).is_integer() and 0 < exponent <= 8:
            result = x
            for _ in range(int(exponent) - 1):
                result = result * x
            return result
        parts = self._by_support(x, lambda y: self.power(y, exponent))
        if parts is not None:
            return parts
        return self.by_label(lambda y: self.power(y, exponent), [x], f"power {exponent:g}")

    def _by_support(self, x: Expr, function: Callable) -> Expr | None:
        """A function of terms of which exactly one is not zero at each position: stacked latents,
        or one selected among them. None if they are not such."""
        outputs = set(x.labels)
        if len(x.terms) < 2 or any(t.counted or t.labels() - outputs for t in x.terms):
            return None
        values = [_einsum(t.knowns, x.labels, Term(t.coefficient)) for t in x.terms]
        if not (sum(np.broadcast_to(v != 0, x.shape).astype(int) for v in values) == 1).all():
            return None
        terms = []
        for term, value in zip(x.terms, values, strict=True):
            (there,) = table(value != 0, x.labels).terms
            (whole,) = table(np.where(value != 0, value, 1.0), x.labels).terms
            part = function(Expr(x.labels, (replace(whole, atoms=term.atoms),)))
            terms += [times(t, there) for t in part.terms]
        return Expr(x.labels, tuple(terms))

    def _is_monomial(self, term: Term, outputs: Sequence[Label], exponent: float) -> bool:
        """Whether the power of a term is the product of the powers of its factors."""
        if term.counted or not term.labels() <= set(outputs):
            return False
        whole = float(exponent).is_integer() and exponent > 0
        if any(a.stat[0] != "pow" or not (whole or a.site in self.positive) for a in term.atoms):
            return False
        return whole or (
            term.coefficient > 0 and all((np.asarray(k.array) > 0).all() for k in term.knowns)
        )

    def log(self, x: Expr) -> Expr:
        if x.is_known():
            return table(np.log(compact(x)), x.labels)
        if len(x.terms) == 1 and self._is_monomial(x.terms[0], x.labels, 0.5):
            (term,) = x.terms
            terms = [Term(float(np.log(term.coefficient)))]
            terms += [Term(1.0, (replace(k, array=np.log(k.array)),)) for k in term.knowns]
            for atom in term.atoms:
                terms.append(Term(float(atom.stat[1]), (), (replace(atom, stat=("log",)),)))
            return Expr(x.labels, tuple(t for t in terms if t.coefficient))
        complement = self._complement(x)
        if complement is not None:
            return complement
        parts = self._by_support(x, self.log)
        return self.by_label(self.log, [x], "a logarithm") if parts is None else parts

    def _complement(self, x: Expr) -> Expr | None:
        """log(1 - t) of latents t in (0, 1), stacked or selected; None if the array is not that."""
        known = Expr(x.labels, tuple(t for t in x.terms if not t.atoms))
        rest = Expr(x.labels, tuple(t for t in x.terms if t.atoms)).scaled(-1.0)
        if not rest.terms or not (compact(known) == 1.0).all():
            return None
        if len(rest.terms) > 1:
            return self._by_support(rest, lambda y: self.log(Expr.of(1.0) - y))
        (term,) = rest.terms
        if (term.coefficient, term.knowns, term.counted, len(term.atoms)) != (1.0, (), (), 1):
            return None
        (atom,) = term.atoms
        inside = set(atom.labels()) <= set(x.labels)
        if atom.stat != ("pow", 1) or atom.site not in self.unit or not inside:
            return None
        return Expr(x.labels, (Term(1.0, (), (replace(atom, stat=("log1m",)),)),))

    def logdet(self, x: Expr) -> Expr:
        """Logarithm of the determinant of matrices, shape (\\*batch, D, D), to (\\*batch)."""
        return self._logdet(x, *x.labels[-2:])

    def _logdet(self, x: Expr, i: Label, j: Label) -> Expr:
        labels = tuple(label for label in x.labels if label not in (i, j))
        if x.is_known():
            value = np.linalg.slogdet(concrete(Expr((*labels, i, j), x.terms)))[1]
            return Expr.of(value).relabelled(labels)
        if len(x.terms) == 1 and len(x.terms[0].atoms) == 1 and not x.terms[0].knowns:
            (term,) = x.terms
            (atom,) = term.atoms
            own = {id(entry) for entry in atom.entries[-2:]} == {id(i), id(j)}
            inside = set(atom.labels()) <= set(x.labels) and not term.counted
            if own and inside and atom.stat == ("pow", 1) and term.coefficient > 0:
                constant = Term(i.size * float(np.log(term.coefficient)))
                stat = Atom(atom.site, ("logdet",), atom.entries[:-2])
                terms = (Term(1.0, (), (stat,)), constant)
                return Expr(labels, tuple(t for t in terms if t.coefficient))
        return self.by_label(lambda y: self._logdet(y, i, j), [x], "a determinant")

    def by_label(self, function: Callable, xs: Sequence[Expr], what: str) -> Expr:
        """A function of arrays of one shape (or scalars), for each value of a discrete latent.

        :param function: given the arrays with one more axis on the right, of the values; returns an
            array with that axis on the right too, and with the axes that the latent has.
        """
        shapes = {x.labels: x for x in xs if x.labels}
        outputs = next(iter(shapes), ())
        xs = [x.relabelled(outputs) if x.labels and x.labels != outputs else x for x in xs]
        found = next(
            (a for x in xs for t in x.terms for a in t.atoms if a.stat[0] == "onehot"), None
        )
        if found is None:
            raise NotRepresentable(f"{what} of a continuous latent")
        batch = found.entries[:-1]
        if not set(replace(found, entries=batch).labels()) <= set(outputs):
            raise NotRepresentable(f"{what} of a sum over elements of a discrete latent")
        k = Label(_categories(found, xs))
        inner = [
            Expr((*outputs, k), tuple(_given(t, found, k, outputs) for t in x.terms)) for x in xs
        ]
        result = function(*inner)
        indicator = Atom(found.site, ("onehot",), (*batch, k))
        terms = [replace(term, atoms=(*term.atoms, indicator)) for term in result.terms]
        labels = tuple(label for label in result.labels if label is not k)
        return Expr(labels, tuple(simplified(terms, labels)))

    def elementwise(self, function: Callable, xs: Sequence[Expr], what: str) -> Expr:
        """A function, element by element, of arrays that are known given discrete latents."""
        if not all(x.is_known() for x in xs):
            return self.by_label(lambda *ys: self.elementwise(function, ys, what), xs, what)
        labels = max((x.labels for x in xs), key=len)
        xs = [compact(Expr(labels, x.terms)) for x in xs]
        return table(function(*np.broadcast_arrays(*xs)), labels)

    def categories(self, x: Expr, num: int) -> Expr:
        """[x = k] for an array of whole numbers: one more axis on the right, of ``num`` values."""
        if x.is_known():
            return Expr.of((concrete(x)[..., None] == np.arange(num)).astype(float))
        own = self._own_indicator(x, num)
        if own is not None:
            return own
        k = Label(num)
        values = Expr((k,), (Term(1.0, (Known(np.arange(num), (k,)),)),))
        outputs = (*x.labels, k)
        both = [Expr(outputs, x.terms), Expr(outputs, values.terms)]
        return self.elementwise(np.equal, both, "a category")

    def _own_indicator(self, x: Expr, num: int) -> Expr | None:
        """[z = k] of a discrete latent itself."""
        if len(x.terms) != 1 or len(x.terms[0].atoms) != 1 or len(x.terms[0].knowns) != 1:
            return None
        (term,) = x.terms
        ((atom,), (values,)) = term.atoms, term.knowns
        k = atom.entries[-1]
        whole = term.coefficient == 1.0 and not term.counted and atom.stat[0] == "onehot"
        if not whole or values.labels != (k,) or k in x.labels or k.size != num:
            return None
        if not np.array_equal(values.array, np.arange(num)):
            return None
        outside = Label(num)
        atom = replace(atom, entries=(*atom.entries[:-1], outside))
        return Expr((*x.labels, outside), (Term(1.0, (), (atom,)),))


def _categories(atom: Atom, xs: Sequence[Expr]) -> int:
    """Number of categories of an indicator, from a label somewhere."""
    entry = atom.entries[-1]
    if isinstance(entry, Label):
        return entry.size
    for x in xs:
        for term in x.terms:
            for other in term.atoms:
                if other.site == atom.site and isinstance(other.entries[-1], Label):
                    return other.entries[-1].size
    raise NotRepresentable("a discrete latent whose number of categories is not seen")


def _given(term: Term, indicator: Atom, k: Label, outputs: Sequence[Label]) -> Term:
    """The term given that the indicated variable is k."""
    term = fresh(term, keep=outputs)
    for i, atom in enumerate(term.atoms):
        if atom.site != indicator.site or atom.stat[0] != "onehot":
            continue
        same = all(
            same_entry(a, b) for a, b in zip(atom.entries[:-1], indicator.entries[:-1], strict=True)
        )
        if not same:
            continue
        entry = atom.entries[-1]
        rest = replace(term, atoms=term.atoms[:i] + term.atoms[i + 1 :])
        if isinstance(entry, Label) and entry not in outputs:
            return _given(substitute(rest, {entry: k}), indicator, k, (*outputs, k))
        rest = replace(rest, knowns=(*rest.knowns, equal(entry, k)))
        return _given(rest, indicator, k, (*outputs, k))
    return term


# --- shapes --------------------------------------------------------------------------------------


def broadcast(x: Expr, shape: Sequence[int]) -> Expr:
    """The array broadcast to a shape, aligned on the right."""
    return broadcast_in_dim(x, shape, range(len(shape) - len(x.labels), len(shape)))


def broadcast_in_dim(x: Expr, shape: Sequence[int], dimensions: Sequence[int]) -> Expr:
    """Axis i of the array becomes axis ``dimensions[i]``; axes of size 1 may grow."""
    labels = [Label(size) for size in shape]
    entries = {}
    for label, dim in zip(x.labels, dimensions, strict=True):
        if label.size == labels[dim].size:
            labels[dim] = label
        elif label.size == 1:
            entries[label] = Index(np.asarray(0), ())
        else:
            raise NotRepresentable(f"shape {x.shape} broadcast to {tuple(shape)}")
    if not entries:
        return Expr(tuple(labels), x.terms)
    return x.substituted(entries, tuple(labels))


def positions(shape: Sequence[int], dtype=np.int32) -> np.ndarray:
    """Flat positions in an array, counted from 1."""
    return np.arange(1, 1 + math.prod(shape), dtype=dtype).reshape(shape)


def picked(x: Expr, flat: np.ndarray) -> Expr:
    """The array at flat positions counted from 1; 0 where there is none of it.

    :raises NotRepresentable: if a position is negative: not in the array, and JAX has NaN there.
    """
    if (flat < 0).any():
        raise NotRepresentable("an index out of bounds")
    size, labels = math.prod(x.shape), tuple(Label(n) for n in flat.shape)
    if not size or not flat.size:
        return Expr(labels, ())
    flat = flat.astype(np.int64) - 1
    inside = (flat >= 0) & (flat < size)
    places = np.unravel_index(np.where(inside, flat, 0), x.shape) if x.shape else ()
    single = [label for label in labels if label.size == 1]
    entries = {}
    for label, place in reversed(list(zip(x.labels, places, strict=True))):
        whole = label.size == 1 and single
        entries[label] = single.pop() if whole else _entry(place, inside, labels, label.size)
    result = x.substituted(entries, labels)
    if inside.all():
        return result
    axes = [axis for axis in range(inside.ndim) if np.ptp(inside.astype(int), axis).any()]
    shape = tuple(slice(None) if axis in axes else slice(1) for axis in range(inside.ndim))
    (there,) = table(inside[shape], labels).terms
    return Expr(labels, tuple(times(term, there) for term in result.terms))


def _entry(place: np.ndarray, inside: np.ndarray, labels: Sequence[Label], size: int):
    """Places along one axis as a label, if they are all of an output's, or as known indices."""
    for axis in range(place.ndim):  # a place that is not inside is any
        low = np.where(inside, place, size).min(axis, keepdims=True)
        high = np.where(inside, place, -1).max(axis, keepdims=True)
        if (high <= low).all():
            place, inside = np.maximum(high, 0), inside.any(axis, keepdims=True)
    place = np.where(inside, place, 0)
    kept = [axis for axis, n in enumerate(place.shape) if n > 1]
    own = tuple(labels[axis] for axis in kept)
    place = place.reshape([label.size for label in own])
    if len(own) == 1 and np.array_equal(place, np.arange(size)):
        return own[0]
    return Index(place, own)


# --- known arrays --------------------------------------------------------------------------------


def concrete(x: Expr) -> np.ndarray:
    """The value of an array without latents."""
    return np.broadcast_to(compact(x), x.shape)


def compact(x: Expr) -> np.ndarray:
    """The value of an array without latents, of size 1 along axes that it does not depend on."""
    total = np.zeros([1 if size else 0 for size in x.shape])
    for term in x.terms:
        if term.atoms:
            raise NotRepresentable("the value of a latent")
        total = total + _einsum(term.knowns, x.labels, term)
    return total


def table(value: np.ndarray, labels: Sequence[Label]) -> Expr:
    """A compact value as a symbolic array."""
    if value.size and (value == value.flat[0]).all():
        return Expr(tuple(labels), (Term(float(value.flat[0])),))
    kept = [axis for axis, size in enumerate(value.shape) if size != 1]
    known = Known(
        np.asarray(value, float).reshape([labels[axis].size for axis in kept]),
        tuple(labels[axis] for axis in kept),
    )
    return Expr(tuple(labels), (Term(1.0, (known,)),))


def _einsum(knowns: Sequence[Known], outputs: Sequence[Label], term: Term) -> np.ndarray:
    used = dict.fromkeys(label for known in knowns for label in known.labels)
    names = {label: i for i, label in enumerate(used)}
    operands = [x for known in knowns for x in (known.array, [names[k] for k in known.labels])]
    present = [label for label in outputs if label in used]
    value = np.asarray(
        term.coefficient * np.prod([label.size for label in term.counted], initial=1.0)
    )
    if operands:
        value = value * np.einsum(*operands, [names[label] for label in present], optimize=True)
    shape = [label.size if label in used else 1 for label in outputs]
    return value.reshape(shape)


def contract_known(term: Term) -> Term:
    """Multiply known factors, and sum over what nothing else shares, where nothing gets larger."""
    atoms = {label for atom in term.atoms for label in atom.labels()}
    coefficient = term.coefficient * np.prod([label.size for label in term.counted], initial=1.0)
    factors, done = list(term.knowns), []
    while factors:
        known = factors.pop()
        for i, other in enumerate(factors):
            rest = factors[:i] + factors[i + 1 :]
            labels = _kept((known, other), atoms.union(*(k.labels for k in (*rest, *done))))
            if math.prod(k.size for k in labels) <= max(known.array.size, other.array.size):
                factors = [*rest, Known(_einsum((known, other), labels, Term()), labels)]
                break
        else:
            done.append(known)
    knowns = []
    for known in done:
        labels = _kept((known,), atoms.union(*(k.labels for k in done if k is not known)))
        whole = labels == known.labels
        knowns.append(known if whole else Known(_einsum((known,), labels, Term()), labels))
    coefficient *= np.prod([known.array for known in knowns if not known.labels], initial=1.0)
    return Term(float(coefficient), tuple(k for k in knowns if k.labels), term.atoms)


def _kept(knowns: Sequence[Known], shared: set[Label]) -> tuple[Label, ...]:
    return tuple(dict.fromkeys(k for known in knowns for k in known.labels if k in shared))
