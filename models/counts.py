"""Checks and summaries of observed counts, shared by the Pyro and the NumPyro models."""

import math

import numpy as np
from torch import Tensor


def check_counts(x, site: str = "x") -> np.ndarray:
    """Return `x` as a float64 NumPy vector, having checked that it holds counts.

    Args:
        x: the counts, shape (N,); a torch tensor, an array or a sequence of numbers.
        site: name of the sample site that observes them, for the message.

    Raises:
        ValueError: if `x` is not one-dimensional, is empty, or holds a negative, fractional,
            NaN or infinite entry; the message names the site, the first bad entry and a remedy.

    Example:
        >>> check_counts([3, 0, 2])
        array([3., 0., 2.])
        >>> check_counts([3, -1, 2])
        Traceback (most recent call last):
        ValueError: site "x": counts must be non-negative, found -1 at index 1 (1 of 3 entries)...
    """
    if isinstance(x, Tensor):
        x = x.detach().cpu().double().numpy()
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 1:
        raise ValueError(
            f'site "{site}": counts must be a vector with one entry per unit, found shape '
            f"{x.shape}; pass x.reshape(-1), or np.atleast_1d(x) for a single count."
        )
    if x.size == 0:
        raise ValueError(f'site "{site}": found no counts (shape (0,)); pass at least one.')
    checks = (
        (np.isnan(x), "not missing", "drop the missing units before the call, x[~isnan(x)]"),
        (np.isinf(x), "finite", "correct or drop these entries"),
        (x < 0, "non-negative", "correct or drop these entries; differences are not counts"),
        (x != np.floor(x), "whole numbers", "pass the raw counts, not rates, means or logarithms"),
    )
    for bad, wanted, remedy in checks:
        if bad.any():
            first = int(np.argmax(bad))
            raise ValueError(
                f'site "{site}": counts must be {wanted}, found {x[first]:g} at index {first} '
                f"({int(bad.sum())} of {x.size} entries); {remedy}."
            )
    return x


def check_hyperparameters(**values: float) -> None:
    """Raise ValueError unless every named hyper-parameter is positive and finite.

    Example:
        >>> check_hyperparameters(a=0.01, b=0.0)
        Traceback (most recent call last):
        ValueError: prior parameter b must be positive and finite, found 0.0; ...
    """
    for name, value in values.items():
        if not 0.0 < float(value) < math.inf:
            raise ValueError(
                f"prior parameter {name} must be positive and finite, found {value}; "
                "a vague proper prior has a small positive value such as 0.01."
            )


def count_exceedances(x: np.ndarray) -> np.ndarray:
    r"""Number of counts larger than j, for j = 0, ..., max(x) - 1.

    With it :math:`\sum_i \log\Gamma(x_i + r) - \log\Gamma(r) = \sum_j n_{>j} \log(r + j)`, which
    keeps its digits for large r, where the difference of log-Gammas loses them.

    Example:
        >>> count_exceedances(np.array([0.0, 3.0, 1.0]))
        array([2., 1., 1.])
    """
    counts = np.bincount(x.astype(np.int64))
    return (x.size - np.cumsum(counts))[:-1].astype(np.float64)
