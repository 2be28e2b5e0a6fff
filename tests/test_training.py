"""The training loop computes what a loop by hand computes, stops when it should, and says why."""

import builtins
import math
import os
import signal

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_vi_ext.checkpoint import get_rng_state, load_checkpoint, save_checkpoint
from pyro_vi_ext.training import FitResult, _plateaued, fit


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


DATA = torch.linspace(-1.0, 2.0, 10, dtype=torch.float64)


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def guide(x):
    mean = pyro.param("mean", torch.tensor(0.1))
    sd = pyro.param("sd", torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(mean, sd))


def make_svi(model=model, guide=guide, optim=None, loss=None):
    return SVI(model, guide, optim or pyro.optim.Adam({"lr": 0.05}), loss or Trace_ELBO())


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


def parameters():
    return {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}


def assert_same(a, b):
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


def clear(seed=0):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)


# The same numbers as a loop by hand.


def test_svi_is_the_loop_by_hand():
    svi = make_svi()
    losses = [svi.step(DATA) for _ in range(20)]
    expected, rng = parameters(), torch.get_rng_state()
    clear()
    result = fit(make_svi(), DATA, num_steps=20)
    assert result.losses.dtype == torch.float64 and result.losses.tolist() == losses
    assert (result.num_steps, result.stopped) == (20, "num_steps")
    assert_same(parameters(), expected)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("as_callable", [True, False])
def test_a_module_is_the_loop_by_hand(as_callable):
    def make():
        return Trace_ELBO()(model, AutoNormal(model))

    def step_lr(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)

    target = make()
    with torch.random.fork_rng():
        target(DATA)
    optimizer = adam(target.parameters())
    scheduler = step_lr(optimizer)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = target(DATA)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    expected = parameters()
    clear()
    target = make()
    if as_callable:
        options = {"optimizer": adam, "scheduler": step_lr}
    else:
        with torch.random.fork_rng():
            target(DATA)
        optimizer = adam(target.parameters())
        options = {"optimizer": optimizer, "scheduler": step_lr(optimizer)}
    result = fit(target, DATA, num_steps=20, **options)
    assert result.losses.tolist() == losses
    assert_same(parameters(), expected)


def test_the_set_up_pass_leaves_buffers_and_random_states_alone():
    class Target(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(1)
            self.calls = []

        def forward(self, x):
            self.calls.append((torch.rand(()), self.norm.running_mean.clone()))
            return self.norm(x[:, None]).pow(2).sum()

    target = Target()
    fit(target, DATA, num_steps=1, optimizer=adam)
    (first, mean), (second, mean_again) = target.calls
    assert torch.equal(first, second) and torch.equal(mean, mean_again)
    assert target.norm.num_batches_tracked == 1


@pytest.mark.parametrize("with_loss", [False, True])
def test_the_schedule_of_an_svi_is_stepped(with_loss):
    if with_loss:
        options = {"patience": 0, "factor": 0.5, "threshold": 1e9}  # no loss is good enough
        optim = pyro.optim.ReduceLROnPlateau(
            {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-4}, **options}
        )
    else:
        optim = pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-4}, "gamma": 0.5}
        )
    fit(make_svi(optim=optim), DATA, num_steps=4)
    rates = [o.optimizer.param_groups[0]["lr"] for o in optim.optim_objs.values()]
    assert rates == [1e-4 / 2**4] * 2


def test_reduce_on_plateau_of_a_module_gets_the_loss():
    seen = []

    class Spy(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics):
            seen.append(metrics)
            super().step(metrics)

    target = Trace_ELBO()(model, AutoNormal(model))
    result = fit(target, DATA, num_steps=5, optimizer=adam, scheduler=Spy)
    assert seen == result.losses.tolist()


def test_keyword_arguments_and_own_steps():
    def with_keyword(x, scale):
        loc = pyro.sample("loc", dist.Normal(0.0, scale))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    class Doubling(SVI):
        def step(self, *args, **kwargs):
            return 2 * super().step(*args, **kwargs)

    def keyword_guide(x, scale):
        guide(x)

    svi = make_svi(with_keyword, keyword_guide)
    losses = [svi.step(DATA, scale=2.0) for _ in range(3)]
    clear()
    target = Doubling(with_keyword, keyword_guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    result = fit(target, DATA, num_steps=3, scale=2.0)
    assert result.losses.tolist() == [2 * loss for loss in losses]


def test_of_several_losses_the_bound_is_recorded():
    svi = make_svi(loss=ReweightedWakeSleep(num_particles=2))
    losses = [svi.step(DATA) for _ in range(3)]
    clear()
    result = fit(make_svi(loss=ReweightedWakeSleep(num_particles=2)), DATA, num_steps=3)
    assert result.losses.tolist() == [loss[0] for loss in losses]


# Minibatches.


def test_batches_stand_for_the_loader():
    seen = []

    def recording_model(before, x, y, after):
        seen.append((before, x.tolist(), y.tolist(), after))
        guide(None)

    pairs = TensorDataset(torch.arange(5), torch.arange(5) + 10)
    loader = DataLoader(pairs, batch_size=2, drop_last=False)
    fit(make_svi(recording_model, recording_model), 1, loader, 2, num_steps=4)
    expected = [(1, [0, 1], [10, 11], 2), (1, [2, 3], [12, 13], 2), (1, [4], [14], 2)]
    assert seen[::2] == expected + expected[:1]


def test_a_batch_that_is_no_tuple_is_one_argument():
    class Named(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return {"x": DATA[i]}

    shapes = []

    def dict_model(batch):
        shapes.append(batch["x"].shape)
        model(batch["x"])

    def dict_guide(batch):
        guide(None)

    fit(make_svi(dict_model, dict_guide), DataLoader(Named(), batch_size=2), num_steps=2)
    assert shapes == [(2,), (2,)]
    result = fit(make_svi(), DataLoader(DATA, batch_size=5), num_steps=3)
    assert result.num_steps == 3


def test_loaders_that_cannot_be_used():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(DATA)

    loader = DataLoader(DATA, batch_size=5)
    with pytest.raises(NotImplementedError, match="map-style"):
        fit(make_svi(), DataLoader(Stream(), batch_size=2), num_steps=1)
    with pytest.raises(ValueError, match="at most one DataLoader"):
        fit(make_svi(), loader, loader, num_steps=1)
    with pytest.raises(ValueError, match="positional"):
        fit(make_svi(), x=loader, num_steps=1)
    with pytest.raises(ValueError, match="no batches"):
        fit(make_svi(), DataLoader(DATA, batch_size=20, drop_last=True), num_steps=1)


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


# Not finite.


def with_nan(*where):
    x = DATA.clone()
    x[list(where)] = math.nan
    return x


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("kind", ["svi", "module"])
def test_nan_data_name_the_site(kind, validate, tmp_path):
    batches = DataLoader(torch.stack([DATA, DATA, with_nan(1, 2)]), batch_size=None)
    options = {"num_steps": 9, "checkpoint": tmp_path / "a", "checkpoint_every": 1}
    target, before = make_svi(), []
    if kind == "module":
        target, options["optimizer"] = Trace_ELBO()(model, AutoNormal(model)), adam
    options["callback"] = lambda *_: before.append(parameters())
    with pyro.validation_enabled(validate):
        with pytest.raises(ValueError, match=r"step 3 of fit(.|\n)*site 'x' \(2 of 10 entries\)"):
            fit(target, batches, **options)
    assert len(before) == 2
    assert_same(parameters(), before[-1])
    assert load_checkpoint(tmp_path / "a")["step"] == 2


def test_masked_nan_data_are_not_blamed():
    def masked(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=~x.isnan()):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(math.nan))

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError) as raised:
            fit(make_svi(masked), with_nan(0), num_steps=2)
    assert "'y'" in str(raised.value) and "'x'" not in str(raised.value)


def test_a_value_that_is_not_finite_names_its_site():
    def wild(x):
        guide(x)
        b = pyro.sample("b", dist.Bernoulli(0.5).to_event(0), infer={"is_auxiliary": True})
        pyro.sample("loc2", dist.Normal(torch.where(b > 0, torch.log(-b), b), 1.0))

    def model2(x):
        model(x)
        pyro.sample("loc2", dist.Normal(0.0, 1.0))

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="value of site 'loc2' in the guide") as raised:
            fit(make_svi(model2, wild), DATA, num_steps=50)
    assert "'x'" not in str(raised.value)


def test_the_step_that_failed_is_looked_at_with_its_own_draws():
    def rarely(x):
        guide(x)
        u = pyro.sample("u", dist.Uniform(0.0, 1.0))
        pyro.sample("v", dist.Normal(torch.where(u < 0.003, math.nan, u), 1.0))

    def model2(x):
        model(x)
        pyro.sample("u", dist.Uniform(0.0, 1.0))
        pyro.sample("v", dist.Normal(0.0, 1.0))

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="value of site 'v' in the guide"):
            fit(make_svi(model2, rarely), DATA, num_steps=2000)


@pytest.mark.parametrize("kind", ["svi", "module"])
def test_a_parameter_that_is_not_finite_is_named(kind):
    auto = AutoNormal(model)
    auto(DATA)
    with torch.no_grad():
        auto.scales.loc_unconstrained.fill_(math.nan)
    target, options = make_svi(guide=auto), {}
    if kind == "module":
        target, options = Trace_ELBO()(model, auto), {"optimizer": adam}
    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="step 1 of fit.*parameter '.*scales.loc"):
            fit(target, DATA, num_steps=5, **options)


@pytest.mark.parametrize("kind", ["svi", "module"])
def test_a_gradient_that_is_not_finite_names_its_parameter(kind):
    class Root(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.edge = torch.nn.Parameter(torch.tensor(0.0))
            self.good = torch.nn.Parameter(torch.tensor(0.0))

        def forward(self, x):
            pyro.sample("loc", dist.Normal(self.good + self.edge.abs().sqrt(), 1.0))

    root = Root()
    target, options = make_svi(guide=root), {}
    if kind == "module":
        target, options = Trace_ELBO()(model, root), {"optimizer": adam}
    with pytest.raises(ValueError, match="loss is finite, the gradient of.*edge' is not"):
        fit(target, DATA, num_steps=5, **options)
    assert root.edge == 0.0 and root.good == 0.0


def test_large_finite_gradients_are_no_error():
    class Large(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.full((2,), 0.1, dtype=torch.float32))

        def forward(self):
            return (self.p * 3e38).sum()  # the norm of the gradient overflows

    target = Large()
    result = fit(target, num_steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=1e-39))
    assert result.num_steps == 2 and target.p.grad is None


def test_own_steps_cannot_keep_the_parameters_and_the_error_does_not_say_so():
    class Own(SVI):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    svi = Own(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="observed site 'x'") as raised:
            fit(svi, with_nan(1), num_steps=2)
    assert "still those" not in str(raised.value)


def test_errors_of_the_objective_get_the_step_and_others_pass():
    def failing(error):
        def broken(x):
            if pyro.param("mean") < 0.0:
                raise error
            guide(x)

        pyro.param("mean", torch.tensor(0.1))
        return make_svi(guide=broken, optim=pyro.optim.SGD({"lr": 1.0}))

    cause = ValueError("site 'q' has K < 2")
    with pytest.raises(ValueError, match=r"At step \d+ of fit: site 'q' has K < 2") as raised:
        fit(failing(cause), DATA - 10.0, num_steps=50)
    assert str(raised.value.__cause__).startswith("site 'q' has K < 2")
    clear()

    class Special(ValueError):
        pass

    with pytest.raises(Special):
        fit(failing(Special("mine")), DATA - 10.0, num_steps=50)


# Options.


def function_target():
    return Trace_ELBO()(model, guide)


def test_options_that_do_not_go_together():
    target = Trace_ELBO()(model, AutoNormal(model))
    with pytest.raises(ValueError, match="leave out optimizer="):
        fit(make_svi(), DATA, num_steps=1, optimizer=adam)
    with pytest.raises(ValueError, match="pyro.optim.ExponentialLR"):
        fit(make_svi(), DATA, num_steps=1, scheduler=torch.optim.lr_scheduler.LinearLR)
    with pytest.raises(ValueError, match="needs optimizer=.*NoneType"):
        fit(target, DATA, num_steps=1)
    with pytest.raises(ValueError, match="torch.optim.Optimizer"):
        fit(target, DATA, num_steps=1, optimizer=pyro.optim.Adam({"lr": 0.1}))
    with pytest.raises(ValueError, match="made a list"):
        fit(target, DATA, num_steps=1, optimizer=list)
    with pytest.raises(ValueError, match="got function"):
        fit(model, DATA, num_steps=1)
    with pytest.raises(ValueError, match="no parameters to train"):
        fit(function_target(), DATA, num_steps=1, optimizer=adam)
    target(DATA)
    with pytest.raises(NotImplementedError, match="LBFGS"):
        fit(target, DATA, num_steps=1, optimizer=torch.optim.LBFGS(target.parameters()))
    other = torch.optim.lr_scheduler.ConstantLR(adam(target.parameters()))
    with pytest.raises(ValueError, match="another optimizer"):
        fit(target, DATA, num_steps=1, optimizer=adam, scheduler=other)


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


def test_an_optimizer_that_misses_lazy_parameters_is_refused():
    target = Trace_ELBO()(model, AutoNormal(model))
    extra = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match="first call created parameters.*locs.loc.*callable"):
        fit(target, DATA, num_steps=1, optimizer=adam([extra]))
    target = Trace_ELBO()(model, AutoNormal(model))
    target(DATA)
    some = [p for name, p in target.named_parameters() if "locs" in name]
    assert fit(target, DATA, num_steps=1, optimizer=adam(some)).num_steps == 1  # frozen on purpose


def test_what_a_module_must_return():
    class Wrong(torch.nn.Linear):
        def forward(self, x, kind):
            out = super().forward(x)
            return {"vector": out.expand(2), "float": 1.0, "detached": out.sum().detach()}[kind]

    for kind, found in [
        ("vector", r"shape \(2,\)"),
        ("float", "got float"),
        ("detached", "requires_grad=False"),
    ]:
        with pytest.raises(ValueError, match=f"scalar loss.*{found}"):
            fit(Wrong(1, 1), torch.ones(1), kind, num_steps=1, optimizer=adam)


# The bar, and the result.


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
