"""Every example runs end to end, small."""

import csv
import importlib.util
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
