"""The table against numbers known in advance: exact draws, and shifted and scaled ones."""

import csv
import io
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats as st
import torch

from pyro_vi_ext.comparison import compare
from pyro_vi_ext.inference_methods import Outcome
from pyro_vi_ext.pareto import pareto_smooth

pytestmark = pytest.mark.usefixtures("float64")

LOC, SCALE = np.array([1.0, -2.0, 5.0]), np.array([0.1, 1.0, 10.0])
LOG_EVIDENCE = -3.25
S = 4000


def normal(shift=0.0, width=1.0, **options):
    """q = N(loc + shift scale, (width scale)^2), with its weights for the exact posterior."""

    def method(num_draws, seed, progress):
        rng = np.random.default_rng([seed, int(100 * width), int(1000 * (shift + 1))])
        z = LOC + SCALE * (shift + width * rng.normal(size=(num_draws, 3)))
        log_p = st.norm(LOC, SCALE).logpdf(z).sum(-1) + LOG_EVIDENCE
        log_q = st.norm(LOC + shift * SCALE, width * SCALE).logpdf(z).sum(-1)
        return Outcome({"z": z[None], "two": np.full((1, num_draws), 2.0)}, log_p, log_q, **options)

    return method


def chains(*shifts, autocorrelation=0.0):
    """Markov chains with the exact posterior, each of them shifted by so many sd."""

    def method(num_draws, seed, progress):
        noise = np.random.default_rng(seed).normal(size=(len(shifts), num_draws, 3))
        for i in range(1, num_draws):
            noise[:, i] *= (1 - autocorrelation**2) ** 0.5
            noise[:, i] += autocorrelation * noise[:, i - 1]
        z = LOC + SCALE * (np.array(shifts)[:, None, None] + noise)
        return Outcome({"z": z}, independent=False, seconds=1.5)

    return method


def kl(shift, width):
    """Of three independent entries."""
    return 3 * (0.5 * (width**2 + shift**2 - 1) - math.log(width))


# --- the numbers -------------------------------------------------------------------------------


def test_an_exact_method_has_no_error():
    methods = {"exact": normal(), "again": normal(width=1.0, shift=0.0)}
    row = compare(methods, reference="exact", log_evidence=LOG_EVIDENCE, num_draws=S)["again"]
    assert row["bound"] == pytest.approx(LOG_EVIDENCE, abs=1e-10)
    assert row["bound_standard_error"] < 1e-10 and row["log_evidence_standard_error"] < 1e-10
    assert row["gap"] == pytest.approx(0.0, abs=1e-10)
    assert row["log_evidence"] == pytest.approx(LOG_EVIDENCE, abs=1e-10)
    assert row["rms_error"] == row["max_error"] == 0.0  # the same seed: the same draws
    assert row["noise"] == pytest.approx((2 / S) ** 0.5)
    assert row["sd_ratio"] == row["least_sd_ratio"] == pytest.approx(1.0)
    assert row["pareto_k"] == -math.inf


@pytest.mark.parametrize("shift, width", [(0.5, 1.0), (0.0, 0.8), (-0.3, 0.9)])
def test_a_planted_error_is_in_the_table_with_its_size(shift, width):
    comparison = compare(
        {"exact": normal(), "planted": normal(shift, width)},
        reference="exact",
        log_evidence=LOG_EVIDENCE,
        num_draws=S,
    )
    row = comparison["planted"]
    error = row["rms_error"]  # of three errors, each shift + noise
    noise = ((1 + width**2) / S) ** 0.5
    assert row["noise"] == pytest.approx(noise, rel=0.05)
    assert abs(error - abs(shift)) < 4 * noise
    assert (error > 4 * noise) == (shift != 0)
    assert abs(shift) - 4 * noise < row["max_error"] < abs(shift) + 4 * noise
    assert abs(row["sd_ratio"] - width) < 4 * width / S**0.5
    assert row["least_sd_ratio"] <= row["sd_ratio"]
    assert abs(row["gap"] - kl(shift, width)) < 4 * row["bound_standard_error"]
    outcome = comparison.outcomes["planted"]
    log_w = outcome.log_p - outcome.log_q
    assert row["pareto_k"] == pytest.approx(float(pareto_smooth(torch.from_numpy(log_w))[1]))
    assert row["bound"] == pytest.approx(log_w.mean())
    assert row["log_evidence"] == pytest.approx(math.log(np.exp(log_w).mean()))


def test_largest_error_and_least_ratio_are_over_all_entries_of_all_sites():
    def constant(x):
        return lambda **_: Outcome({n: np.asarray(v)[None] for n, v in x.items()})

    draws = np.array([-1.0, 1.0] * 50)  # sd 1.005
    sd = draws.std(ddof=1)
    one = {"a": draws, "b": np.stack([2 * draws, 5 + 4 * draws], -1)}
    two = {"a": draws + 3.0, "b": np.stack([2 * draws, 6 + 2 * draws], -1)}
    row = compare({"one": constant(one), "two": constant(two)}, reference="one")["two"]
    assert row["max_error"] == pytest.approx(3 / sd)
    assert row["rms_error"] == pytest.approx(((3.0**2 + 0.25**2) / 3) ** 0.5 / sd)
    assert row["sd_ratio"] == 1.0 and row["least_sd_ratio"] == 0.5


def test_an_exact_bound_has_no_error_of_its_own():
    row = compare({"q": normal(0.5, 0.9, bound=-4.0)}, log_evidence=LOG_EVIDENCE)["q"]
    assert row["bound"] == -4.0 and row["bound_standard_error"] == 0.0 and row["gap"] == 0.75
    assert row["rms_error"] is None  # no reference


def test_weights_that_depend_on_each_other_are_grouped():
    """Twenty groups of equal weights: their standard error is that of twenty draws."""

    def method(num_draws, seed, progress):
        log_w = np.repeat(np.random.default_rng(seed).normal(size=20), num_draws // 20)
        draws = {"z": np.zeros((1, num_draws))}
        return Outcome(draws, log_w, 0 * log_w, group_size=num_draws // 20)

    row = compare({"q": method}, num_draws=200)["q"]
    expected = np.random.default_rng(0).normal(size=20).std(ddof=1) / 20**0.5
    assert row["bound_standard_error"] == pytest.approx(expected)


def test_entries_that_are_constant_count_only_where_they_differ():
    def of(value):
        def method(**_):
            z = np.random.default_rng(0).normal(size=(1, 100))
            return Outcome({"z": z, "edge": np.full((1, 100), value)})

        return method

    methods = {"one": of(0.1), "same": of(0.1), "other": of(0.2)}
    comparison = compare(methods, reference="one")
    assert comparison["same"]["max_error"] == 0.0
    assert comparison["other"]["max_error"] == math.inf


# --- the reference -----------------------------------------------------------------------------


def test_monte_carlo_error_of_chains():
    """Of an autocorrelation r it is sqrt((1 + r) / (1 - r)) times that of independent draws."""
    pytest.importorskip("numpyro")
    methods = {"chains": chains(0, 0, 0, 0, autocorrelation=0.5), "exact": normal()}
    comparison = compare(methods, reference="chains", num_draws=2000)
    expected = (3.0 / 8000) ** 0.5
    assert comparison.reference_error == pytest.approx(expected, rel=0.15)
    assert comparison.r_hat < 1.01
    noise = (3.0 / 8000 + 1 / 2000) ** 0.5
    assert comparison["exact"]["noise"] == pytest.approx(noise, rel=0.1)
    assert comparison["exact"]["rms_error"] < 4 * noise
    assert comparison["chains"]["rms_error"] is None and comparison["chains"]["bound"] is None
    assert comparison.compared == ["z"]  # `two` is by one method only


def test_chains_apart_are_warned_of():
    pytest.importorskip("numpyro")
    methods = {"chains": chains(0, 0, 0, 1), "exact": normal()}
    with pytest.warns(UserWarning, match="chains has r-hat 1.*undo label switching by transform"):
        comparison = compare(methods, reference="chains", num_draws=500)
    assert comparison.r_hat > 1.01


def test_switched_labels_are_undone_by_transform():
    """Two chains in two copies of one mode: far apart, until sorted."""
    pytest.importorskip("numpyro")

    def switched(num_draws, seed, progress):
        mu = np.array([-3.0, 3.0]) + np.random.default_rng(seed).normal(size=(2, num_draws, 2))
        mu[1] = mu[1, :, ::-1]
        return Outcome({"mu": mu}, independent=False)

    def single(num_draws, seed, progress):
        mu = np.array([3.0, -3.0]) + np.random.default_rng(seed + 1).normal(size=(num_draws, 2))
        return Outcome({"mu": mu[None]})

    methods = {"chains": switched, "single": single}
    with pytest.warns(UserWarning, match="r-hat"):
        assert compare(methods, reference="chains")["single"]["max_error"] > 0.9

    def relabel(draws):
        return {"mu": np.sort(draws["mu"], -1)}

    comparison = compare(methods, reference="chains", transform=relabel)
    assert comparison.r_hat < 1.01
    assert comparison["single"]["max_error"] < 4 * comparison["single"]["noise"]
    assert (np.diff(comparison.outcomes["chains"].draws["mu"]) > 0).all()


# --- what is shown -----------------------------------------------------------------------------


def test_table_text():
    def nuts(num_draws, seed, progress):
        outcome = normal()(num_draws, seed, progress)
        return Outcome(outcome.draws, seconds=12.34, notes=("3 of 4000 transitions diverged.",))

    methods = {"CAVI": normal(bound=-3.5), "NUTS": nuts, "planted": normal(0.5)}
    text = str(compare(methods, reference="NUTS", log_evidence=LOG_EVIDENCE, num_draws=S))
    head, cavi, reference, planted, *notes = text.splitlines()
    columns = "bound +- gap log p(x) RMS error largest noise sd ratio least k seconds"
    assert " ".join(head.split()) == f"method {columns}"
    assert cavi.split()[:4] == ["CAVI", "-3.500", "0.000", "0.250"]
    assert reference.split() == ["NUTS", "12.3"]  # and blanks
    assert abs(float(planted.split()[5]) - 0.5) < 0.1
    ends = [len(line) for line in (head, cavi, reference, planted)]
    assert len(set(ends)) == 1, "columns are aligned"
    assert "NUTS: 1 x 4000 draws, means known to 0.016 sd or better." in notes
    assert "NUTS: 3 of 4000 transitions diverged." in notes
    assert any("over all entries of z, two" in note for note in notes)


def test_rows_can_be_written_as_csv():
    comparison = compare({"q": normal(), "r": normal(0.1)}, reference="q")
    file = io.StringIO()
    writer = csv.DictWriter(file, comparison.table[0])
    writer.writeheader()
    writer.writerows(comparison.table)
    assert len(file.getvalue().splitlines()) == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_shown(value):
    def broken(num_draws, seed, progress):
        outcome = normal()(num_draws, seed, progress)
        outcome.log_p[7] = value
        return outcome

    comparison = compare({"q": broken}, log_evidence=LOG_EVIDENCE)
    row = comparison["q"]
    assert all(math.isnan(row[n]) for n in ("bound", "gap", "log_evidence", "pareto_k"))
    assert str(comparison).splitlines()[1].split()[:5] == ["q", "nan", "nan", "nan", "nan"]


def test_a_weight_of_zero_is_an_infinite_gap():
    def outside(num_draws, seed, progress):
        outcome = normal()(num_draws, seed, progress)
        outcome.log_p[7] = -math.inf
        return outcome

    row = compare({"q": outside}, log_evidence=LOG_EVIDENCE, num_draws=S)["q"]
    assert row["bound"] == -math.inf and row["gap"] == math.inf
    assert row["log_evidence"] == pytest.approx(LOG_EVIDENCE + math.log(1 - 1 / S))


def test_draws_that_are_nan_are_shown():
    def broken(num_draws, seed, progress):
        outcome = normal()(num_draws, seed, progress)
        outcome.draws["z"][0, 7, 1] = math.nan
        return outcome

    row = compare({"p": normal(), "q": broken}, reference="p")["q"]
    assert math.isnan(row["rms_error"]) and math.isnan(row["sd_ratio"])


def test_single_precision_is_noted_where_it_shows():
    def single(offset):
        def method(num_draws, seed, progress):
            outcome = normal()(num_draws, seed, progress)
            log_p = (outcome.log_p + offset).astype(np.float32)
            return Outcome(outcome.draws, log_p, outcome.log_q.astype(np.float32))

        return method

    text = str(compare({"small": single(0.0), "large": single(-4e4)}))
    assert "large: single precision: each log p(x, z) is rounded by 0.005 nats or more." in text
    assert "small: single" not in text


# --- ArviZ and the plot ------------------------------------------------------------------------


def test_inference_data():
    arviz = pytest.importorskip("arviz")
    comparison = compare(
        {"chains": chains(0, 0), "q": normal(0.1)},
        num_draws=50,
        coords={"axis": ["x", "y", "z"]},
        dims={"z": ["axis"]},
    )
    data = comparison.inference_data
    assert set(data) == {"chains", "q"}
    if hasattr(arviz, "InferenceData"):
        assert isinstance(data["q"], arviz.InferenceData)
    posterior = data["chains"].posterior
    assert dict(posterior.sizes) == {"chain": 2, "draw": 50, "axis": 3}
    assert posterior["axis"].values.tolist() == ["x", "y", "z"]
    assert "sample_stats" in data["q"] and "sample_stats" not in data["chains"]
    outcome, stats = comparison.outcomes["q"], data["q"].sample_stats
    assert np.array_equal(data["q"].posterior["z"].values, outcome.draws["z"])
    assert np.array_equal(stats["log_weight"].values[0], outcome.log_p - outcome.log_q)


def test_plot_forest(tmp_path):
    pytest.importorskip("matplotlib")
    comparison = compare({"p": normal(), "q": normal(0.1)}, reference="p")
    figure = comparison.plot_forest(tmp_path / "forest.png", var_names=["z"])
    assert [axes.get_title() for axes in figure.axes] == ["z"]
    assert (tmp_path / "forest.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="'mu', which p does not have. All methods have z, two"):
        comparison.plot_forest(var_names=["mu"])


def test_extras_that_are_missing():
    code = """
import sys
sys.modules.update(dict.fromkeys(("arviz", "arviz_base", "matplotlib", "numpyro", "jax")))
import numpy as np
from pyro_vi_ext.comparison import compare
from pyro_vi_ext.inference_methods import Outcome
draws = {"z": np.random.default_rng(0).normal(size=(2, 50))}
method = lambda **_: Outcome(draws)
comparison = compare({"p": method, "q": method}, reference="p")
print(comparison["q"]["max_error"])
def show(f):
    try:
        f()
    except ImportError as error:
        print(error)
show(lambda: comparison.inference_data)
show(comparison.plot_forest)
show(lambda: compare({"p": lambda **_: Outcome(draws, independent=False)}))
show(lambda: __import__("pyro_vi_ext.numpyro_methods"))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number, *errors = run.stdout.splitlines()
    extras = [error.split("pip install ")[1].split(";")[0] for error in errors]
    assert float(number) == 0.0
    assert extras == [f"pyro_vi_ext[{e}]" for e in ("arviz", "plot", "numpyro", "numpyro")]


# --- mistakes ----------------------------------------------------------------------------------


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="reference is 'NUTS', which is none of p, q"):
        compare({"p": normal(), "q": normal()}, reference="NUTS")
    with pytest.raises(ValueError, match="num_draws"):
        compare({"p": normal()}, num_draws=10)
    other = lambda **_: Outcome({"y": np.zeros((1, 50))})  # noqa: E731
    with pytest.raises(ValueError, match="no site in common. They have p: z, two; q: y"):
        compare({"p": normal(), "q": other})
    wide = lambda **_: Outcome({"z": np.zeros((1, 50, 4))})  # noqa: E731
    with pytest.raises(ValueError, match=r"'z' has shape \(3,\) by p and \(4,\) by q"):
        compare({"p": normal(), "q": wide})
