"""Guides of known distance from the posterior: k, ESS, ELBO and gap of each unit."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.importance import psis_diagnostic

from pyro_vi_ext import GuideReport, guide_report

pytestmark = pytest.mark.usefixtures("float64")

SD = 0.5**0.5  # of the posterior N(x / 2, 1/2)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def scaled(ratio, shift=0.0):
    """A guide off by ``shift`` standard deviations, with ``ratio`` times their size."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift * SD, ratio * SD))

    return guide


def evidence(x):
    return dist.Normal(0.0, 2.0**0.5).log_prob(x)


def kl(ratio):
    """KL(q || p) per unit, nats."""
    ratio = torch.as_tensor(ratio)
    return 0.5 * (ratio**2 - 1) - ratio.log()


def mean_square_weight(ratio):
    """E_q w^2 / (E_q w)^2 per unit."""
    ratio = torch.as_tensor(ratio)
    return ratio**2 / (2 * ratio**2 - 1).sqrt()


# --- per unit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio, shift, nats", [(1.0, 0.077, 0.003), (0.87, 0.0, 0.018)])
def test_a_guide_that_is_near_everywhere_is_not_flagged(ratio, shift, nats):
    """At N = 1000, where the global k of any guide is hopeless."""
    x, guide = torch.randn(1000), scaled(ratio, shift)
    assert 0.98 * nats < kl(ratio) + shift**2 / 2 < nats
    report = guide_report(model, guide, x)
    assert (report.pareto_k < 0.7).all() and (report.ess > 600).all()
    assert report.global_pareto_k > 0.7 and report.global_ess < 50
    assert psis_diagnostic(model, guide, x, num_particles=1000, max_plate_nesting=1) > 0.7
    text = str(report)
    assert "1000 'data', 1000 draws" in text
    assert "good (<= 0.7) 1000   bad (0.7 to 1) 0   very bad (> 1) 0   of 1000" in text


def test_the_gap_is_the_divergence():
    """KL less the bias of the K-sample bound, Var(w) / (2 K), which is small here."""
    num, ratio = 400, 1.2
    report = guide_report(model, scaled(ratio), torch.randn(500), num_particles=num)
    torch.testing.assert_close(report.gap, report.iwae - report.elbo)
    bias = (mean_square_weight(ratio) - 1) / (2 * num)
    error = report.gap.std() / 500**0.5
    assert abs(report.gap.mean() - (kl(ratio) - bias)) < 4 * error
    assert abs(report.gap.mean() - 1.05 * kl(ratio)) > 4 * error


def test_the_elbo_has_a_calibrated_error():
    x, ratio = torch.randn(400), 0.8
    report = guide_report(model, scaled(ratio), x)
    z = (report.elbo - (evidence(x) - kl(ratio))) / report.elbo_standard_error
    assert abs(z.mean()) < 4 / 20 and abs(z.square().mean() - 1) < 4 * (2 / 400) ** 0.5
    assert (report.iwae - evidence(x)).mean().abs() < 0.01


def test_effective_sample_size():
    num, ratio = 1000, 1.3
    report = guide_report(model, scaled(ratio), torch.randn(400), num_particles=num)
    expected, error = num / mean_square_weight(ratio), report.ess.std() / 20
    assert abs(report.ess.mean() - expected) < 4 * error + expected / num  # its bias is O(1 / K)


def test_the_tail_is_that_of_the_weights():
    """A guide of ratio r has weights with a tail of shape 1 - r^2; the fit leans towards 1/2."""
    k = {
        ratio: guide_report(model, scaled(ratio), torch.zeros(100)).pareto_k.mean()
        for ratio in (0.2, 0.7, 1.5)
    }
    assert k[0.2] > 0.7 and abs(k[0.7] - 0.51) < 0.1 and k[1.5] < 0.2


def test_the_exact_posterior_is_never_flagged():
    report = guide_report(model, scaled(1.0), torch.randn(5), num_particles=50)
    assert (report.pareto_k == -math.inf).all() and (report.gap.abs() < 1e-12).all()
    torch.testing.assert_close(report.ess, torch.full((5,), 50.0))
    assert report.global_pareto_k == -math.inf and report.global_ess == pytest.approx(50.0)
    assert "good (<= 0.7) 5 " in str(report)


def test_one_unit_is_the_whole():
    """Also without any plate."""

    def single(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 0.4))

    x = torch.tensor([0.3, -0.2])
    auto = AutoMultivariateNormal(model, init_scale=0.3)
    for report in (guide_report(single, guide, x[0]), guide_report(model, auto, x)):
        assert report.plates == () and report.gap.shape == ()
        assert report.global_pareto_k == report.pareto_k.item()
        assert report.global_ess == report.ess.item()
        assert report.worst() == [()] and not report.gap.requires_grad
        text = str(report)
        assert "the whole model is one unit, 1000 draws" in text and "worst units" not in text


def test_units_of_a_subsample_and_in_two_plates():
    x = torch.randn(30, 2)

    def grid(x, observe):
        rows = pyro.plate("rows", 30, subsample_size=4, dim=-2)
        with rows as index, pyro.plate("columns", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if observe:
                pyro.sample("x", dist.Normal(z, torch.tensor([1.0, 0.05])), obs=x[index])

    report = guide_report(
        lambda: grid(x, True), lambda: grid(x, False), num_particles=200, chunk_size=60
    )
    assert report.plates == ("rows", "columns") and report.gap.shape == (4, 2)
    assert [column for _, column in report.worst(4, by="gap")] == [1] * 4
    assert "4 'rows' x 2 'columns', 200 draws" in str(report)


def test_draws_of_a_semi_implicit_guide_that_share_noise():
    """The standard error of the ELBO is that of means over chunks."""

    def guide(x):
        with pyro.plate("data", len(x)):
            psi = pyro.sample("psi", dist.Normal(x / 2, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(psi, 0.5))

    x = torch.zeros(100)
    options = {"num_particles": 15_000, "chunk_size": 150, "num_mixing_particles": 2}
    report = guide_report(model, guide, x, **options)
    ratio = (report.elbo.std() / report.elbo_standard_error).square().mean()
    assert abs(ratio - 1) < 4 * (2 / 100) ** 0.5


# --- the report --------------------------------------------------------------------------------


def report_of(k, gap, plates=("data",)):
    k, gap = torch.tensor(k), torch.tensor(gap)
    zero = torch.zeros_like(k)
    return GuideReport(k, zero + 10, zero, zero, gap, gap, 2.5, 1.25, plates, 1000)


def test_the_worst_units_come_first():
    report = report_of([0.1, math.inf, 0.9, math.inf], [5.0, 1.0, 2.0, 3.0])
    assert report.worst() == [(3,), (1,), (2,), (0,)]
    assert report.worst(2, by="gap") == [(0,), (3,)]
    report = report_of([[0.1, 0.9], [1.2, 0.3]], [[0.0, 0.0], [0.0, 1.0]], ("a", "b"))
    assert report.worst(3) == [(1, 0), (0, 1), (1, 1)]
    with pytest.raises(ValueError, match="'pareto_k' or 'gap', got 'ess'"):
        report.worst(by="ess")


def test_the_worst_unit_of_a_fit_is_the_one_that_is_off():
    def guide(x):
        offset = torch.zeros(len(x)).index_fill(0, torch.tensor(3), 3.0)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + offset, SD))

    report = guide_report(model, guide, torch.randn(6))
    assert report.worst(1) == report.worst(1, by="gap") == [(3,)]
    assert (report.pareto_k > 0.7).nonzero().tolist() == [[3]]


def test_it_is_printed_as_a_table():
    report = report_of([0.1, 0.7, 0.9, math.inf], [5.0, 1.0, 2.0, 3.0])
    assert str(report).splitlines() == [
        "Guide report: 4 'data', 1000 draws",
        "  Pareto k       good (<= 0.7) 2   bad (0.7 to 1) 1   very bad (> 1) 1   of 4",
        "  global         k = 2.50, ESS = 1.2",
        "  ESS            median 10, from 10 to 10",
        "  gap to IWAE    median 2, from 1 to 5 nats",
        "  worst units    k      ESS      gap",
        "  3               inf     10.0   3.0000",
        "  2              0.90     10.0   2.0000",
        "  1              0.70     10.0   1.0000",
        "  0              0.10     10.0   5.0000",
    ]


@pytest.mark.parametrize("num_particles", [24, 100.0])
def test_too_few_draws_are_refused(num_particles):
    with pytest.raises(ValueError, match="num_particles must be an integer >= 25"):
        guide_report(model, scaled(1.0), torch.zeros(2), num_particles=num_particles)


def test_a_point_mass_is_refused_by_name():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x / 2))

    with pytest.raises(ValueError, match="'z' is a point mass"):
        guide_report(model, guide, torch.zeros(2))
