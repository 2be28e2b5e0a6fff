r"""The derived updates in readable algebra.

.. math:: \eta_{i} = \frac{\partial F}{\partial\, \mathbb{E}[t_i]}
    = \sum_{\text{terms with } t_i} c \sum A \prod_{j \ne i} \mathbb{E}[t_j],

one line for each term: what multiplies the statistic in the expected log joint.
"""

from __future__ import annotations

import string
from collections.abc import Iterable

import numpy as np

from pyro_vi_ext.cavi.families import Factor
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
}
SOLUTIONS = {
    "Gaussian": "variance = -1 / (2 eta[{0}^2]), mean = eta[{0}] variance",
    "joint Gaussian": "covariance = -1/2 eta[{0} {0}']^-1, mean = covariance eta[{0}]",
    "Gamma": "concentration = eta[log {0}] + 1, rate = -eta[{0}]",
    "InverseGamma": "concentration = -eta[log {0}] - 1, rate = -eta[1/{0}]",
    "Beta": "concentrations = eta[log {0}] + 1, eta[log(1 - {0})] + 1",
    "Dirichlet": "concentration = eta[log {0}] + 1",
    "Categorical": "probabilities proportional to exp(eta[{0} = k])",
    "Wishart": "concentration = 2 eta[log|{0}|] + D + 1, rate = -2 eta[{0}]",
    "LogNormal": "of log {0}: variance = -1 / (2 eta[(log)^2]), mean = (eta[log] + 1) variance",
}


def explain(plan: Plan, data: dict[str, np.ndarray] | None = None) -> str:
    """The factors and their updates, as text.

    :param data: known arrays with names, to call them by; others are A1, A2, ... of a given shape.
    """
    names = _array_names(plan, data or {})
    blocks = [_site(plan, name, names) for name in plan.order]
    used = "\n".join(blocks)
    legend = [
        f"{text}: shape {plan.arrays[slot].shape}"
        for slot, text in names.items()
        if text.startswith("A") and text[1:].isdigit() and f"{text}[" in used
    ]
    return used + ("\n" + "\n".join(dict.fromkeys(legend)) if legend else "")


def _site(plan: Plan, name: str, names: dict[int, str]) -> str:
    factor = plan.factors[name]
    family = _family(factor)
    letters = string.ascii_lowercase[8 : 8 + len(factor.axes.shape)]  # i, j, ...
    sizes = ", ".join(f"{c} < {n}" for c, n in zip(letters, factor.axes.shape, strict=True))
    index = f"[{', '.join(letters)}]" if letters else ""
    lines = [f"q({name}{index}): {family}" + (f", {sizes}" if sizes else "")]
    for key in factor.family.keys:
        rows = [
            _term(product, moment, names, plan)
            for product in plan.products
            for moment in product.moments
            if moment.site == name and moment.key == key
        ]
        if rows:
            shown = _statistic(factor, key, name, letters)
            lines.append(f"    eta[{shown}] =")
            lines += [f"        {row}" for row in rows]
    lines.append(f"    {SOLUTIONS[family].format(name)}")
    return "\n".join(lines)


def _family(factor: Factor) -> str:
    if factor.num_values:
        return "Categorical"
    if factor.kind in ("Normal", "MultivariateNormal"):
        return "joint Gaussian" if factor.axes.joint else "Gaussian"
    return "Gamma" if factor.kind == "Exponential" else factor.kind


def _statistic(factor: Factor, key: str, name: str, letters: str) -> str:
    if key == "onehot":
        return f"{name} = k"
    if key == "xx" and factor.axes.joint:
        return f"{name} {name}'"
    return STATISTICS[key].format(name)


def _term(product: Product, own: Moment, names: dict[int, str], plan: Plan) -> str:
    """What multiplies a moment of a term."""
    factor = plan.factors[own.site]
    letters: dict[Label, str] = {}
    conditions = []
    for axis, entry in enumerate(own.entries):
        rank = len(factor.axes.shape)
        if own.key == "onehot" and axis == rank:
            letter = "k"
        elif axis < rank:
            letter = string.ascii_lowercase[8 + axis]
        else:
            letter = string.ascii_lowercase[8 + factor.axes.joint[axis - rank]] + "'"
        if isinstance(entry, Label):
            letters.setdefault(entry, letter)
        else:
            conditions.append((entry, letter))
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
    ]
    coefficient = float(plan.arrays[product.coefficient])
    own_labels = {entry for entry in own.entries if isinstance(entry, Label)}
    summed = [c for label, c in letters.items() if label not in own_labels]
    factors = [text for text in factors if text]
    if conditions and not summed:
        over = f"[{', '.join(where)}]"
    else:
        over = f"sum_{{{', '.join(summed)}{': ' if where else ''}{', '.join(where)}}}"
    sign = "-" if coefficient < 0 else "+"
    size = f"{abs(coefficient):.6g}"
    parts = [sign, *([] if size == "1" and factors else [size])]
    parts += [over] if summed or conditions else []
    return f"{' '.join([*parts, *factors])}        (from {product.source})"


def _known(array: np.ndarray, name: str, letters: list[str]) -> str:
    if array.size and (array == array.flat[0]).all():
        value = float(array.flat[0])
        return "" if value == 1.0 else f"{value:.6g}"
    return _indexed(name, letters)


def _indexed(name: str, letters: Iterable[str]) -> str:
    letters = list(letters)
    return f"{name}[{', '.join(letters)}]" if letters else name


def _position(array: np.ndarray, name: str, letters: Iterable[str]) -> str:
    return str(int(array)) if array.ndim == 0 else _indexed(name, letters)


def _expected(moment: Moment, plan: Plan, names, letter_of) -> str:
    factor = plan.factors[moment.site]
    rank = len(factor.axes.shape)

    def position(entry) -> str:
        if isinstance(entry, Label):
            return letter_of(entry)
        slot, labels = entry
        return _position(plan.arrays[slot], names[slot], map(letter_of, labels))

    letters = [position(entry) for entry in moment.entries]
    if moment.key == "onehot":
        return f"P({_indexed(moment.site, letters[:-1])} = {letters[-1]})"
    if moment.key == "xx" and factor.axes.joint:
        second = list(letters[:rank])
        for axis, letter in zip(factor.axes.joint, letters[rank:], strict=True):
            second[axis] = letter
        first = _indexed(moment.site, letters[:rank])
        return f"E[{first} {_indexed(moment.site, second)}]"
    return f"E[{STATISTICS[moment.key].format(_indexed(moment.site, letters[:rank]))}]"


def _array_names(plan: Plan, data: dict[str, np.ndarray]) -> dict[int, str]:
    """A name for each array: of the data that it is, or the square of; otherwise a number."""
    names: dict[int, str] = {}
    for slot, array in enumerate(plan.arrays):
        for name, value in data.items():
            for text, candidate in ((name, value), (f"{name}^2", value.astype(float) ** 2)):
                if slot not in names and array.ndim and _same(array, candidate):
                    names[slot] = text
        if slot not in names:
            same = next(
                (t for s, t in names.items() if array.ndim and _same(array, plan.arrays[s])), None
            )
            number = len({t for t in names.values() if t.startswith("A") and t[1:].isdigit()}) + 1
            names[slot] = same or f"A{number}"
    return names


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal up to their order of axes."""
    if a.shape == b.shape and np.allclose(a, b, rtol=1e-6, atol=0.0):  # maybe single precision
        return True
    return a.ndim == 2 and a.shape == b.shape[::-1] and np.allclose(a, b.T, rtol=1e-6, atol=0.0)
