"""Every example runs end to end, small."""

import csv
import math

import pyro
import pytest
import torch

from pyro_vi_ext import TraceREBAR_ELBO, TraceRELAX_ELBO

from .running import load, restored  # noqa: F401


def test_negative_binomial(tmp_path, capsys):
    example = load("negative_binomial")
    argv = (
        "--num-steps 30 --num-mixing 0 3 --num-draws 2000 --num-exported 200 --num-evaluations 2 "
        f"--num-nuts 100 --output {tmp_path}"
    )
    rows = example.main(example.parse(argv.split()))
    out = capsys.readouterr().out
    with open(tmp_path / "table.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == [row["method"] for row in rows]
    assert all(row["method"] in out for row in rows)
    cavi = table[1]
    assert cavi["method"] == "mean field, CAVI" and float(cavi["KL <="]) == pytest.approx(
        0.98152, abs=1e-5
    )
    assert (tmp_path / "posterior.png").stat().st_size > 20_000
    assert len(list(tmp_path.glob("*.nc"))) == len(rows) - 1


def test_evidence(tmp_path, capsys):
    example = load("evidence")
    argv = (
        "--num-steps 200 --num-particles 1 100 --num-evaluations 20 --num-elbo 500 "
        f"--num-draws 2000 5000 --num-annealed 64 --num-temperatures 50 --output {tmp_path}"
    )
    rows = example.main(example.parse(argv.split()))
    out = capsys.readouterr().out
    assert all(row["proposal"] in out for row in rows) and "worst units" in out
    assert (tmp_path / "evidence.png").stat().st_size > 20_000
    with open(tmp_path / "table.csv") as file:
        table = {(r["problem"], r["proposal"], r["draws"]): r for r in csv.DictReader(file)}
    assert len(table) == len(rows)

    flagged, lacking = set(), {"guide, one sign": math.log(2)}  # one of two equal modes
    for (_, proposal, _), row in table.items():
        estimate, se, exact = (float(row[name]) for name in ("estimate", "se", "exact"))
        if float(row["Pareto k"] or 0) > 0.7:
            flagged.add(proposal)
        else:
            assert abs(estimate + lacking.get(proposal, 0.0) - exact) < 4 * se + 1e-9, row
        if proposal in lacking:  # far more than the error, and no diagnostic sees it
            assert estimate - exact < -4 * se
        if proposal.startswith("posterior"):
            assert estimate == pytest.approx(-5.414534, abs=1e-6) and se < 1e-9
    assert {"prior, 2,000 draws", "prior, 5,000 draws", "encoder of x"} <= flagged
    assert not flagged & {"guide, one sign", "guide, both signs", "encoder of x and s"}


DEEP_VAE_TINY = (
    "--num-steps 9 --num-test 15 --num-free 5 --num-free-steps 3 --num-iwae-particles 100"
)


def run_deep_vae(tmp_path, options):
    example = load("deep_vae")
    args = example.parse([*options.split(), "--output", str(tmp_path)])
    return example.main(args)


def test_deep_vae(tmp_path, capsys):
    options = "--num-steps 150 --num-test 30 --num-free 10 --num-free-steps 60"
    rows = run_deep_vae(tmp_path, f"{options} --num-iwae-particles 500")
    out = capsys.readouterr().out
    with open(tmp_path / "table.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["guide"] for row in table] == ["amortised"] * 3 + ["free-form"]
    assert [int(row["N"]) for row in table] == [30, 30, 10, 10]
    for row in rows:
        error = math.hypot(row["se"], row["se of IWAE"])
        assert row["ELBO"] < row["IWAE-K"] + 4 * error
        assert row["ELBO"] == pytest.approx(row["reconstruction"] - row["KL"], abs=1e-3)
        assert row["bits/dim"] == pytest.approx(-row["ELBO"] / (64 * math.log(2)), rel=1e-5)
        assert -40 < row["ELBO"] < -22  # from independent pixels to a model trained to the end
    amortised, free = rows[2:]
    gap, error = free["ELBO"] - amortised["ELBO"], math.hypot(free["se"], amortised["se"])
    assert gap > 4 * error and f"{gap:.3f} (se {error:.3f})" in out
    same = abs(free["IWAE-K"] - amortised["IWAE-K"])  # one evidence, two proposals
    assert same < 4 * math.hypot(free["se of IWAE"], amortised["se of IWAE"])
    assert (tmp_path / "deep_vae.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    "options",
    [
        "--objective stl --num-layers 2 --attribute 1 7 9",
        "--objective iwae --likelihood gaussian --guide-steps 3",
        "--objective dreg --num-particles 3 --num-layers 2 --likelihood gaussian",
    ],
)
def test_deep_vae_options(tmp_path, options):
    rows = run_deep_vae(tmp_path, f"{options} {DEEP_VAE_TINY}")
    for row in rows:
        assert row["ELBO"] < row["IWAE-K"] + 4 * math.hypot(row["se"], row["se of IWAE"])
        levels = 17 if "gaussian" in options else 1
        nats = -row["ELBO"] + 64 * math.log(levels)  # intervals of width 1/17
        assert row["bits/dim"] == pytest.approx(nats / (64 * math.log(2)), rel=1e-5)
    layers = 2 if "layers 2" in options else 1
    assert len(rows[0]["active units"].split(",")) == layers


def test_deep_vae_continues_its_checkpoint_and_no_other(tmp_path):
    options = f"{DEEP_VAE_TINY} --checkpoint {tmp_path / 'fit.pt'}"
    begun = run_deep_vae(tmp_path, options)
    assert run_deep_vae(tmp_path, options) == begun  # trained already
    with pytest.raises(ValueError, match="begun with {'objective': 'elbo'}"):
        run_deep_vae(tmp_path, f"{options} --objective stl")
    (tmp_path / "fit.pt").unlink()
    assert run_deep_vae(tmp_path, options) == begun


def test_deep_vae_grey_levels_become_intervals():
    """Rounding down undoes it, and the density of a uniform guess is that of its levels."""
    example = load("deep_vae")
    args = example.parse(["--likelihood", "gaussian"])
    grey = torch.arange(17.0).repeat(500, 1) / 16
    x = example.observe(grey, args, torch.Generator().manual_seed(0))
    assert torch.equal((x * 17).floor(), (grey * 16).round())
    assert 0 <= x.min() and x.max() < 1
    within = x * 17 - (x * 17).floor()
    assert abs(within.mean() - 0.5) < 4 * within.std() / x.numel() ** 0.5


def test_toy_bernoulli(tmp_path, capsys):
    example = load("toy_bernoulli")
    argv = (
        "--targets 0.45 --num-steps 40 --num-seeds 8 --num-repeats 100 --num-points 2 "
        f"--output {tmp_path}"
    )
    rows = example.main(example.parse(argv.split()))
    out = capsys.readouterr().out
    with open(tmp_path / "table.csv") as file:
        table = {row["estimator"]: row for row in csv.DictReader(file)}
    assert list(table) == list(example.ESTIMATORS) == list(example.STYLES)
    assert all(row["estimator"] in out for row in rows)
    assert (tmp_path / "toy_bernoulli.png").stat().st_size > 20_000
    start = 0.2525  # of theta = 1/2
    assert all(row["losses"][0].tolist() == pytest.approx([start] * 8) for row in rows)
    assert all(0.45**2 < row["losses"].min() for row in rows)
    for name in ("exact gradient", "running mean", "RLOO", "ARM", "DisARM"):
        assert float(table[name]["loss"]) < start - 4 * float(table[name]["se"])
    assert float(table["exact gradient"]["se"]) == pytest.approx(0, abs=1e-12)


def test_toy_bernoulli_estimates_the_gradient_without_bias():
    """Also after some steps, where baselines and control variates have learned."""
    example = load("toy_bernoulli")
    torch.set_default_dtype(torch.float64)
    t, logits = torch.tensor(0.45), torch.linspace(-2, 2, 5)
    args = example.parse("--num-steps 20 --num-seeds 5 --num-points 1 --num-repeats 2".split())
    for name, (_, make) in example.ESTIMATORS.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        objective = make(5)
        example.learn(objective, t, args)
        draws = example.gradient_draws(objective, logits, t, 4000)
        se = draws.std(0) / len(draws) ** 0.5 + 1e-12
        exact = example.exact_gradient(logits, t)
        assert ((draws.mean(0) - exact).abs() < 4 * se).all(), name
        again = []
        for _ in range(2):  # measuring teaches nothing
            pyro.set_rng_seed(1)
            again.append(example.gradient_draws(objective, logits, t, 3))
        assert torch.equal(*again), name
        planted = example.exact_gradient(logits, t - 0.05)  # twice the gradient
        assert ((draws.mean(0) - planted).abs() > 4 * se).any(), name


def test_toy_bernoulli_variances_at_one_half():
    """Of g for f(0) = -t^2 and f(1) = -(1 - t)^2, whose difference is 2 t - 1."""
    example = load("toy_bernoulli")
    torch.set_default_dtype(torch.float64)
    t, logits = torch.tensor(0.499), torch.zeros(4)
    exact = example.exact_gradient(logits, t)
    step = (1 - 2 * t) ** 2
    mean_f = example.expected_loss(logits, t)[0]
    variances = {
        "REINFORCE": mean_f**2 / 4,
        "running mean": mean_f**2 / 4,  # which is zero at first
        "MuProp": torch.tensor(1 / 64),  # the remainder of f is its curvature
        "RLOO": step / 16,
        "ARM": step / 48,
        "DisARM": torch.tensor(0.0),
        "exact gradient": torch.tensor(0.0),
    }
    assert math.log(variances["REINFORCE"]) == pytest.approx(-math.log(64), abs=1e-4)
    for name, variance in variances.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        objective = example.ESTIMATORS[name][1](4)
        draws = example.gradient_draws(objective, logits, t, 2000)
        squares = (draws - exact).square()
        se = squares.std() / squares.numel() ** 0.5
        assert abs(squares.mean() - variance) < 4 * se + 1e-12 * variance + 1e-30, name
    assert example.log(0.0) == -math.inf


@pytest.mark.parametrize("coupled", [True, False])
def test_toy_bernoulli_control_of_no_units_is_rebar(coupled):
    example = load("toy_bernoulli")
    torch.set_default_dtype(torch.float64)
    t, logits, draws = torch.tensor(0.45), torch.linspace(-2, 2, 5), []
    for objective in (
        TraceREBAR_ELBO(coupled=coupled),
        TraceRELAX_ELBO(example.Control(5, 0), coupled=coupled),
        TraceRELAX_ELBO(example.Control(5, 10), coupled=coupled),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        draws.append(example.gradient_draws(objective, logits, t, 100))
    for other in draws[1:]:
        assert torch.allclose(other, draws[0], rtol=1e-10, atol=1e-14)


def test_vq_vae(tmp_path, capsys):
    example = load("vq_vae")
    argv = (
        "--num-steps 100 --num-prior-steps 60 --num-strong-steps 4 --batch-size 50 --num-test 100 "
        f"--checkpoint {tmp_path}/saved --output {tmp_path}"
    )
    rows = example.main(example.parse(argv.split()))
    out = capsys.readouterr().out
    assert all(row["model"] in out for row in rows) and len(rows) == 6
    for row in rows:
        assert row["ELBO"] == pytest.approx(row["reconstruction"] - row["KL"])
        assert row["bits/dim"] == pytest.approx(-row["ELBO"] / (64 * math.log(2)))
        if "uniform" in row["model"]:
            assert row["KL"] == pytest.approx(4 * math.log(32))
    uniform, learned = rows[:2]
    assert learned["KL"] < uniform["KL"] and learned["reconstruction"] == uniform["reconstruction"]
    assert uniform["codes of another image"] < uniform["reconstruction"] - 1
    assert (tmp_path / "vq_vae.png").stat().st_size > 20_000
    with open(tmp_path / "tables.csv") as file:
        assert [row["model"] for row in csv.DictReader(file)] == [row["model"] for row in rows]
    # A second run continues from the checkpoints, with nothing left to do.
    again = example.main(example.parse(argv.split()))
    assert [row["KL"] for row in again] == pytest.approx([row["KL"] for row in rows])


def test_compiled_vae(tmp_path, capsys):
    example = load("compiled_vae")
    argv = f"--backend eager --num-steps 30 --every 10 --output {tmp_path}"
    rows = example.main(example.parse(argv.split()))
    out = capsys.readouterr().out
    with open(tmp_path / "table.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == list(example.METHODS)
    assert all(row["method"] in out for row in rows)
    plain, *compiled = rows
    for row, line in zip(compiled, table[1:], strict=True):
        assert row["losses"].tolist() == pytest.approx(plain["losses"].tolist(), rel=1e-4)
        assert float(line["largest difference"]) < 1e-4
        assert row["trace"] > 0 and row["ends"] == [10, 20, 30]
        assert float(line["speed"]) == pytest.approx(
            float(table[0]["stepping (s)"]) / float(line["stepping (s)"])
        )
    assert plain["losses"][0] > 43 and plain["loss"] < 40  # of independent coins: 64 log 2 = 44.4
    assert plain["loss"] == pytest.approx(plain["losses"][-3:].mean().item())
    assert (tmp_path / "compiled_vae.png").stat().st_size > 20_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*r-hat")  # the chains are short
def test_compare_gmm(tmp_path, capsys):
    example = load("compare_gmm")
    argv = (
        "--num-steps 20 --num-warmup 20 --num-samples 40 --num-draws 50 --num-chains 2 "
        f"--output {tmp_path}"
    )
    comparison = example.main(example.parse(argv.split()))
    out = capsys.readouterr().out
    assert len(comparison.table) == 6 and all(row["method"] in out for row in comparison.table)
    assert len(list((tmp_path / "iris").glob("*.nc"))) == 6
    for name in ("forest.png", "forest_in_sd.png"):
        assert (tmp_path / "iris" / name).stat().st_size > 20_000
