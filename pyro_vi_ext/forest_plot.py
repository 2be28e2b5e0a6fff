"""Intervals of every entry of a posterior, by several methods, one above the other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["plot_forest"]

_QUANTILES = (0.03, 0.25, 0.75, 0.97)


def plot_forest(
    draws: Mapping[str, Mapping[str, np.ndarray]],
    path=None,
    *,
    reference: str | None = None,
    in_sd: bool = False,
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
):
    r"""Means with 50% (thick) and 94% (thin) intervals, a panel for each site.

    :param draws: method -> site -> draws, shape (chains, draws, \*site); the same sites for all.
    :param path: file to write.
    :param reference: the method in black, with its 94% interval grey behind the others.
    :param in_sd: show every entry less its mean by the reference, in standard deviations of that.
    :param coords: dimension -> names of its values, for labels of entries.
    :param dims: site -> names of its dimensions.
    :returns: the matplotlib figure.
    :raises ImportError: without matplotlib.
    :raises ValueError: for ``in_sd=True`` without a reference.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> draws = {name: {"z": rng.normal(size=(1, 100, 3))} for name in ("NUTS", "CAVI")}
    >>> figure = plot_forest(draws)
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['0', '1', '2']
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_forest needs matplotlib: pip install pyro_vi_ext[plot]") from error
    if in_sd:
        draws = _standardized(draws, reference)
    methods, (sites, *_) = list(draws), draws.values()
    labels = {n: _labels(n, np.shape(v)[2:], coords or {}, dims or {}) for n, v in sites.items()}
    rows = max(map(len, labels.values()))
    width, height = 1.0 + 4.2 * len(sites), 1.2 + rows * (0.1 * len(methods) + 0.1)
    figure = Figure(figsize=(width, max(3.0, height)), layout="constrained")
    grid = figure.add_gridspec(rows, len(sites))
    colors = [c for i, c in enumerate(colormaps["tab10"].colors) if i != 7]  # no grey
    look = {m: "black" if m == reference else colors[i % 9] for i, m in enumerate(methods)}
    for column, (name, entries) in enumerate(labels.items()):
        axes = figure.add_subplot(grid[: len(entries), column])
        _draw(axes, {m: _quantiles(draws[m][name]) for m in methods}, look, reference)
        axes.set_yticks(range(len(entries)), entries)
        axes.set(title=name, ylim=(len(entries) - 0.5, -0.5))
        axes.set_xlabel(f"sd of {reference} from its mean" if in_sd else "")
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    handles = figure.axes[0].get_legend_handles_labels()
    ncols = max(1, min(len(methods), int(width / 2.2)))
    figure.legend(*handles, loc="outside upper center", ncols=ncols, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _draw(axes, quantiles: Mapping, look: Mapping, reference: str | None) -> None:
    """The intervals of all entries of one site."""
    for i, (method, (mean, (least, low, high, most))) in enumerate(quantiles.items()):
        places = np.arange(len(mean))
        y = places + 0.72 * ((i + 0.5) / len(quantiles) - 0.5)
        if method == reference:
            axes.barh(places, most - least, 0.8, least, color="0.93", zorder=0)
        axes.hlines(y, least, most, color=look[method], lw=0.9)
        axes.hlines(y, low, high, color=look[method], lw=2.6)
        axes.plot(mean, y, "o", ms=3.6, mfc="white", mec=look[method], label=method)
    if _spans_decades(quantiles):
        axes.set_xscale("log")


def _standardized(draws: Mapping, reference: str | None) -> dict:
    if reference is None:
        raise ValueError("in_sd=True needs a reference. Name one, or leave in_sd out.")
    found: dict = {method: {} for method in draws}
    for name, z in draws[reference].items():
        mean, sd = z.mean((0, 1)), z.std((0, 1), ddof=1)
        sd = np.where(sd > 0, sd, 1.0)  # an entry that is constant
        for method, sites in draws.items():
            found[method][name] = (sites[name] - mean) / sd
    return found


def _quantiles(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means, shape (entries,), and quantiles, shape (4, entries)."""
    flat = np.reshape(draws, (draws.shape[0] * draws.shape[1], -1))
    return flat.mean(0), np.quantile(flat, _QUANTILES, axis=0)


def _spans_decades(quantiles: Mapping) -> bool:
    """Whether a logarithmic axis is needed: all is positive, and the largest 30 times the least."""
    least = min(q[1].min() for q in quantiles.values())
    return least > 0 and max(q[1].max() for q in quantiles.values()) > 30 * least


def _labels(name: str, shape: tuple[int, ...], coords: Mapping, dims: Mapping) -> list[str]:
    """A label for each entry: its indices, or the coordinates of its dimensions."""
    named = dims.get(name, ())
    values = [
        coords.get(named[i], range(size)) if i < len(named) else range(size)
        for i, size in enumerate(shape)
    ]
    return [", ".join(map(str, entry)) for entry in itertools.product(*values)]
