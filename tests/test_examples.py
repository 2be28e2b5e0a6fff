"""Every example runs end to end, small."""

import csv
import importlib.util
import math
import pathlib

import pyro
import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def restored():
    local = pyro.settings.get("module_local_params")
    yield
    pyro.settings.set(module_local_params=local)
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
