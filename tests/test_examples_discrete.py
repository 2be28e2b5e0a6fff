"""The examples of discrete latents run end to end, small."""

import csv
import math

import pytest
import torch

from .running import load, restored  # noqa: F401


def read_table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def run_bernoulli_vae(tmp_path, options):
    example = load("bernoulli_vae")
    return example.main(example.parse([*options.split(), "--output", str(tmp_path)]))


def test_bernoulli_vae(tmp_path, capsys):
    options = "--num-steps 60 --lr 0.01 --num-images 40 --batch-size 50"
    rows = run_bernoulli_vae(tmp_path, options)
    out = capsys.readouterr().out
    table = read_table(tmp_path / "table.csv")
    assert [row["objective"] for row in table] == ["rloo", "disarm", "rebar"]
    for row in rows:
        error = math.hypot(row["se of valid ELBO"], row["se of valid L_100"])
        assert row["valid ELBO"] < row["valid L_100"] + 4 * error
        assert -45 < row["valid ELBO"] < -22  # from independent pixels to a trained model
        assert f"{row['valid L_100']:.3f}" in out
        assert -row["losses"][-10:].mean() > -row["losses"][:10].mean()
    assert (tmp_path / "bernoulli_vae.png").stat().st_size > 20_000


BERNOULLI_VAE_TINY = "--num-steps 4 --num-images 12 --batch-size 20"


@pytest.mark.parametrize("layers", ["1", "2", "nonlinear"])
def test_bernoulli_vae_has_all_objectives(tmp_path, layers):
    names = "score rloo nvil muprop arm disarm concrete rebar relax vimco".split()
    options = f"{BERNOULLI_VAE_TINY} --layers {layers} --objective {' '.join(names)}"
    rows = run_bernoulli_vae(tmp_path, options)
    assert [row["objective"] for row in rows] == names
    first = {row["objective"]: row["losses"][0] for row in rows}
    assert len({float(first[name]) for name in ("score", "nvil", "muprop", "arm", "disarm")}) == 1


def test_bernoulli_vae_trains_what_the_objective_learns(tmp_path, monkeypatch):
    example, made = load("bernoulli_vae"), []
    trains_on, make = example.OBJECTIVES["rebar"]

    def remembered():
        made.append(make())
        return made[-1]

    monkeypatch.setitem(example.OBJECTIVES, "rebar", (trains_on, remembered))
    options = f"{BERNOULLI_VAE_TINY} --objective rebar --output {tmp_path}"
    example.main(example.parse(options.split()))
    learned = dict(made[0].learned.named_parameters())
    assert learned and all(
        abs(p.item() - s) > 1e-4
        for p, s in zip(learned.values(), (math.log(0.5), 1.0), strict=True)
    )


def test_bernoulli_vae_continues_its_checkpoint_and_no_other(tmp_path):
    options = f"{BERNOULLI_VAE_TINY} --objective rebar nvil --checkpoint {tmp_path / 'fits'}"
    whole = run_bernoulli_vae(tmp_path, options.replace("steps 4", "steps 8"))
    for file in (tmp_path / "fits").iterdir():
        file.unlink()
    run_bernoulli_vae(tmp_path, options)
    resumed = run_bernoulli_vae(tmp_path, options.replace("steps 4", "steps 8"))
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one["losses"], other["losses"])
        assert one["valid L_100"] == other["valid L_100"]
    with pytest.raises(ValueError, match="begun with {'layers': '1'}"):
        run_bernoulli_vae(tmp_path, f"{options} --layers 2")


def test_structured_prediction(tmp_path, capsys):
    example = load("structured_prediction")
    argv = (
        "--num-draws 1 5 --latent-dims 20 --num-steps 150 --lr 0.02 --batch-size 50 "
        f"--num-images 60 --num-shown 3 --output {tmp_path}"
    )
    rows = example.main(example.parse(argv.split()))
    out = capsys.readouterr().out
    table = read_table(tmp_path / "table.csv")
    assert [row["gradient"] for row in table] == ["no baseline", "RLOO", "VIMCO"]
    for row in rows:
        assert f"{row['test L_100']:.3f}" in out
        error = math.hypot(row["se of training L_m"], row["se of training L_100"])
        assert row["training L_m"] < row["training L_100"] + 4 * error
    best, plain = rows[2], rows[0]
    error = math.hypot(best["se of test L_100"], plain["se of test L_100"])
    assert best["test L_100"] > plain["test L_100"] + 4 * error
    assert (tmp_path / "structured_prediction.png").stat().st_size > 20_000


def test_iris_mixture(tmp_path, capsys):
    example = load("iris_mixture")
    argv = f"--num-steps 60 --num-repeats 40 --output {tmp_path}"
    rows, report = example.main(example.parse(argv.split()))
    out = capsys.readouterr().out
    table = read_table(tmp_path / "table.csv")
    assert [row["objective"] for row in table] == [row["objective"] for row in rows]
    for row in rows:
        error = math.hypot(row["se"], row["se of best labels"])
        assert row["ELBO"] < row["best labels"] + 4 * error
        assert f"{row['ELBO']:.2f}" in out and row["flowers right"] > 120
    exact = rows[0]
    assert exact["objective"] == "labels added up"
    assert all(exact["ELBO"] > row["ELBO"] for row in rows[1:])
    assert report.exact and [row.name for row in report.rows][1:] == [
        row["objective"] for row in rows[1:]
    ]
    assert len(read_table(tmp_path / "gradients.csv")) == 4
    assert (tmp_path / "iris_mixture.png").stat().st_size > 20_000
