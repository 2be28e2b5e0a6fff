r"""The rows of a plate spread over JAX devices.

.. math:: F = F_{\text{outside}} + \sum_{\text{devices } d}\ \sum_{n \in \text{rows of } d} F_n

Arrays and expected statistics with an axis of rows are cut along it, all others are on every
device; XLA adds the sums up.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pyro_vi_ext.cavi.plan import Plan
from pyro_vi_ext.cavi.rows import Rows

__all__ = ["Sharding"]


class Sharding:
    """Where the arrays of a plan are.

    :param plate: name of the plate whose rows are spread.
    :param devices: JAX devices.
    :raises ValueError: for a plate that is not in the model, or rows that are not divisible by the
        number of devices.
    :raises NotConjugateError: if rows of the plate are not independent.
    """

    def __init__(self, plan: Plan, plate: str, devices: Sequence):
        self.plate, self.devices = plate, list(devices)
        if not self.devices:
            raise ValueError("Sharding needs one device at least.")
        label = plan.plates.get(plate)
        self.rows = Rows.of(plan, plate, 1 if label is None else label.size)
        if self.rows.num_rows % len(self.devices):
            raise ValueError(
                f"Plate '{plate}' has {self.rows.num_rows} rows, which {len(self.devices)} devices "
                "cannot share equally: leave some out, or use another number of devices."
            )
        self.mesh = Mesh(np.array(self.devices), ("rows",))

    def arrays(self, arrays: list) -> list:
        """Put the arrays of the plan where they belong."""
        axes = self.rows.axes
        return [self._put(array, axes.get(slot)) for slot, array in enumerate(arrays)]

    def moments(self, moments: dict) -> dict:
        """Put expected statistics where they belong."""
        result = {}
        for name, own in moments.items():
            factor, local = self.rows.plan.factors[name], name in self.rows.local
            result[name] = {
                key: self._put(
                    x, factor.entry(key, tuple(range(np.ndim(x))), self.plate) if local else None
                )
                for key, x in own.items()
            }
        return result

    def _put(self, array, axis: int | None):
        spec = [None] * np.ndim(array)
        if axis is not None:
            spec[axis] = "rows"
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec(*spec)))
