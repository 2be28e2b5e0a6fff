"""The bar of long work: where it shows, what it counts, and what happens without tqdm."""

import io
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vi_ext import elbo_terms, guide_report, log_evidence
from pyro_vi_ext.progress import progress_bar

pytestmark = pytest.mark.usefixtures("float64")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch):
    """Not a fixture: pytest sets ``sys.stderr`` anew before the test itself."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.mark.parametrize("progress, shown", [(None, True), (True, True), (False, False)])
def test_on_a_terminal(monkeypatch, progress, shown):
    terminal = open_terminal(monkeypatch)
    with progress_bar(progress, 3) as bar:
        bar.update(3)
    assert ("3/3" in terminal.getvalue()) == shown


@pytest.mark.parametrize("progress, shown", [(None, False), (True, True), (False, False)])
def test_in_a_log(capsys, progress, shown):
    with progress_bar(progress, 3) as bar:
        bar.update(3)
    captured = capsys.readouterr()
    assert ("3/3" in captured.err) == shown and captured.out == ""


def test_it_counts_from_where_the_work_was_left_with_a_note_and_a_unit(capsys):
    with progress_bar(True, 10, initial=4, unit="page") as bar:
        bar.update(2, note="loss=1.5")
        bar.update(4)
    shown = capsys.readouterr().err
    assert " 4/10 " in shown and "10/10" in shown
    assert "loss=1.5" in shown and "page/s" in shown


def test_work_that_tells_its_total_late(capsys):
    with progress_bar(True, 0) as bar:
        for done in (2, 5, 8):
            bar.reach(done, 8)
        assert bar.bar.n == 8 and bar.bar.total == 8
    assert "8/8" in capsys.readouterr().err


def test_the_bar_is_closed_by_an_error():
    with pytest.raises(ZeroDivisionError), progress_bar(True, 3) as bar:
        raise ZeroDivisionError
    assert bar.bar.disable  # as tqdm leaves a closed bar


def test_without_tqdm(monkeypatch):
    terminal = open_terminal(monkeypatch)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for progress in (None, False):
        with progress_bar(progress, 3) as bar:
            bar.update(1, note="loss=1.5")
            bar.reach(3, 3)
    assert terminal.getvalue() == ""
    with pytest.raises(ImportError, match=r"pip install pyro_vi_ext\[progress\]"):
        progress_bar(True, 3)


# --- over the chunks of the estimates ----------------------------------------------------------


def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    pyro.sample("z", dist.Normal(x / 2, 1.0))


CHUNKS = {"num_particles": 30, "chunk_size": 10}
WORK = {
    "log_evidence": (lambda x, **options: log_evidence(model, guide, x, **CHUNKS, **options), 30),
    "guide_report": (lambda x, **options: guide_report(model, guide, x, **CHUNKS, **options), 30),
    "elbo_terms": (lambda x, **options: elbo_terms(model, guide, x, **CHUNKS, **options), 30),
    "annealing": (
        lambda x, **options: log_evidence(
            model, None, x, method="ais", num_temperatures=6, **CHUNKS, **options
        ),
        (1 + 3) * 5,  # a pilot run and three chunks
    ),
}


@pytest.mark.parametrize("name", WORK)
def test_estimates_show_all_their_chunks(name, capsys, monkeypatch):
    work, total = WORK[name]
    x = torch.tensor(1.0)
    work(x)
    work(x, progress=False)
    assert capsys.readouterr().err == ""
    work(x, progress=True)
    assert f"{total}/{total}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    work(x)
    with pytest.raises(ImportError, match="tqdm"):
        work(x, progress=True)
