r"""The expected log joint of some rows of a plate, in place of all of them.

.. math::

    F_B = F_{\text{outside}} + \frac{N}{|B|} \sum_{n \in B} F_n, \qquad
    \mathbb{E}_B[F_B] = F_{\text{outside}} + \sum_{n=1}^N F_n = F .

Factors of sites in the plate have one element for each row of B, and count N/|B| times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp

from pyro_vi_ext.cavi.derivation import NotConjugateError
from pyro_vi_ext.cavi.plan import Plan, Product
from pyro_vi_ext.cavi.symbolic import Label

__all__ = ["Rows"]


@dataclass(frozen=True)
class Rows:
    """A plan for so many rows of a plate.

    :ivar full: the plan for all rows.
    :ivar plan: the plan for some; its ``arrays`` are those of all rows, see :meth:`arrays`.
    :ivar num_rows: N, the size of the plate.
    :ivar size: the number of rows.
    :ivar axes: for each array with an axis of rows, which one it is.
    :ivar coefficients: positions of the coefficients that count N / size times.
    :ivar local: names of the factors that have an element for each row.
    """

    full: Plan
    plan: Plan
    num_rows: int
    size: int
    axes: dict[int, int]
    coefficients: tuple[int, ...]
    local: tuple[str, ...]

    @staticmethod
    def of(plan: Plan, plate: str, size: int) -> Rows:
        """:raises ValueError: for a plate that is not in the model, or a size out of range.
        :raises NotConjugateError: if no rows of the plate can be drawn on their own.
        """
        if plate not in plan.plates:
            found = ", ".join(map(repr, plan.plates)) or "none"
            raise ValueError(f"plate='{plate}' is no plate of the model: found {found}.")
        old = plan.plates[plate]
        if not 1 <= size <= old.size:
            raise ValueError(f"The number of rows must be 1, ..., {old.size}, got {size}.")
        local = tuple(name for name, f in plan.factors.items() if f.plate_axes(plate))
        factors = {
            n: f.with_rows(plate, size) if n in local else f for n, f in plan.factors.items()
        }
        axes, coefficients, new = {}, [], Label(size)
        for product in (*plan.products, *(p for own in plan.priors.values() for p in own)):
            _check(plan, product, plate, local)
            own = _axes(product, old)
            axes.update(own)
            if own or any(m.factor in local for m in product.moments):
                coefficients.append(product.coefficient)
        for name, slot in plan.hidden.items():
            if name in local:
                axes[slot] = plan.factors[name].plate_axes(plate)[name]

        def relabelled(products):
            return tuple(_relabelled(product, old, new) for product in products)

        part = replace(
            plan,
            factors=factors,
            products=relabelled(plan.products),
            priors={name: relabelled(own) for name, own in plan.priors.items()},
            plates={**plan.plates, plate: new},
        )
        return Rows(plan, part, old.size, size, axes, tuple(coefficients), local)

    def arrays(self, arrays: list, rows) -> list:
        """The arrays of the plan for some rows.

        :param arrays: those for all rows.
        :param rows: which ones, integers of shape (size,).
        """
        result = list(arrays)
        for slot, axis in self.axes.items():
            result[slot] = jnp.take(result[slot], rows, axis)
        for slot in self.coefficients:
            result[slot] = result[slot] * (self.num_rows / self.size)
        return result

    def values(self, values: dict, plate: str, rows) -> dict:
        """Values of all sites for some rows, from those for all."""
        axes: dict[str, int] = {}
        for name in self.local:
            axes.update(self.plan.factors[name].plate_axes(plate))
        return {n: jnp.take(v, rows, axes[n]) if n in axes else v for n, v in values.items()}


def _axes(product: Product, label: Label) -> dict[int, int]:
    """Which arrays of a product have an axis with a label, and which one it is."""
    pairs = list(product.knowns)
    for moment in product.moments:
        pairs += [entry for entry in moment.entries if not isinstance(entry, Label)]
    return {slot: labels.index(label) for slot, labels in pairs if label in labels}


def _check(plan: Plan, product: Product, plate: str, local: tuple[str, ...]) -> None:
    """Rows meet only themselves, and only sites of the plate have an axis of rows."""
    label = plan.plates[plate]
    for moment in product.moments:
        factor = plan.factors[moment.factor]
        own = factor.entry(moment.key, moment.entries, plate) if moment.factor in local else None
        others = sum(entry is label for entry in moment.entries) - (own is label)
        if moment.factor in local and own is not label:
            raise NotConjugateError(
                f"Site '{product.source}' has elements of '{moment.factor}' in plate '{plate}' at "
                "other rows than its own, so that no rows of the plate can be drawn on their own."
            )
        if others:
            raise NotConjugateError(
                f"Site '{moment.factor}' has an element for each row of plate '{plate}' and is not "
                "in the plate: sample it within the plate."
            )


def _relabelled(product: Product, old: Label, new: Label) -> Product:
    def swap(labels: tuple) -> tuple:
        return tuple(new if label is old else label for label in labels)

    def entry(x):
        return (new if x is old else x) if isinstance(x, Label) else (x[0], swap(x[1]))

    knowns = tuple((slot, swap(labels)) for slot, labels in product.knowns)
    moments = tuple(replace(m, entries=tuple(map(entry, m.entries))) for m in product.moments)
    return replace(product, knowns=knowns, moments=moments)
