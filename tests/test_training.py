"""Training stops when it should, keeps what it has when interrupted, and says what it does."""

import builtins
import os
import signal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_vi_ext import CompiledSVI
from pyro_vi_ext.checkpoint import get_rng_state, load_checkpoint, save_checkpoint
from pyro_vi_ext.training import FitResult, _plateaued, fit

from .fitting import DATA, assert_same, clear, make_svi, model, parameters
from .resuming import (
    STEPS,
    fresh,
    function_guide,
    interrupt_at,
    module,
    train,
    with_loader,
)

pytestmark = pytest.mark.usefixtures("float64")


# Stopping.


def test_plateau_rule():
    torch.manual_seed(0)
    noise = torch.randn(4000)
    slow = torch.zeros(4000)
    for t in range(1, 4000):
        slow[t] = 0.95 * slow[t - 1] + noise[t]
    falling = torch.linspace(10.0, 0.0, 400)
    assert not _plateaued(falling.tolist(), 100, 2)
    assert not _plateaued((falling + noise[:400]).tolist(), 100, 2)
    flat = [1.0] * 400
    assert _plateaued(flat, 100, 3) and not _plateaued(flat, 100, 4)
    assert not _plateaued(flat[:399], 100, 2)
    assert _plateaued([9.0] * 100 + flat[:200], 100, 1)
    assert not _plateaued([9.0] * 100 + flat[:200], 100, 2)
    # By hand: window 4, two batches of two; means 3 and 1, noise 2 sqrt((2 + 2) / 2).
    assert _plateaued([4.0, 4.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0], 4, 1)
    assert not _plateaued([5.9, 5.9, 3.9, 3.9, 2.0, 2.0, 0.0, 0.0], 4, 1)
    # Drift that a test for independent losses would take for an improvement is noise here.
    windows = slow.reshape(-1, 400)
    stops = [_plateaued(w.tolist(), 200, 1) for w in windows]
    assert sum(stops) >= 8


def test_training_stops_on_a_plateau_and_stays_stopped(tmp_path):
    def run(**options):
        return fit(make_svi(), DATA, num_steps=2000, plateau_window=50, **options)

    result = run(checkpoint=tmp_path / "a")
    assert result.stopped == "plateau" and result.num_steps % 50 == 0
    assert 150 <= result.num_steps < 2000
    clear(7)
    again = run(checkpoint=tmp_path / "a")
    assert torch.equal(again.losses, result.losses) and again.stopped == "plateau"
    assert run(patience=4, checkpoint=tmp_path / "a").num_steps > result.num_steps


def test_the_callback_sees_each_step_and_may_stop():
    seen = []

    def callback(step, loss):
        seen.append((step, loss))
        return step == 4

    result = fit(make_svi(), DATA, num_steps=10, callback=callback)
    assert result.stopped == "callback" and result.num_steps == 4
    assert seen == list(zip(range(1, 5), result.losses.tolist(), strict=True))
    assert fit(make_svi(), DATA, num_steps=3, callback=lambda *_: 1).stopped == "num_steps"


# Interrupts.


@pytest.fixture
def keyboard():
    """SIGINT as in a terminal: it is ignored in a process started in the background."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def test_an_interrupt_waits_for_the_end_of_the_step(tmp_path, keyboard):
    steps = []

    def interrupted_model(x):
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        model(x)

    with pytest.raises(KeyboardInterrupt):
        fit(
            make_svi(interrupted_model),
            DATA,
            num_steps=10,
            callback=lambda step, loss: steps.append(step),
            checkpoint=tmp_path / "a",
            checkpoint_every=10,
        )
    assert steps == [1, 2, 3] and load_checkpoint(tmp_path / "a")["step"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def impatient(step, loss):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("not reached")

    with pytest.raises(KeyboardInterrupt):
        fit(make_svi(), DATA, num_steps=10, callback=impatient, checkpoint=tmp_path / "a")


def test_an_interrupt_in_the_last_write_is_not_lost(tmp_path, keyboard, monkeypatch):
    def save_and_interrupt(path, state):
        save_checkpoint(path, state)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("pyro_vi_ext.training.save_checkpoint", save_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(make_svi(), DATA, num_steps=2, checkpoint=tmp_path / "a", checkpoint_every=2)
    assert load_checkpoint(tmp_path / "a")["step"] == 2


# Checkpoints.


SCENARIOS = {
    "function guide": function_guide,
    "module": module,
    "loader": with_loader(batch_size=3, shuffle=True),
    "loader, generator": with_loader(batch_size=3, shuffle=True, generator=True),
}


@pytest.mark.parametrize("name", ["function guide", "module", "loader, generator"])
def test_checkpoints_change_nothing(name, tmp_path):
    fresh(3)
    expected = train(SCENARIOS[name])
    fresh(3)
    found = train(SCENARIOS[name], checkpoint=tmp_path / "run.pt", checkpoint_every=1)
    assert_same(found, expected)


def test_interrupted_twice_in_the_same_process_with_the_same_objects(tmp_path):
    fresh(3)
    expected = train(SCENARIOS["loader"])
    fresh(3)
    target, args, _ = SCENARIOS["loader"]()
    for when in (2, 9):
        with pytest.raises(KeyboardInterrupt):
            fit(
                target,
                *args,
                num_steps=STEPS,
                checkpoint=tmp_path / "a",
                callback=interrupt_at(when),
            )
        torch.randn(3)
    result = fit(target, *args, num_steps=STEPS, checkpoint=tmp_path / "a")
    assert_same(result.losses, expected["losses"])
    assert_same(dict(pyro.get_param_store().named_parameters()), expected["store"])


def test_more_steps_continue_a_finished_run(tmp_path):
    fresh(3)
    expected = train(module)
    fresh(3)
    train(module, num_steps=6, checkpoint=tmp_path / "a")
    fresh(4)
    assert_same(train(module, checkpoint=tmp_path / "a"), expected)


def test_resume_false_refuses_before_anything_is_computed(tmp_path):
    train(function_guide, checkpoint=tmp_path / "a", num_steps=2)
    before = (tmp_path / "a").read_bytes()
    fresh(0)
    with pytest.raises(FileExistsError, match="resume=True"):
        train(function_guide, checkpoint=tmp_path / "a", resume=False)
    assert not pyro.get_param_store() and (tmp_path / "a").read_bytes() == before
    train(function_guide, checkpoint=tmp_path / "b", resume=False, num_steps=2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_resumed_run_on_cuda_repeats_the_uninterrupted_one(tmp_path):
    x = DATA.cuda()

    def run(**options):
        def cuda_guide(x):
            mean = pyro.param("mean", lambda: torch.randn((), device="cuda"))
            pyro.sample("loc", dist.Normal(mean, torch.ones((), device="cuda")))

        result = fit(make_svi(guide=cuda_guide), x, num_steps=10, **options)
        return result.losses, parameters(), get_rng_state()["cuda"]

    def stop(step, loss):
        if step == 4:
            raise KeyboardInterrupt

    expected = run()
    clear()
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path / "a", callback=stop)
    clear(9)
    found = run(checkpoint=tmp_path / "a")
    assert torch.equal(found[0], expected[0])
    assert_same(found[1], expected[1])
    assert all(map(torch.equal, found[2], expected[2]))


# Options, the bar, and the result.


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 0},
        {"num_steps": 2.0},
        {"num_steps": True},
        {"patience": 0},
        {"plateau_window": 3},
        {"checkpoint": "unused", "checkpoint_every": 0},
        {"checkpoint_every": 5},
    ],
)
def test_numbers_that_make_no_sense(options):
    with pytest.raises(ValueError, match="|".join(options)):
        fit(make_svi(), DATA, **{"num_steps": 1, **options})


def test_the_bar(capsys, monkeypatch):
    fit(make_svi(), DATA, num_steps=5)
    fit(make_svi(), DATA, num_steps=5, progress=False)
    assert capsys.readouterr().err == ""
    result = fit(make_svi(), DATA, num_steps=5, progress=True)
    shown = capsys.readouterr().err
    assert "5/5" in shown and "bound=-" in shown
    weights = 0.98 ** torch.arange(4.0, -1.0, -1.0)
    bound = -(weights * result.losses).sum() / weights.sum()
    assert f"bound={bound:.5g}" in shown

    real = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    assert fit(make_svi(), DATA, num_steps=1).num_steps == 1
    with pytest.raises(ImportError, match=r"pip install pyro_vi_ext\[progress\]"):
        fit(make_svi(), DATA, num_steps=1, progress=True)


def test_the_result_describes_itself():
    result = FitResult(torch.tensor([3.0, 2.0, 1.0]), 3, "plateau")
    text = "FitResult(num_steps=3, stopped='plateau', first loss=3, mean of last 1=1)"
    assert repr(result) == text
    assert "num_steps=0" in repr(FitResult(torch.zeros(0), 0, "num_steps"))


# --- compiled steps ------------------------------------------------------------------------------


def compiled_svi(kind=CompiledSVI):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 0.5), obs=x)

    optim = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.99})
    options = {"backend": "eager"} if kind is CompiledSVI else {}
    return kind(model, AutoNormal(model), optim, Trace_ELBO(), **options)


COMPILED_DATA = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)


def leaves():
    return {n: leaf.detach().clone() for n, leaf in pyro.get_param_store().named_parameters()}


@pytest.mark.parametrize("options", [{}, {"plateau_window": 20}], ids=["plain", "plateau"])
def test_compiled_steps_give_the_same_fit(options, float64):
    plain = fit(compiled_svi(SVI), COMPILED_DATA, num_steps=90, **options)
    expected = leaves()
    result = fit(compiled_svi(), COMPILED_DATA, num_steps=90, **options)
    assert (result.num_steps, result.stopped) == (plain.num_steps, plain.stopped)
    torch.testing.assert_close(result.losses, plain.losses, rtol=1e-10, atol=0)
    for name, value in leaves().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=0)


def test_compiled_steps_resume_bit_for_bit(tmp_path, float64):
    whole = fit(
        compiled_svi(), COMPILED_DATA, num_steps=60, checkpoint_every=20, checkpoint=tmp_path / "a"
    )
    expected = leaves()
    fit(compiled_svi(), COMPILED_DATA, num_steps=27, checkpoint_every=20, checkpoint=tmp_path / "b")
    result = fit(
        compiled_svi(), COMPILED_DATA, num_steps=60, checkpoint_every=20, checkpoint=tmp_path / "b"
    )
    assert torch.equal(result.losses, whole.losses)
    assert all(torch.equal(value, expected[name]) for name, value in leaves().items())


def test_compiled_steps_with_a_callback_and_an_error(float64):
    seen = []
    fit(compiled_svi(), COMPILED_DATA, num_steps=5, callback=lambda step, loss: seen.append(step))
    assert seen == [1, 2, 3, 4, 5]
    svi = compiled_svi()
    fit(svi, COMPILED_DATA, num_steps=5)
    before = leaves()
    bad = COMPILED_DATA.clone()
    bad[1] = float("nan")
    with pytest.raises(ValueError, match="At step 1 of fit the loss is nan.*observed site 'x'"):
        fit(svi, bad, num_steps=5)
    assert all(torch.equal(value, before[name]) for name, value in leaves().items())
