"""No kill at any moment costs the last good checkpoint, and all state comes back."""

import os
import random
import subprocess
import sys
import textwrap

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_vi_ext.checkpoint import (
    get_rng_state,
    load_checkpoint,
    remove_stale,
    save_checkpoint,
    set_rng_state,
)

from .fitting import assert_same
from .resuming import adam, check_resumed, data, fresh, function_guide, train

pytestmark = pytest.mark.usefixtures("float64")


# The file.


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "a"
    train(function_guide, checkpoint=path, num_steps=2)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"hello", whole[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="truncated, damaged"):
            train(function_guide, checkpoint=path)
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="not a checkpoint of fit"):
        load_checkpoint(path)
    save_checkpoint(path, {"version": 99})
    with pytest.raises(ValueError, match="format 99"):
        load_checkpoint(path)
    torch.save({"format": np.array(1)}, path)  # anything that could run code is not loaded
    with pytest.raises(ValueError, match="another kind of file"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match="is a folder"):
        train(function_guide, checkpoint=tmp_path)


def test_state_that_cannot_be_loaded_safely_is_refused_when_saving(tmp_path):
    save_checkpoint(tmp_path / "a", {"x": (1, [np.float64(2.0)], {"y": None})})
    assert load_checkpoint(tmp_path / "a")["x"] == (1, [2.0], {"y": None})
    with pytest.raises(ValueError, match=r"state\['x'\]\[1\], a set"):
        save_checkpoint(tmp_path / "a", {"x": [1, {2}]})
    assert load_checkpoint(tmp_path / "a")["x"] == (1, [2.0], {"y": None})
    assert os.listdir(tmp_path) == ["a"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a", {"x": 1})

    def full_disk(state, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "a", {"x": 2})
    assert load_checkpoint(tmp_path / "a")["x"] == 1
    assert os.listdir(tmp_path) == ["a"]


def test_temporary_files_of_dead_writers_only_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    keep = [f".a.{os.getppid()}-00000000.tmp", f".a.b.{dead.pid}-00000000.tmp", "a", ".a.tmp"]
    for name in [*keep, f".a.{dead.pid}-00000000.tmp"]:
        (tmp_path / name).write_text("")
    remove_stale(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == sorted(keep)


# Random states, and modules.


def test_random_states_of_all_generators_return():
    state = get_rng_state()
    first = torch.rand(2), random.gauss(0, 1), np.random.normal()
    set_rng_state(state)
    assert_same((torch.rand(2), random.gauss(0, 1), np.random.normal()), first)


class BatchNormed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4))
        self.out = torch.nn.Linear(4, 2)

    def guide(self, x):
        pyro.module("amortised", self)
        out = self.out(self.net(x[:, None]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(out[:, 0], out[:, 1].exp()))


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def amortised(net, guide):
    target = SVI(local_model, guide, adam(), Trace_ELBO())
    target.net = net  # for `train` below
    return target, (data(),), {}


def batch_norm_method():
    net = BatchNormed()
    return amortised(net, poutine.scale(net.guide, 1.0))


def batch_norm_closure():
    net = BatchNormed()

    def closed_guide(x):
        net.guide(x)

    return amortised(net, closed_guide)


SCENARIOS = {"BatchNorm, method": batch_norm_method, "BatchNorm, closure": batch_norm_closure}


@pytest.mark.parametrize("when", [1, 4, 9])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_resumed_run_repeats_the_uninterrupted_one(name, when, tmp_path):
    check_resumed(SCENARIOS[name], when, tmp_path)


def test_a_changed_network_is_refused(tmp_path):
    fresh(0)
    train(SCENARIOS["BatchNorm, method"], checkpoint=tmp_path / "b", num_steps=2)

    def without_norm():
        net = BatchNormed()
        net.net[1] = torch.nn.BatchNorm1d(4, track_running_stats=False)
        return amortised(net, poutine.scale(net.guide, 1.0))

    fresh(0)
    with pytest.raises(ValueError, match="running_mean"):
        train(without_norm, checkpoint=tmp_path / "b")


# Kills.


KILL_SCRIPT = """
import os, random, signal, sys, time
import pyro, pyro.distributions as dist, torch
from pyro.infer import SVI, Trace_ELBO
from pyro_vi_ext import checkpoint as cp
from pyro_vi_ext.training import fit

folder, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random.seed(seed)
STEPS = 80

def train(name, every=1):
    "Fresh objects, as in a new process: nothing was trained before the fork."
    pyro.set_rng_seed(os.getpid() if os.path.exists(name) else 0)
    torch.set_default_dtype(torch.float64)
    net = torch.nn.Linear(300, 300)

    def model():
        with pyro.plate("units", 300):
            z = pyro.sample("z", dist.Normal(0., 1.))
            pyro.sample("x", dist.Normal(z, 1.), obs=torch.ones(300))

    def guide():
        pyro.module("net", net)
        loc = net(torch.randn(300))
        with pyro.plate("units", 300):
            pyro.sample("z", dist.Normal(loc, 1.))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    fit(svi, num_steps=STEPS, checkpoint=name, checkpoint_every=every, progress=False)

def child(run):
    pid = os.fork()
    if pid == 0:
        try:
            run()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

def status(pid):
    return os.waitpid(pid, 0)[1]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def half_written(step):
    save = torch.save
    def broken(state, file):
        if state["step"] < step:
            return save(state, file)
        import io
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        file.flush()
        die()
    torch.save = broken
    train(killed)

def not_renamed(step):
    replace, count = os.replace, [0]
    def broken(source, target):
        count[0] += 1
        if count[0] == step:
            die()
        replace(source, target)
    os.replace = broken
    train(killed)

whole, killed = os.path.join(folder, "whole"), os.path.join(folder, "killed")
assert status(child(lambda: train(whole, 1000))) == 0
expected = cp.load_checkpoint(whole)

last, leftovers = 0, 0
for run in [lambda: half_written(5), lambda: not_renamed(3), *[None] * kills]:
    pid = child(run or (lambda: train(killed)))
    if run is None:
        while not os.path.exists(killed):
            time.sleep(0.01)
        time.sleep(random.uniform(0.01, 0.25))
        os.kill(pid, signal.SIGKILL)
    code = status(pid)
    assert code in (0, signal.SIGKILL), code
    step = cp.load_checkpoint(killed)["step"]
    assert step >= last, (step, last)
    if run is not None:
        assert code == signal.SIGKILL and step == (4 if last == 0 else 6), step
    last = step
    leftovers += len(os.listdir(folder)) - 2
assert leftovers >= 2, "no kill fell into a write"
print("killed at step", last)
assert status(child(lambda: train(killed))) == 0
assert sorted(os.listdir(folder)) == ["killed", "whole"], os.listdir(folder)
found = cp.load_checkpoint(killed)

def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

for key in expected:
    assert same(found[key], expected[key]), key
assert len(found["losses"]) == STEPS
print("the resumed run is the uninterrupted one")
"""


def run_kills(tmp_path, kills, seed):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(KILL_SCRIPT),
        str(tmp_path),
        str(kills),
        str(seed),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the resumed run is the uninterrupted one" in done.stdout


posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")


@posix
def test_kill_at_any_moment_never_costs_the_last_checkpoint(tmp_path):
    run_kills(tmp_path, kills=4, seed=0)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_kill_at_any_moment_many_times(tmp_path, seed):
    run_kills(tmp_path, kills=12, seed=seed)
