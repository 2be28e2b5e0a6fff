"""Pareto smoothing against ArviZ and exact tails; streaming against all draws at once."""

import math

import numpy as np
import pytest
import torch

from pyro_vi_ext import pareto
from pyro_vi_ext.pareto import WeightSummary, effective_sample_size, pareto_smooth

pytestmark = pytest.mark.usefixtures("float64")

INF = math.inf

#: Log weights made of normal draws: light and heavy tails, beyond the range of exp, offsets, ties.
KINDS = {
    "light": lambda z: 0.01 * z,
    "normal": lambda z: z,
    "heavy": lambda z: 5 * z,
    "beyond exp": lambda z: 500 * z,
    "offset": lambda z: 3 * z - 1e4,
    "exponential": lambda z: 0.8 * z.abs() ** 1.5,
    "rounded": lambda z: (2 * z).round(),
    "two values": lambda z: (z > 1.3).to(z.dtype),
    "half zero": lambda z: torch.where(z < 0, -INF, z),
    "mostly zero": lambda z: torch.where(z < 1.8, -INF, z),
    "constant": lambda z: torch.full_like(z, -3.0),
}
TIED = {"rounded", "two values"}


def draw(kind, num_draws, units=6):
    log_w = KINDS[kind](torch.randn(num_draws, units))
    log_w[0] = torch.where(log_w[0] == -INF, 1.0, log_w[0])  # a unit of zeros has its own test
    return log_w


def distance(a, b):
    """Largest difference; equal infinities are no difference, NaN and others an infinite one."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    difference = torch.where(a == b, 0.0, (a - b).abs())
    return difference.nan_to_num(nan=INF).max().item()


def distance_to_arviz(log_w, tied=False):
    """Differences in k and in smoothed, normalised log weights (sorted, if ties have no order)."""
    arviz = pytest.importorskip("arviz")
    if not hasattr(arviz, "psislw"):
        pytest.skip("arviz >= 1 has no psislw")
    expected, expected_k = arviz.psislw(log_w.T.numpy().copy(), reff=1.0, normalize=True)
    smoothed, k = pareto_smooth(log_w, normalize=True)
    if tied:
        expected, smoothed = np.sort(expected, -1), smoothed.sort(0).values
    return distance(k, expected_k), distance(smoothed.T, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_draws", [2, 5, 20, 21, 25, 26, 60, 224, 225, 226, 1000, 5000])
def test_k_and_weights_equal_those_of_arviz(num_draws, kind):
    errors = distance_to_arviz(draw(kind, num_draws), kind in TIED)
    assert max(errors) < 1e-9


@pytest.mark.parametrize("num_draws", [25, 100, 225, 400, 2500])  # where M is no rounded number
@pytest.mark.parametrize("kind", ["normal", "heavy", "offset", "exponential"])
def test_k_and_weights_equal_those_of_arviz_stats(num_draws, kind):
    stats = pytest.importorskip("arviz_stats.base").array_stats
    log_w = draw(kind, num_draws)
    expected, expected_k = stats.psislw(-log_w.T.numpy(), r_eff=1.0)
    smoothed, k = pareto_smooth(log_w, normalize=True)
    assert distance(k, expected_k) < 1e-9 and distance(smoothed.T, expected) < 1e-9


def fit_scaled(k_factor, sigma_factor):
    exact = pareto.fit_generalized_pareto

    def fit(x, size):
        k, sigma = exact(x, size)
        return k * k_factor, sigma * sigma_factor

    return fit


@pytest.mark.parametrize(
    "name, mistake",
    [
        ("tail_length", lambda s: math.floor(min(s / 5, 3 * s**0.5))),
        ("tail_length", lambda s: math.ceil(min(s / 5, 3 * s**0.5)) + 1),
        ("tail_length", lambda s: math.ceil(s / 5)),
        ("fit_generalized_pareto", fit_scaled(1.0001, 1.0)),
        ("fit_generalized_pareto", fit_scaled(1.0, 1.0001)),
    ],
)
def test_the_comparison_sees_planted_errors(monkeypatch, name, mistake):
    log_w = draw("normal", 1001)
    assert max(distance_to_arviz(log_w)) < 1e-9
    monkeypatch.setattr(pareto, name, mistake)
    assert max(distance_to_arviz(log_w)) > 1e-6


@pytest.mark.parametrize("num_draws", [1, 2, 5, 20])
def test_short_tails_are_left_as_they_are(num_draws):
    log_w = 5 * torch.randn(num_draws, 3)
    smoothed, k = pareto_smooth(log_w)
    assert torch.equal(smoothed, log_w) and bool((k == INF).all())


def test_a_tail_of_equal_weights_is_fitted_where_the_profile_is_singular():
    # Some point of the grid is b = 0 (or nearly) for n = 100: 1 = (sqrt(m / 2.5) - 1) / 3, m = 40.
    log_w = torch.zeros(5000, 41)
    for unit in range(41):
        log_w[: 90 + unit, unit] = 1.0
    smoothed, k = pareto_smooth(log_w)
    assert bool(k.isfinite().all()) and not bool(smoothed.isnan().any())
    assert bool((k.diff().abs() < 0.1).all())  # as for tails that are one draw longer or shorter


def test_weights_that_are_nearly_equal_have_the_tail_of_their_logs():
    z = torch.randn(1000, 5)  # exp(c z) = 1 + c z
    (smoothed, k), (smaller, smaller_k) = (pareto_smooth(c * z) for c in (1e-6, 1e-18))
    assert distance(k, smaller_k) < 1e-4
    assert distance(1e6 * smoothed, 1e18 * smaller) < 1e-4
    assert distance(smaller, 1e-18 * z) > 1e-20  # it is smoothed


def test_a_fit_that_underflows_is_no_fit():
    log_w = 1e-10 * torch.rand(1000) - 700.0
    log_w[0] = 0.0
    smoothed, k = pareto_smooth(log_w)
    assert k == INF and torch.equal(smoothed, log_w)


def test_a_shape_of_zero_is_an_exponential_tail(monkeypatch):
    log_w, n = torch.randn(450), 64
    undo_prior = torch.tensor(-10 * 0.5 / n)
    sigma = 1e-3  # small enough for no quantile to reach the largest weight
    monkeypatch.setattr(pareto, "fit_generalized_pareto", lambda x, s: (undo_prior, 0 * s + sigma))
    smoothed, k = pareto_smooth(log_w)
    top, cutoff = log_w.topk(n + 1).values[[0, -1]]
    p = (torch.arange(n) + 0.5) / n
    expected = torch.log((cutoff - top).exp() - sigma * torch.log1p(-p)) + top
    assert abs(k) < 1e-15 and distance(smoothed.sort().values[-n:], expected) < 1e-12


def test_raw_weights_bound_the_smoothed_ones_and_their_order_is_kept():
    log_w = draw("heavy", 1000)
    smoothed, _ = pareto_smooth(log_w)
    assert bool((smoothed.amax(0) <= log_w.amax(0)).all())
    order = log_w.argsort(0)
    assert bool((smoothed.gather(0, order).diff(dim=0) >= 0).all())
    body = 1000 - pareto.tail_length(1000)
    assert torch.equal(smoothed.gather(0, order)[:body], log_w.gather(0, order)[:body])


def test_draws_along_any_dimension_and_units_by_themselves():
    log_w = 2 * torch.randn(4, 300, 3)
    for dim in (1, -2):
        smoothed, k = pareto_smooth(log_w, dim)
        assert smoothed.shape == log_w.shape and k.shape == (4, 3)
        for i in range(4):
            for j in range(3):
                alone, k_alone = pareto_smooth(log_w[i, :, j])
                assert distance(smoothed[i, :, j], alone) < 1e-13
                assert distance(k[i, j], k_alone) < 1e-13
    ess = effective_sample_size(log_w, 1)
    assert distance(ess[2, 1], effective_sample_size(log_w[2, :, 1])) < 1e-11


def test_offsets_shift_and_normalised_weights_sum_to_one():
    log_w = draw("heavy", 500)
    smoothed, k = pareto_smooth(log_w)
    shifted, k_shifted = pareto_smooth(log_w - 1000.0)
    assert distance(k, k_shifted) < 1e-9 and distance(smoothed - 1000.0, shifted) < 1e-9
    normalised, _ = pareto_smooth(log_w, normalize=True)
    assert distance(normalised.exp().sum(0), torch.ones(6)) < 1e-12
    assert distance(smoothed - smoothed.logsumexp(0), normalised) == 0


# --- exact tails -----------------------------------------------------------------------------


def k_is(true_k, log_w):
    """Whether the mean of k over units is within 4 standard errors, the prior on k undone.

    The tail of a generalised Pareto distribution has its shape. The asymptotic standard error of
    an efficient estimate from n draws is (1 + k) / sqrt(n), for k > -1/2.
    """
    _, k = pareto_smooth(log_w)
    n = pareto.tail_length(len(log_w))
    k = ((n + 10) * k - 10 * 0.5) / n
    error = (1 + true_k) / math.sqrt(n)
    return abs(k.mean().item() - true_k) < 4 * error / math.sqrt(len(k))


@pytest.mark.parametrize("true_k", [-0.3, 0.2, 0.7, 1.2])
def test_k_of_generalised_pareto_weights(true_k):
    u = torch.rand(20_000, 60)
    log_w = torch.log(torch.expm1(-true_k * u.log()) / true_k)
    assert k_is(true_k, log_w)
    assert not k_is(true_k + 0.1, log_w)


# --- the streaming summary -------------------------------------------------------------------


def summarise(log_w, chunk):
    summary = WeightSummary(len(log_w))
    for part in log_w.split(chunk):
        summary.add(part)
    return summary


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_draws, chunk", [(1, 1), (19, 4), (401, 1), (1003, 100), (1003, 1003)])
def test_streaming_equals_all_draws_at_once(kind, num_draws, chunk):
    log_w = draw(kind, num_draws)
    if num_draws == 401:  # the largest weight so far changes with every chunk
        log_w = log_w.sort(0).values
    summary = summarise(log_w, chunk)
    smoothed, k = pareto_smooth(log_w)
    log_s = math.log(num_draws)
    scale = 1 + log_w[log_w.isfinite()].abs().max().item()
    assert torch.equal(summary.pareto_k, k)
    assert distance(summary.log_mean_psis, smoothed.logsumexp(0) - log_s) < 1e-13 * scale
    assert distance(summary.log_mean, log_w.logsumexp(0) - log_s) < 1e-13 * scale
    assert distance(summary.mean_log, log_w.mean(0)) < 1e-13 * scale
    assert distance(summary.ess, effective_sample_size(log_w)) < 1e-11 * num_draws
    if num_draws > 1:
        r = (log_w - log_w.amax(0)).exp()
        relative = ((r.square().mean(0) / r.mean(0).square() - 1) / (num_draws - 1)).abs().sqrt()
        assert distance(summary.log_mean_se, relative) < 1e-7
        direct = (log_w.std(0) / math.sqrt(num_draws)).nan_to_num(0.0)
        assert distance(summary.mean_log_se.nan_to_num(0.0), direct) < 1e-11 * scale


def test_streaming_units_of_any_shape():
    log_w = torch.randn(250, 2, 3)
    summary, flat = summarise(log_w, 40), summarise(log_w.reshape(250, 6), 40)
    single = summarise(log_w[:, 1, 2], 40)
    names = "log_mean log_mean_se ess mean_log mean_log_se pareto_k log_mean_psis".split()
    for name in names:
        values = getattr(summary, name)
        assert values.shape == (2, 3)
        assert distance(values.reshape(6), getattr(flat, name)) < 1e-12
        assert distance(values[1, 2], getattr(single, name)) < 1e-12


def test_known_effective_sample_sizes():
    log_w = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 2.0], [1.0, 2.0, 1.0, 4.0]]).log()
    known = torch.tensor([3.0, 16 / 6, 1.0, 49 / 21])
    for offset in (0.0, 1e4, -1e4):
        assert distance(effective_sample_size(log_w + offset), known) < 1e-10
        assert distance(summarise(log_w + offset, 2).ess, known) < 1e-10


def test_standard_errors_of_lognormal_weights():
    # log w ~ N(-s^2 / 2, s^2), so that E w = 1 and Var w = exp(s^2) - 1.
    s, num_draws, units = 0.5, 1000, 4000
    summary = WeightSummary(num_draws)
    for _ in range(10):
        summary.add(s * torch.randn(num_draws // 10, units) - s**2 / 2)
    variance = math.expm1(s**2) / num_draws
    bias = -variance / 2  # of the log of a mean, to first order in 1 / S
    assert abs(summary.log_mean.mean().item() - bias) < 4 * math.sqrt(variance / units)
    assert abs(summary.mean_log.mean().item() + s**2 / 2) < 4 * s / math.sqrt(num_draws * units)

    def is_variance(estimates, errors):
        ratio = (estimates.var() / errors.square().mean()).item()
        return abs(ratio - 1) < 4 * math.sqrt(2 / units)  # the variance of 4000 normal numbers

    assert is_variance(summary.log_mean, summary.log_mean_se)
    assert is_variance(summary.mean_log, summary.mean_log_se)
    assert not is_variance(summary.log_mean, 1.1 * summary.log_mean_se)
    exact = torch.tensor([math.sqrt(variance), s / math.sqrt(num_draws)])
    found = torch.stack([summary.log_mean_se.mean(), summary.mean_log_se.mean()])
    assert bool((found / exact - 1).abs().max() < 0.01)


def test_spread_far_below_the_mean_is_not_lost():
    z = torch.randn(1000, 3)
    offset = summarise(1e8 + 1e-3 * z, 10)  # mean square minus squared mean: 1e16 - 1e16
    assert distance(offset.mean_log_se * 1e3, (1e3 * (1e8 + 1e-3 * z)).std(0) / 1000**0.5) < 1e-6
    nearly_equal = summarise(1e-9 * z, 10)  # 1 + 1e-18 - 1
    assert distance(nearly_equal.log_mean_se * 1e9, z.std(0) / 1000**0.5) < 1e-6
    assert bool((nearly_equal.log_mean_se > 0).all())


def test_memory_does_not_grow_with_the_draws():
    def numbers(value):
        if torch.is_tensor(value):
            return value.untyped_storage().size() // value.element_size()
        parts = vars(value).values() if hasattr(value, "__dict__") else []
        return sum(numbers(part) for part in parts)

    summary, sizes = WeightSummary(5000), []
    for _ in range(50):
        summary.add(torch.randn(100, 20))
        sizes.append(numbers(summary))
    tail = pareto.tail_length(5000)
    assert sizes[1:] == sizes[:-1] and sizes[0] == 20 * (tail + 1 + 6)


def test_no_graph_is_kept():
    log_w = torch.randn(100, 2, requires_grad=True)
    summary = summarise(log_w, 50)
    results = [summary.log_mean, summary.log_mean_psis, *pareto_smooth(log_w)]
    assert not any(r.requires_grad for r in [*results, effective_sample_size(log_w)])


def test_units_with_zero_weights():
    log_w = torch.randn(100, 3)
    log_w[:, 1] = -INF
    log_w[::2, 2] = -INF
    smoothed, k = pareto_smooth(log_w)
    assert bool((smoothed[:, 1] == -INF).all()) and k[1] == INF and bool(k[[0, 2]].isfinite().all())
    assert effective_sample_size(log_w)[1] == 0
    for chunk in (1, 30, 100):
        summary = summarise(log_w, chunk)
        assert summary.log_mean[1] == summary.log_mean_psis[1] == summary.mean_log[1] == -INF
        assert summary.ess[1] == 0 and summary.pareto_k[1] == INF
        assert summary.log_mean_se[1].isnan() and summary.mean_log_se[1].isnan()
        assert summary.mean_log[2] == -INF and summary.mean_log_se[2].isnan()
        assert bool(summary.log_mean_se[[0, 2]].isfinite().all())
        for name in ("log_mean", "mean_log", "ess"):
            assert (
                distance(getattr(summary, name)[0], getattr(summarise(log_w[:, 0], 9), name))
                < 1e-12
            )
    with pytest.raises(ValueError, match="all zero.*normalize=False"):
        pareto_smooth(log_w, normalize=True)


def test_single_precision_is_kept_and_accurate():
    log_w = 2 * torch.randn(2000, 5, dtype=torch.float32) - 200.0
    summary, exact = summarise(log_w, 100), summarise(log_w.double(), 100)
    for name in "log_mean log_mean_se mean_log mean_log_se pareto_k log_mean_psis".split():
        value = getattr(summary, name)
        assert value.dtype == torch.float32
        assert distance(value.double(), getattr(exact, name)) < 1e-3
    smoothed, k = pareto_smooth(log_w)
    assert smoothed.dtype == k.dtype == torch.float32
    for kind in KINDS:
        smoothed, k = pareto_smooth(draw(kind, 1000).float())
        assert not bool(smoothed.isnan().any() | k.isnan().any())


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_weights_that_are_no_weights(bad):
    log_w = torch.randn(30, 2)
    log_w[4, 1] = bad
    for call in (pareto_smooth, effective_sample_size, WeightSummary(30).add):
        with pytest.raises(ValueError, match=rf"{bad} at index \(4, 1\)"):
            call(log_w)


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="float32 or float64, got torch.int64"):
        pareto_smooth(torch.arange(3))
    with pytest.raises(ValueError, match="float32 or float64, got list"):
        effective_sample_size([0.0, 1.0])
    for log_w, dim in ((torch.zeros(3), 1), (torch.zeros(0, 3), 0), (torch.tensor(0.0), 0)):
        with pytest.raises(ValueError, match=f"no draws along dim {dim}"):
            pareto_smooth(log_w, dim)
    for num_draws in (0, 2.0, True):
        with pytest.raises(ValueError, match="num_draws must be an integer >= 1"):
            WeightSummary(num_draws)


def test_chunks_that_do_not_fit_change_nothing():
    summary = WeightSummary(30)
    with pytest.raises(ValueError, match="31 draws after 0, more than num_draws=30"):
        summary.add(torch.zeros(31, 5))
    first, second = torch.randn(10, 2), torch.randn(20, 2)
    summary.add(first)
    bad = {
        r"units of shape \(3,\).*had units of shape \(2,\)": torch.zeros(5, 3),
        "torch.float32 on cpu, the chunks before had .*float64": torch.zeros(5, 2).float(),
        "21 draws after 10, more than num_draws=30": torch.zeros(21, 2),
        "NaN|nan at index": torch.full((5, 2), math.nan),
    }
    for message, chunk in bad.items():
        with pytest.raises(ValueError, match=message):
            summary.add(chunk)
    summary.add(second)
    assert distance(summary.log_mean, summarise(torch.cat([first, second]), 30).log_mean) < 1e-13


@pytest.mark.parametrize(
    "result", "log_mean log_mean_se ess mean_log mean_log_se pareto_k log_mean_psis".split()
)
def test_no_result_before_the_last_draw(result):
    summary = WeightSummary(30)
    for _ in range(3):
        with pytest.raises(ValueError, match=r"num_draws=30\) has \d+ draws so far"):
            getattr(summary, result)
        summary.add(torch.randn(10))
    assert getattr(summary, result).isfinite()
