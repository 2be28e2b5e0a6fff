r"""The derived updates in readable algebra.

.. math:: \eta_{i} = \frac{\partial F}{\partial\, \mathbb{E}[t_i]}
    = \sum_{\text{terms with } t_i} c \sum A \prod_{j \ne i} \mathbb{E}[t_j],

one line for each term: what multiplies the statistic in the expected log joint.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pyro_vi_ext.cavi.gaussian_block import GaussianBlock
from pyro_vi_ext.cavi.plan import Moment, Plan, Product
from pyro_vi_ext.cavi.symbolic import Label

__all__ = ["explain"]

STATISTICS = {
    "x": "{}",
    "xx": "{}^2",
    "log": "log {}",
    "log1m": "log(1 - {})",
    "pow1": "{}",
    "pow-1": "1/{}",
    "logdet": "log|{}|",
    "base": "log h({})",
    "size": "size of {}",
}
SOLUTIONS = {
    "PolyaGamma": "b = eta[size of {0}], c^2 = -2 eta[{0}]",
    "ChineseRestaurantTable": "count = eta[size of {0}], concentration = exp(eta[{0}])",
    "Gaussian": "variance = -1 / (2 eta[{0}^2]), mean = eta[{0}] variance",
    "joint Gaussian": "covariance = -(eta + eta')^-1, eta of {0} {0}'; mean = covariance eta[{0}]",
    "Gamma": "concentration = eta[log {0}] + 1, rate = -eta[{0}]",
    "InverseGamma": "concentration = -eta[log {0}] - 1, rate = -eta[1/{0}]",
    "Beta": "concentrations = eta[log {0}] + 1, eta[log(1 - {0})] + 1",
    "Dirichlet": "concentration = eta[log {0}] + 1",
    "Categorical": "probabilities proportional to exp(eta[{0} = k])",
    "Wishart": "concentration = 2 eta[log|{0}|] + D + 1, rate = -2 eta[{0}]",
    "LogNormal": "of log {0}: variance = -1 / (2 eta[(log)^2]), mean = (eta[log] + 1) variance",
    "joint Gaussian of several sites": (
        "of x = ({0}): mean = covariance eta[x], covariance = -(eta + eta')^-1,\n"
        "        with eta of x x' (of each pair of sites once)"
    ),
    "Gaussian-Gamma": (
        "given {1}, of the n numbers x = ({0}): covariance = C / {1}, mean = C eta[{1} x],\n"
        "        with C = -(eta + eta')^-1, eta of {1} x x' (of each pair of sites once)\n"
        "    {1}: concentration = eta[log {1}] + 1 - n/2, rate = -eta[{1}] - 1/2 mean' C^-1 mean"
    ),
    "Gaussian-InverseGamma": (
        "given {1}, of the n numbers x = ({0}): covariance = {1} C, mean = C eta[x / {1}],\n"
        "        with C = -(eta + eta')^-1, eta of x x' / {1} (of each pair of sites once)\n"
        "    {1}: concentration = -eta[log {1}] - 1 - n/2, rate = -eta[1/{1}] - 1/2 mean' C^-1 mean"
    ),
    "Gaussian-Wishart": (
        "given {1}, of the n rows x of ({0}): covariance = C times {1}^-1, mean = C eta[{1} x],\n"
        "        with C = -(eta + eta')^-1, eta of x' {1} x (of each pair of sites once)\n"
        "    {1}: concentration = 2 eta[log|{1}|] + D + 1 - n, "
        "rate = -2 eta[{1}] - mean' C^-1 mean"
    ),
}


def explain(plan: Plan, data: dict[str, np.ndarray] | None = None) -> str:
    """The factors and their updates, as text.

    :param data: known arrays with names, to call them by; others are A1, A2, ... of a given shape.
    """
    names = _array_names(plan, data or {})
    blocks = [_site(plan, name, names) for name in plan.order]
    used = "\n".join(blocks)
    legend = [
        f"{name.text}: shape {plan.arrays[slot].shape[:: -1 if name.flipped else 1]}"
        for slot, name in names.items()
        if _is_number(name) and f"{name.text}[" in used
    ]
    return used + ("\n" + "\n".join(dict.fromkeys(legend)) if legend else "")


def _site(plan: Plan, name: str, names: dict[int, Name]) -> str:
    factor = plan.factors[name]
    family = _family(factor)
    shapes = [factor.shape_of(site) for site in factor.sites]
    letters = [string.ascii_lowercase[8 : 8 + len(shape)] for shape in shapes]  # i, j, ...
    own = ", ".join(map(_indexed, factor.sites, letters))
    if len(shapes) > 1:
        sizes = ["shapes " + ", ".join(map(str, shapes))]
    else:
        sizes = [f"{c} < {n}" for c, n in zip(letters[0], shapes[0], strict=True)]
    lines = [", ".join([f"q({own}): {family}", *sizes])]
    for key in factor.keys:
        rows: dict = {}  # the same text twice, as of a symmetric matrix, is one row
        for product in plan.products:
            for moment in product.moments:
                if moment.factor == name and moment.key == key:
                    row = (*_term(product, moment, names, plan), product.source)
                    size = float(plan.arrays[product.coefficient])
                    rows[row] = rows.get(row, 0.0) + size
        if rows:
            lines.append(f"    eta[{_statistic(factor, key, None)}] =")
            lines += [f"        {_row(*row, size)}" for row, size in rows.items()]
    names_of = (name,) if len(factor.sites) == 1 else _names(factor)
    lines.append(f"    {SOLUTIONS[family].format(*names_of)}")
    return "\n".join(lines)


def _family(factor) -> str:
    if isinstance(factor, GaussianBlock):
        if factor.precision is None:
            return "joint Gaussian of several sites"
        kind = factor.precision.kind
        return f"Gaussian-{'Gamma' if kind == 'Exponential' else kind}"
    if factor.num_values:
        return "Categorical"
    if factor.kind in ("Normal", "MultivariateNormal"):
        return "joint Gaussian" if factor.axes.joint else "Gaussian"
    return "Gamma" if factor.kind == "Exponential" else factor.kind


def _names(block: GaussianBlock) -> tuple[str, str]:
    precision = "" if block.precision is None else block.precision.name
    return ", ".join(member.name for member in block.members), precision


def _statistic(factor, key: str, letters: list[str] | None) -> str:
    """A statistic, at entries with these letters, or without any."""

    def at(site: str, own: Iterable[str]) -> str:
        return site if letters is None else _indexed(site, own)

    given = letters or []
    if isinstance(factor, GaussianBlock):
        return _block_statistic(factor, key, given, at)
    name, rank = factor.name, len(factor.axes.shape)
    if key == "onehot":
        return f"{at(name, given[:-1])} = {given[-1] if given else 'k'}"
    if key == "xx" and factor.axes.joint:
        second = list(given[:rank])
        for axis, letter in zip(factor.axes.joint, given[rank:], strict=bool(given)):
            second[axis] = letter
        return f"{at(name, given[:rank])} {at(name, second)}" + ("" if given else "'")
    return STATISTICS[key].format(at(name, given[:rank]))


def _block_statistic(block: GaussianBlock, key: str, given: list[str], at) -> str:
    precision = "" if block.precision is None else block.precision.name
    if ":" not in key:
        return STATISTICS[key].format(at(precision, given))
    a, *others = block.members_of(key)
    is_matrix = a.matrix is not None
    if precision and given:  # the precision of the same element
        places = [
            a.plain.index(a.batch[c]) if c is not None else None for c in block.precision.batch
        ]
        precision = at(precision, ["0" if p is None else given[p] for p in places])
    first = at(a.name, given[: len(a.plain)])
    if not others:
        shown = at(f"({precision} {a.name})", given) if is_matrix else at(a.name, given)
    else:
        (b,) = others
        second = list(given[: len(a.plain)])
        if given:
            own = dict(
                zip(
                    (*b.batch, *b.joint),
                    [*(given[a.plain.index(x)] for x in a.batch), *given[len(a.plain) :]],
                    strict=True,
                )
            )
            second = [own[axis] for axis in b.plain]
        if is_matrix:
            shown = f"{first}' {precision} {at(b.name, second)}"
        elif a is b and not a.joint:
            shown = f"{first}^2"
        else:
            shown = f"{first} {at(b.name, second)}" + ("" if given or a is not b else "'")
    if not precision or is_matrix:
        return shown
    if block.precision.kind == "InverseGamma":
        return f"{shown} / {precision}"
    return f"{precision} {shown}"


def _own_letters(factor, key: str) -> list[str]:
    """A letter for each entry of a statistic, as the header of a factor has them."""

    def of(axes, mark: str = "") -> list[str]:
        return [string.ascii_lowercase[8 + axis] + mark for axis in axes]

    if not isinstance(factor, GaussianBlock):
        axes = of(range(len(factor.axes.shape)))
        if key == "onehot":
            return [*axes, "k"]
        return [*axes, *of(factor.axes.joint, "'")] if key == "xx" else axes
    if ":" not in key:
        return of(range(len(factor.precision.shape)))
    a, *others = factor.members_of(key)
    return [*of(a.plain), *of(others[0].joint, "'")] if others else of(range(len(a.shape)))


def _term(product: Product, own: Moment, names: dict[int, Name], plan: Plan):
    """What multiplies a moment of a term: what it is summed over, and factors."""
    factor = plan.factors[own.factor]
    letters: dict[Label, str] = {}
    conditions, same = [], []
    for entry, letter in zip(own.entries, _own_letters(factor, own.key), strict=False):
        if not isinstance(entry, Label):
            conditions.append((entry, letter))
        elif letters.setdefault(entry, letter) != letter:  # on the diagonal only
            same.append(f"{letter} = {letters[entry]}")
    free = iter(c for c in "nmpqrstuvwxyzabcdefgh" if c not in letters.values())

    def letter_of(label: Label) -> str:
        if label not in letters:
            letters[label] = next(free)
        return letters[label]

    factors = []
    for slot, labels in product.knowns:
        factors.append(_known(plan.arrays[slot], names[slot], [letter_of(x) for x in labels]))
    for moment in product.moments:
        if moment is not own:
            factors.append(_expected(moment, plan, names, letter_of))
    where = [
        f"{_position(plan.arrays[slot], names[slot], map(letter_of, labels))} = {letter}"
        if labels
        else f"{letter} = {int(plan.arrays[slot])}"
        for (slot, labels), letter in conditions
    ] + same
    own_labels = {entry for entry in own.entries if isinstance(entry, Label)}
    summed = [c for label, c in letters.items() if label not in own_labels]
    factors = [text for text in factors if text]
    if where and not summed:
        over = f"[{', '.join(where)}]"
    else:
        over = f"sum_{{{', '.join(summed)}{': ' if where else ''}{', '.join(where)}}}"
    return over if summed or where else "", " ".join(factors)


def _row(over: str, factors: str, source: str, coefficient: float) -> str:
    """A term with its sign and number, and the site whose log-density has it."""
    size = f"{abs(coefficient):.6g}"
    parts = ["-" if coefficient < 0 else "+", "" if size == "1" and factors else size]
    return f"{' '.join(part for part in (*parts, over, factors) if part)}        (from {source})"


def _known(array: np.ndarray, name: str, letters: list[str]) -> str:
    if array.size and (array == array.flat[0]).all():
        value = float(array.flat[0])
        return "" if value == 1.0 else f"{value:.6g}"
    return _indexed(name, letters)


@dataclass(frozen=True)
class Name:
    """What an array is called; or, if flipped, its transpose."""

    text: str
    flipped: bool = False


def _indexed(name: str | Name, letters: Iterable[str]) -> str:
    letters = list(letters)
    if isinstance(name, Name):
        letters, name = letters[::-1] if name.flipped else letters, name.text
    return f"{name}[{', '.join(letters)}]" if letters else name


def _position(array: np.ndarray, name: str, letters: Iterable[str]) -> str:
    return str(int(array)) if array.ndim == 0 else _indexed(name, letters)


def _expected(moment: Moment, plan: Plan, names, letter_of) -> str:
    def position(entry) -> str:
        if isinstance(entry, Label):
            return letter_of(entry)
        slot, labels = entry
        return _position(plan.arrays[slot], names[slot], map(letter_of, labels))

    factor = plan.factors[moment.factor]
    shown = _statistic(factor, moment.key, [position(entry) for entry in moment.entries])
    return f"P({shown})" if moment.key == "onehot" else f"E[{shown}]"


def _array_names(plan: Plan, data: dict[str, np.ndarray]) -> dict[int, Name]:
    """A name for each array: of the data that it is, or the square of; otherwise a number."""
    known = [
        (text, np.asarray(value))
        for name, value in data.items()
        for text, value in ((name, value), (f"{name}^2", value.astype(float) ** 2))
    ]
    names: dict[int, Name] = {}
    for slot, array in enumerate(plan.arrays):
        others = [(n.text, plan.arrays[s]) for s, n in names.items() if not n.flipped]
        found = (
            Name(text, flipped)
            for text, other in [*known, *others]
            if array.ndim
            for flipped in (False, True)
            if _same(array, other, flipped)
        )
        number = 1 + len({name.text for name in names.values() if _is_number(name)})
        names[slot] = next(found, Name(f"A{number}"))
    return names


def _is_number(name: Name) -> bool:
    return name.text.startswith("A") and name.text[1:].isdigit()


def _same(a: np.ndarray, b: np.ndarray, flipped: bool) -> bool:
    """Whether an array is another, or its transpose; one of the two may be in single precision."""
    b = b.T if flipped and b.ndim == 2 else b
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-6, atol=0.0)
