"""What is drawn is what the draws say."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from pyro_vi_ext.forest_plot import plot_forest

RNG = np.random.default_rng(0)


def test_means_and_intervals_of_each_entry_and_method():
    draws = {m: {"z": RNG.normal(i, 1.0 + i, size=(2, 500, 3))} for i, m in enumerate("pq")}
    (axes,) = plot_forest(draws, reference="p").axes
    lines = [(axes.collections[2 * i], axes.collections[2 * i + 1]) for i in range(2)]
    assert len(axes.collections) == 4
    for i, method in enumerate("pq"):
        flat = draws[method]["z"].reshape(1000, 3)
        assert np.allclose(axes.lines[i].get_xdata(), flat.mean(0))
        for drawn, (low, high) in zip(lines[i], [(0.03, 0.97), (0.25, 0.75)], strict=True):
            ends = np.array([segment[:, 0] for segment in drawn.get_segments()])
            assert np.allclose(ends.T, np.quantile(flat, [low, high], axis=0))
    places = np.stack([line.get_ydata() for line in axes.lines])
    assert (np.abs(places - np.arange(3)) < 0.5).all() and (places[0] < places[1]).all()
    bands = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]  # of p
    flat = draws["p"]["z"].reshape(1000, 3)
    assert np.allclose(np.transpose(bands), np.quantile(flat, [0.03, 0.97], axis=0))


def test_labels_are_indices_or_coordinates():
    draws = {"p": {"z": RNG.normal(size=(1, 50, 2, 2)), "s": RNG.normal(size=(1, 50))}}
    coords, dims = {"axis": ["x", "y"]}, {"z": ["row", "axis"]}
    z, s = plot_forest(draws, coords=coords, dims=dims).axes
    assert [t.get_text() for t in z.get_yticklabels()] == ["0, x", "0, y", "1, x", "1, y"]
    assert [t.get_text() for t in s.get_yticklabels()] == [""]
    assert (z.get_title(), s.get_title()) == ("z", "s")


@pytest.mark.parametrize("site, scale", [([1.0, 100.0], "log"), ([1.0, 2.0], "linear")])
def test_decades_get_a_logarithmic_axis(site, scale):
    positive = np.exp(0.1 * RNG.normal(size=(1, 200, 2))) * site
    for sign in (1, -1):
        (axes,) = plot_forest({"p": {"z": sign * positive}}).axes
        assert axes.get_xscale() == (scale if sign == 1 else "linear")


def test_standardized_by_the_reference():
    p = 5.0 + 3.0 * RNG.normal(size=(2, 500, 2))
    p[..., 1] = 7.0  # constant
    (axes,) = plot_forest({"p": {"z": p}, "q": {"z": p + 6.0}}, reference="p", in_sd=True).axes
    expected = [6.0 / p[..., 0].std(ddof=1), 6.0]
    assert np.allclose(axes.lines[0].get_xdata(), 0.0, atol=1e-12)
    assert np.allclose(axes.lines[1].get_xdata(), expected)
    assert axes.get_xlabel() == "sd of p from its mean"
    with pytest.raises(ValueError, match="in_sd=True needs a reference"):
        plot_forest({"p": {"z": p}}, in_sd=True)
