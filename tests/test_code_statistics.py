"""Usage of codes against closed forms, random rows, and two processes against one."""

import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_vi_ext.guides import code_statistics
from pyro_vi_ext.guides.code_statistics import (
    CodeUsage,
    draw_rows,
    from_first_process,
    gather_rows,
    perplexity,
    totals,
)

from . import two_processes

pytestmark = pytest.mark.usefixtures("float64")


# --- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_usage_is_an_exponential_moving_average(decay):
    usage, batches = CodeUsage(4, decay), 10 * torch.rand(30, 4)
    assert usage.per_batch.isnan().all()
    for t in range(1, 31):
        assert usage.update(batches[t - 1]).item() == 1 - decay
        weights = (1 - decay) * decay ** torch.arange(t - 1.0, -1.0, -1.0)
        torch.testing.assert_close(usage.count, weights @ batches[:t])
        torch.testing.assert_close(usage.weight, torch.tensor(1 - decay**t))
        torch.testing.assert_close(usage.per_batch, weights @ batches[:t] / weights.sum())


def test_the_average_of_a_constant_is_the_constant():
    usage, counts = CodeUsage(3, 0.9), torch.tensor([1.0, 5.0, 0.0])
    for _ in range(3):
        usage.update(counts)
        torch.testing.assert_close(usage.per_batch, counts)


def test_an_empty_batch_changes_nothing():
    usage = CodeUsage(3, 0.9)
    usage.update(torch.tensor([1.0, 2.0, 0.0]))
    before = {name: b.clone() for name, b in usage.state_dict().items()}
    assert usage.update(torch.zeros(3)).item() == 0
    assert list(before) == ["count", "weight"]
    assert all(b.equal(before[name]) for name, b in usage.state_dict().items())


def test_perplexity():
    p = torch.tensor([0.5, 0.25, 0.25])
    torch.testing.assert_close(perplexity(8 * p), torch.exp(-(p * p.log()).sum()))
    assert perplexity(torch.tensor([0.0, 7.0, 0.0])).item() == 1
    for k in (2, 3, 1000):
        assert perplexity(torch.full((k,), 1e-30)).item() == pytest.approx(k)
    many = perplexity(torch.rand(50, 7))
    assert many.shape == (50,) and ((many > 1) & (many < 7)).all()
    assert perplexity(torch.zeros(4)).isnan()


# --- totals --------------------------------------------------------------------------------------


def test_totals_by_hand():
    indices, weights, z = torch.randint(5, (40,)), torch.rand(40), torch.randn(40, 3)
    one_hot = torch.nn.functional.one_hot(indices, 6).double() * weights.unsqueeze(1)
    counts, sums = totals(indices, weights, 6, z)
    torch.testing.assert_close(counts, one_hot.sum(0))
    torch.testing.assert_close(sums, one_hot.t() @ z)
    counts, none = totals(indices, weights, 6)
    torch.testing.assert_close(counts, one_hot.sum(0))
    assert none is None and counts[5] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_without_weight_may_hold_anything(bad):
    indices, weights = torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 2.0, 0.0, 0.0])
    z = torch.tensor([[1.0], [3.0], [bad], [bad]])
    counts, sums = totals(indices, weights, 3, z)
    assert counts.tolist() == [1, 2, 0] and sums.flatten().tolist() == [1, 6, 0]
    drawn = draw_rows(z, weights, 2000)
    assert drawn.flatten().unique().tolist() == [1, 3]


# --- random rows ---------------------------------------------------------------------------------


def test_rows_are_drawn_in_proportion_to_their_weights():
    weights = torch.tensor([0.0, 3.0, 1.0, 0.0, 0.0, 0.5, 5.5, 0.0])
    num = 200_000
    drawn = draw_rows(torch.arange(8.0).unsqueeze(1), weights, num).flatten().long()
    found, p = torch.bincount(drawn, minlength=8) / num, weights / weights.sum()
    assert ((found - p).abs() <= 4 * (p * (1 - p) / num).sqrt()).all()
    assert (found[weights == 0] == 0).all()
    biased = (weights + 0.05) / (weights + 0.05).sum()
    assert ((found - biased).abs() > 4 * (biased * (1 - biased) / num).sqrt()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_unit_interval_are_rows_of_positive_weight(monkeypatch, dtype):
    """Also for sums that round, and weights that are lost in them."""
    below_one = 1 - torch.finfo(dtype).eps / 2
    for _ in range(200):
        weights = torch.rand(6, dtype=dtype) * (torch.rand(6) < 0.5)
        if torch.rand(()) < 0.3:
            weights[3] = 1e30
        z = weights.unsqueeze(1).where(weights.unsqueeze(1) > 0, torch.nan)
        for u in (0.0, below_one):
            with monkeypatch.context() as patch:
                patch.setattr(torch, "rand", lambda *a, u=u, **k: torch.tensor([u], dtype=dtype))
                drawn = draw_rows(z, weights, 1)
            assert (drawn > 0).all() if weights.sum() > 0 else not drawn.any()


def test_nothing_to_draw_from():
    assert draw_rows(torch.randn(3, 2), torch.zeros(3), 4).equal(torch.zeros(4, 2))
    assert draw_rows(torch.zeros(0, 2), torch.zeros(0), 4).equal(torch.zeros(4, 2))


def test_every_position_belongs_to_one_process(monkeypatch):
    """Near the boundaries between processes, where float32 sums round, too."""
    world, rows = 4, torch.tensor([[1.0], [1.0], [1.0], [torch.nan]])
    for _ in range(300):
        weights = [torch.rand(4).float() * torch.tensor([1, 1, 1, 0]) for _ in range(world)]
        ends = [w.cumsum(0)[-1:] for w in weights]
        starts = torch.stack([sum(ends[:r], torch.zeros(1)) for r in range(1, world)])
        near = starts / sum(ends) * (1 + torch.finfo(torch.float32).eps * torch.arange(-3.0, 4))
        uniform, found = near.float().flatten(), []
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *a, u=uniform, **k: u.clone())
            patch.setattr(code_statistics, "_gather", lambda mine, ends=ends: ends)
            for rank in range(world):
                patch.setattr(code_statistics, "_rank", lambda rank=rank: rank)
                found.append(draw_rows(rows, weights[rank], len(uniform)))
        assert torch.cat(found, 1).sum(1).eq(1).all()


def test_one_process_needs_no_others():
    z = torch.randn(3, 2)
    assert gather_rows(z) is z and from_first_process(z) is z


# --- two processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes has found."""
    tmp_path = tmp_path_factory.mktemp("ranks")
    script, root = Path(two_processes.__file__), Path(__file__).parents[1]
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path)], cwd=root)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return [pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in range(2)]


def test_two_processes_are_one_on_the_whole_batch(ranks):
    """Usage, codes, restarts and k-means, over several batches of unequal parts, one part empty."""
    expected = two_processes.train(0, 1)
    first, second = (statistics for statistics, _ in ranks)
    assert list(expected) == list(two_processes.QUANTIZERS)
    for kind, steps in expected.items():
        assert len(steps) == len(first[kind]) == len(second[kind]) == 1 + len(two_processes.SPLITS)
        for step, whole in enumerate(steps):
            for name, value in whole.items():
                of_first, of_second = (f[kind][step][name] for f in (first, second))
                assert of_first.equal(of_second), (kind, step, name)  # bit for bit
                torch.testing.assert_close(of_first, value, rtol=1e-12, atol=1e-14)
    moved = expected["restart"]
    rows = two_processes.batches().reshape(-1, 2)
    for before, after in zip(moved, moved[1:], strict=False):
        codes = after["codebook"][(before["codebook"] != after["codebook"]).any(1)]
        assert len(codes) >= 2, "no restart, nothing tested"
        assert (codes.unsqueeze(1) == rows).all(2).any(1).all()


def test_data_parallel_training_is_training_on_the_whole_batch(ranks):
    """Parameters, codes and gradients; the loss of the whole is the mean of the parts' losses."""
    expected = two_processes.train_model(0, 1)
    first, second = (models for _, models in ranks)
    assert list(expected) == list(two_processes.QUANTIZERS)
    for kind, whole in expected.items():
        assert list(whole) == list(first[kind])
        for name, value in whole.items():
            of_first, of_second = first[kind][name], second[kind][name]
            if name == "losses":
                of_first = (of_first + of_second) / 2
            else:
                assert of_first.equal(of_second), (kind, name)
            torch.testing.assert_close(of_first, value, rtol=1e-10, atol=1e-12)
