"""What the gradient report says is true, of estimators whose bias and variance are known."""

import math
import time

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vi_ext import (
    ImportanceWeightedELBO,
    TraceConcrete_ELBO,
    TraceDisARM_ELBO,
    TraceNVIL_ELBO,
    TraceREBAR_ELBO,
    TraceRLOO_ELBO,
    TraceScore_ELBO,
    gradient_report,
)
from pyro_vi_ext.discrete import DiscreteObjective

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor(0.8, dtype=torch.float64)


class Biased(TraceRLOO_ELBO):
    """Its own particle is in the baseline: the gradient is (J - 1) / J of the right one."""

    def surrogate(self, run, sites, pathwise):
        return super().surrogate(run, sites, pathwise) * 0.5


@pytest.fixture
def pair():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    logits = torch.tensor([0.3, -0.7], requires_grad=True)

    def model():
        b = pyro.sample("b", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
        pyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=X)

    def guide():
        pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))

    return model, guide, logits


def test_variance_of_the_score_function_by_enumeration(pair):
    model, guide, logits = pair
    report = gradient_report(TraceScore_ELBO(), model, guide, num_repeats=1000)
    p, num_repeats = logits.detach().sigmoid(), 1000
    outcomes = []  # probability, gradient
    for a in (0.0, 1.0):
        for b in (0.0, 1.0):
            value = torch.tensor([a, b])
            log_q = dist.Bernoulli(p).log_prob(value).sum()
            f = 2 * math.log(0.5) + dist.Normal(value.sum(), 1.0).log_prob(X) - log_q
            outcomes.append((log_q.exp(), f * (value - p)))
    first = sum(weight * g for weight, g in outcomes)
    variances = sum(weight * (g - first) ** 2 for weight, g in outcomes)
    squares = sum(weight * (g - first).square().sum() ** 2 for weight, g in outcomes)
    exact = variances.sum().item()
    error = ((squares.item() - exact**2) / num_repeats) ** 0.5
    row = report["TraceScore_ELBO"]
    assert abs(row.variance - exact) < 4 * error
    assert bool(((-row.mean[0] - first).abs() < 4 * (variances / num_repeats).sqrt()).all())
    assert row.efficiency == 1 / (row.variance * row.seconds)


def test_bias_is_told_from_noise(pair):
    objectives = {
        "RLOO": TraceRLOO_ELBO(30),
        "DisARM": TraceDisARM_ELBO(30),
        "REBAR": TraceREBAR_ELBO(30),
        "half": Biased(30),
        "Concrete": TraceConcrete_ELBO(1.0, 30),
        "two weights": ImportanceWeightedELBO(2),
    }
    report = gradient_report(objectives, *pair[:2], num_repeats=150)
    assert report.exact
    biased = {row.name for row in report.rows if row.looks_biased}
    assert {"half", "Concrete"} <= biased <= {"half", "Concrete", "two weights"}
    assert report["half"].bias > 10 * report["half"].bias_standard_error
    assert report["RLOO"].bias < 4 * report["RLOO"].bias_standard_error
    assert report.best().name in {"RLOO", "DisARM", "REBAR", "two weights"}
    text = str(report)
    assert "exact gradient by enumeration" in text and text.count("biased") == len(biased)


def test_losses_have_their_standard_error(pair):
    model, guide, _ = pair
    report = gradient_report([TraceRLOO_ELBO(2), TraceRLOO_ELBO(2)], model, guide, num_repeats=200)
    first, second = report.rows
    assert [first.name, second.name] == ["TraceRLOO_ELBO", "TraceRLOO_ELBO (2)"]
    error = math.hypot(first.loss_standard_error, second.loss_standard_error)
    assert 0 < abs(first.loss - second.loss) < 4 * error


def test_time_per_step(pair):
    class Slow(DiscreteObjective):
        def surrogate(self, run, sites, pathwise):
            time.sleep(0.03)
            return sum((site.signal * site.log_q).sum() for site in sites)

    report = gradient_report([Slow(), TraceScore_ELBO()], *pair[:2], num_repeats=5)
    assert report["Slow"].seconds - report["TraceScore_ELBO"].seconds > 0.02
    assert report["Slow"].cost == report["Slow"].variance * report["Slow"].seconds


def test_one_minibatch_for_all():
    logit = torch.tensor(0.2, requires_grad=True)
    x = torch.tensor([5.0, -5.0, 0.0, 20.0])

    def model():
        with pyro.plate("data", 4, subsample_size=1) as index:
            b = pyro.sample("b", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x[index])

    def guide():
        with pyro.plate("data", 4, subsample_size=1):
            pyro.sample("b", dist.Bernoulli(logits=logit))

    report = gradient_report(
        [TraceRLOO_ELBO(50), TraceDisARM_ELBO(50)], model, guide, num_repeats=50
    )
    assert not any(row.looks_biased for row in report.rows)
    assert abs(report.rows[0].loss - report.rows[1].loss) < 1.0  # data differ by hundreds of nats


def test_training_moves_the_learned_parts_alone(pair):
    model, guide, logits = pair
    nvil, before = TraceNVIL_ELBO(name="trained"), logits.detach().clone()

    def local_model():
        with pyro.plate("data", 2):
            b = pyro.sample("b", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(3 * b, 1.0), obs=torch.tensor([0.0, 9.0]))

    def local_guide():
        with pyro.plate("data", 2):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    first = gradient_report(nvil, local_model, local_guide, num_repeats=100)
    start = [p.detach().clone() for p in nvil.learned.parameters()]
    second = gradient_report(nvil, local_model, local_guide, num_repeats=100, num_training=200)
    assert torch.equal(logits.detach(), before) and logits.grad is None
    assert any(not torch.equal(a, b) for a, b in zip(start, nvil.learned.parameters(), strict=True))
    assert second.rows[0].variance < 0.8 * first.rows[0].variance


def test_without_an_exact_gradient():
    loc = torch.tensor(0.1, requires_grad=True)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Bernoulli(logits=z))

    def guide():
        pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("b", dist.Bernoulli(logits=loc))

    report = gradient_report(TraceRLOO_ELBO(2), model, guide, num_repeats=5)
    (row,) = report.rows
    assert not report.exact and row.bias is None and row.looks_biased is None
    assert "bias unknown" in str(report) and report.best() is row


def test_picture(pair, tmp_path):
    pytest.importorskip("matplotlib")
    report = gradient_report([TraceScore_ELBO(), Biased(30)], *pair[:2], num_repeats=100)
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["TraceScore_ELBO", "Biased (biased)"]


def test_mistakes():
    def model():
        pyro.sample("b", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="No parameter of the guide"):
        gradient_report(TraceScore_ELBO(), model, model)
    with pytest.raises(ValueError, match="objectives is empty"):
        gradient_report([], model, model)
    with pytest.raises(ValueError, match="num_repeats must be an integer >= 2"):
        gradient_report(TraceScore_ELBO(), model, model, num_repeats=1)
