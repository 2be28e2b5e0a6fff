"""Resuming is exact, and no kill at any moment costs the last good checkpoint."""

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
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_vi_ext.checkpoint import (
    Minibatches,
    get_rng_state,
    load_checkpoint,
    remove_stale,
    save_checkpoint,
    set_rng_state,
)
from pyro_vi_ext.training import fit

STEPS = 10


@pytest.fixture(autouse=True)
def _clean():
    old = torch.get_default_dtype()
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(old)
    torch.set_num_threads(threads)


def data():
    return torch.linspace(-1.0, 2.0, 10)


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def guide(x):
    mean = pyro.param("mean", torch.tensor(0.1))
    sd = pyro.param("sd", lambda: 0.5 + torch.rand(()), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(mean, sd))
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    pyro.sample("scale", dist.LogNormal(weights[0], weights[1]))


def svi(make_optim, guide=guide, model=model, make_loss=Trace_ELBO):
    def make():
        own = AutoNormal(model) if guide is AutoNormal else guide
        return SVI(model, own, make_optim(), make_loss())

    return make


def adam():
    return pyro.optim.Adam({"lr": 0.05})


class Noisy(Dataset):
    """Data that are random each time they are read, by all generators there are."""

    def __init__(self, generator=None):
        self.generator = generator

    def __len__(self):
        return 10

    def __getitem__(self, i):
        noise = torch.randn(()) + random.random() + np.random.random()
        noise = noise + torch.randn((), generator=self.generator)
        return data()[i] + 0.01 * noise


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


# Each scenario makes fresh objects: (target, args, options of fit).


def with_svi(make):
    return lambda: (make(), (data(),), {})


def with_loader(**options):
    def make():
        if options.get("generator"):
            generator = torch.Generator().manual_seed(5)
            loader = DataLoader(Noisy(generator), **{**options, "generator": generator})
        else:
            loader = DataLoader(Noisy(), **options)
        return SVI(model, guide, adam(), Trace_ELBO()), (loader,), {}

    return make


def single_items():
    batches = TensorDataset(data().reshape(5, 2))
    loader = DataLoader(batches, batch_size=None, shuffle=True)
    return SVI(model, guide, adam(), Trace_ELBO()), (loader,), {}


def exponential():
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
    return pyro.optim.ExponentialLR(options)


def reduce_on_plateau():
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "patience": 1}
    return pyro.optim.ReduceLROnPlateau(options)


def module():
    target = Trace_ELBO(num_particles=2, vectorize_particles=True)(model, AutoNormal(model))
    options = {
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, 50),
    }
    return target, (data(),), options


def module_with_loader():
    target, _, options = module()
    options["scheduler"] = torch.optim.lr_scheduler.ReduceLROnPlateau
    loader = DataLoader(TensorDataset(data(), data()), batch_size=4, shuffle=True)
    target.model = lambda x, y: model(x)
    target.guide = AutoNormal(target.model)
    return target, (loader,), options


def batch_norm_method():
    net = BatchNormed()
    return amortised(net, poutine.scale(net.guide, 1.0))


def batch_norm_closure():
    net = BatchNormed()

    def closed_guide(x):
        net.guide(x)

    return amortised(net, closed_guide)


def running_baseline():
    def score_guide(x):
        p = pyro.param("p", torch.tensor(0.4), constraint=constraints.unit_interval)
        infer = {"baseline": {"use_decaying_avg_baseline": True}}
        pyro.sample("b", dist.Bernoulli(p), infer=infer)

    def score_model(x):
        b = pyro.sample("b", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    return SVI(score_model, score_guide, adam(), TraceGraph_ELBO()), (data(),), {}


def sometimes_without_gradient():
    def branching(x):
        other = pyro.param("other", torch.tensor(0.3))
        mean = pyro.param("mean", torch.tensor(0.1))
        used = torch.rand(()) < 0.5
        pyro.sample("loc", dist.Normal(mean + other if used else mean, 1.0))
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    return SVI(model, branching, adam(), Trace_ELBO()), (data(),), {}


def clipped():
    return pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.95})


SCENARIOS = {
    "function guide": with_svi(svi(adam)),
    "AutoNormal": with_svi(
        svi(
            clipped,
            AutoNormal,
            make_loss=lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
        )
    ),
    "exponential schedule": with_svi(svi(exponential)),
    "plateau schedule": with_svi(svi(reduce_on_plateau)),
    "module": module,
    "module, loader": module_with_loader,
    "loader": with_loader(batch_size=3, shuffle=True),
    "loader, generator": with_loader(batch_size=3, shuffle=True, generator=True),
    "loader, in order": with_loader(batch_size=4, drop_last=True),
    "loader, items": single_items,
    "BatchNorm, method": batch_norm_method,
    "BatchNorm, closure": batch_norm_closure,
    "running baseline": running_baseline,
}


def train(make, **options):
    """Train fresh objects, and return everything that a resumed run must repeat."""
    target, args, more = make()
    result = fit(target, *args, **{"num_steps": STEPS, "progress": False, **more, **options})
    net = target if isinstance(target, torch.nn.Module) else getattr(target, "net", None)
    generators = [a.generator.get_state() for a in args if getattr(a, "generator", None)]
    return {
        "losses": result.losses,
        "store": {n: p.clone() for n, p in pyro.get_param_store().named_parameters()},
        "net": {k: v.clone() for k, v in net.state_dict().items()} if net else None,
        "rng": get_rng_state(),
        "generators": generators,
    }


def assert_same(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def fresh(seed):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)


def interrupt_at(when):
    def callback(step, loss):
        if step == when:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize("when", [1, 4, 9])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_resumed_run_repeats_the_uninterrupted_one(name, when, tmp_path):
    make, path = SCENARIOS[name], tmp_path / "sub" / "run.pt"
    fresh(3)
    expected = train(make, checkpoint=tmp_path / "whole.pt")
    fresh(3)
    with pytest.raises(KeyboardInterrupt):
        train(make, checkpoint=path, checkpoint_every=1000, callback=interrupt_at(when))
    assert load_checkpoint(path)["step"] == when
    fresh(77)  # a new process: other random states, empty store, fresh objects
    found = train(make, checkpoint=path)
    assert_same(found, expected)
    assert_same(load_checkpoint(path), load_checkpoint(tmp_path / "whole.pt"))
    fresh(78)  # nothing left to do: all is restored all the same
    assert_same(train(make, checkpoint=path), expected)


def test_gradients_that_come_and_go_are_remembered(tmp_path):
    """After its first gradient a parameter has one for ever, of zeros in steps that ignore it."""
    fresh(3)
    expected = train(sometimes_without_gradient)
    for when in range(1, 8):
        fresh(3)
        with pytest.raises(KeyboardInterrupt):
            options = {"checkpoint": tmp_path / f"{when}", "callback": interrupt_at(when)}
            train(sometimes_without_gradient, **options)
        fresh(77)
        assert_same(train(sometimes_without_gradient, checkpoint=tmp_path / f"{when}"), expected)


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
    expected = train(SCENARIOS["module"])
    fresh(3)
    train(SCENARIOS["module"], num_steps=6, checkpoint=tmp_path / "a")
    fresh(4)
    assert_same(train(SCENARIOS["module"], checkpoint=tmp_path / "a"), expected)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_keep_the_order(persistent, tmp_path):
    def make():
        options = dict(batch_size=3, shuffle=True, num_workers=1, persistent_workers=persistent)
        loader = DataLoader(data(), **options)
        return SVI(model, guide, adam(), Trace_ELBO()), (loader,), {}

    fresh(3)
    expected = train(make)
    fresh(3)
    with pytest.raises(KeyboardInterrupt):
        train(make, checkpoint=tmp_path / "a", callback=interrupt_at(6))
    fresh(77)
    found = train(make, checkpoint=tmp_path / "a")
    assert_same(found["losses"], expected["losses"])
    assert_same(found["store"], expected["store"])


def test_used_batches_are_skipped_without_loading_their_data(tmp_path):
    read = []

    class Counting(Noisy):
        def __getitem__(self, i):
            read.append(i)
            return data()[i]

    def make():
        loader = DataLoader(Counting(), batch_size=2, shuffle=True)
        return SVI(model, guide, adam(), Trace_ELBO()), (loader,), {}

    with pytest.raises(KeyboardInterrupt):
        train(make, checkpoint=tmp_path / "a", num_steps=5, callback=interrupt_at(4))
    assert len(read) == 8
    train(make, checkpoint=tmp_path / "a", num_steps=5)
    assert sorted(read) == list(range(10))


def test_batches_are_those_of_a_plain_loop():
    for options in ({}, {"generator": torch.Generator()}):
        loader = DataLoader(Noisy(), batch_size=3, shuffle=True, **options)
        fresh(3)
        loader.generator and loader.generator.manual_seed(1)
        expected = [batch for _ in range(3) for batch in loader]
        fresh(3)
        loader.generator and loader.generator.manual_seed(1)
        feed = Minibatches((loader,), {})
        assert_same([feed.take()[0] for _ in expected], expected)


# What does not fit.


def refit(make, match, tmp_path, **options):
    fresh(0)
    with pytest.raises(ValueError, match=match):
        train(make, checkpoint=tmp_path / "a", **options)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    train(SCENARIOS["function guide"], checkpoint=tmp_path / "a", num_steps=2)

    def renamed(x):
        pyro.param("sd", torch.tensor(0.5), constraint=constraints.positive)
        pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
        pyro.sample("loc", dist.Normal(pyro.param("middle", torch.tensor(0.1)), 1.0))
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    def reshaped(x):
        pyro.param("weights", torch.ones(4) / 4, constraint=constraints.simplex)
        guide(x)

    def retyped(x):
        pyro.param("mean", torch.zeros((), dtype=torch.float32))
        guide(x)

    refit(with_svi(svi(adam, renamed)), "parameter 'mean'.*lacks parameter 'middle'", tmp_path)
    refit(
        with_svi(svi(adam, reshaped)), r"'weights' of shape \(3,\).*here it has.*\(4,\)", tmp_path
    )
    refit(with_svi(svi(adam, retyped)), "'mean'.*float64.*here.*float32", tmp_path)
    sgd = with_svi(svi(lambda: pyro.optim.SGD({"lr": 0.1})))
    refit(sgd, "optimizer Adam and scheduler none, here they are SGD", tmp_path)
    refit(with_svi(svi(exponential)), "here they are Adam and ExponentialLR", tmp_path)
    refit(SCENARIOS["module"], "is of an SVI, and the target is a module", tmp_path)
    refit(SCENARIOS["loader"], "There is a DataLoader.*written with none", tmp_path)


def test_a_changed_dataset_or_network_is_refused(tmp_path):
    train(SCENARIOS["loader"], checkpoint=tmp_path / "a", num_steps=2)
    refit(with_loader(batch_size=2, shuffle=True), "order of the epoch cannot be", tmp_path)
    refit(with_loader(batch_size=3, shuffle=True, generator=True), "1 generators", tmp_path)
    fresh(0)
    train(SCENARIOS["BatchNorm, method"], checkpoint=tmp_path / "b", num_steps=2)

    def without_norm():
        net = BatchNormed()
        net.net[1] = torch.nn.BatchNorm1d(4, track_running_stats=False)
        return amortised(net, poutine.scale(net.guide, 1.0))

    fresh(0)
    with pytest.raises(ValueError, match="running_mean"):
        train(without_norm, checkpoint=tmp_path / "b")


def test_resume_false_refuses_before_anything_is_computed(tmp_path):
    train(SCENARIOS["function guide"], checkpoint=tmp_path / "a", num_steps=2)
    before = (tmp_path / "a").read_bytes()
    fresh(0)
    with pytest.raises(FileExistsError, match="resume=True"):
        train(SCENARIOS["function guide"], checkpoint=tmp_path / "a", resume=False)
    assert not pyro.get_param_store() and (tmp_path / "a").read_bytes() == before
    train(SCENARIOS["function guide"], checkpoint=tmp_path / "b", resume=False, num_steps=2)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "a"
    train(SCENARIOS["function guide"], checkpoint=path, num_steps=2)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"hello", whole[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="truncated, damaged"):
            train(SCENARIOS["function guide"], checkpoint=path)
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
        train(SCENARIOS["function guide"], checkpoint=tmp_path)


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


def test_random_states_of_all_generators_return():
    state = get_rng_state()
    first = torch.rand(2), random.gauss(0, 1), np.random.normal()
    set_rng_state(state)
    assert_same((torch.rand(2), random.gauss(0, 1), np.random.normal()), first)


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
