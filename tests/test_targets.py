"""A step of either target is that of a loop by hand, and its state resumes exactly."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import pyro_vi_ext
from pyro_vi_ext.training import fit

from . import resuming
from .fitting import DATA, adam, assert_same, clear, guide, make_svi, model, parameters
from .resuming import (
    check_refused,
    check_resumed,
    data,
    fresh,
    function_guide,
    interrupt_at,
    module,
    svi,
    train,
    with_loader,
    with_svi,
)

pytestmark = pytest.mark.usefixtures("float64")


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


# What cannot be a target.


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


# Resuming.


def exponential():
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
    return pyro.optim.ExponentialLR(options)


def reduce_on_plateau():
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "patience": 1}
    return pyro.optim.ReduceLROnPlateau(options)


def clipped():
    return pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.95})


def running_baseline():
    def score_guide(x):
        p = pyro.param("p", torch.tensor(0.4), constraint=constraints.unit_interval)
        infer = {"baseline": {"use_decaying_avg_baseline": True}}
        pyro.sample("b", dist.Bernoulli(p), infer=infer)

    def score_model(x):
        b = pyro.sample("b", dist.Bernoulli(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    return SVI(score_model, score_guide, resuming.adam(), TraceGraph_ELBO()), (data(),), {}


def sometimes_without_gradient():
    def branching(x):
        other = pyro.param("other", torch.tensor(0.3))
        mean = pyro.param("mean", torch.tensor(0.1))
        used = torch.rand(()) < 0.5
        pyro.sample("loc", dist.Normal(mean + other if used else mean, 1.0))
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    return SVI(resuming.model, branching, resuming.adam(), Trace_ELBO()), (data(),), {}


SCENARIOS = {
    "function guide": function_guide,
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
    "running baseline": running_baseline,
}


@pytest.mark.parametrize("when", [1, 4, 9])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_resumed_run_repeats_the_uninterrupted_one(name, when, tmp_path):
    check_resumed(SCENARIOS[name], when, tmp_path)


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


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    train(SCENARIOS["function guide"], checkpoint=tmp_path / "a", num_steps=2)

    def renamed(x):
        pyro.param("sd", torch.tensor(0.5), constraint=constraints.positive)
        pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
        pyro.sample("loc", dist.Normal(pyro.param("middle", torch.tensor(0.1)), 1.0))
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    def reshaped(x):
        pyro.param("weights", torch.ones(4) / 4, constraint=constraints.simplex)
        resuming.guide(x)

    def retyped(x):
        pyro.param("mean", torch.zeros((), dtype=torch.float32))
        resuming.guide(x)

    check_refused(
        with_svi(svi(resuming.adam, renamed)),
        "parameter 'mean'.*lacks parameter 'middle'",
        tmp_path,
    )
    check_refused(
        with_svi(svi(resuming.adam, reshaped)),
        r"'weights' of shape \(3,\).*here it has.*\(4,\)",
        tmp_path,
    )
    check_refused(with_svi(svi(resuming.adam, retyped)), "'mean'.*float64.*here.*float32", tmp_path)
    sgd = with_svi(svi(lambda: pyro.optim.SGD({"lr": 0.1})))
    check_refused(sgd, "optimizer Adam and scheduler none, here they are SGD", tmp_path)
    check_refused(with_svi(svi(exponential)), "here they are Adam and ExponentialLR", tmp_path)
    check_refused(SCENARIOS["module"], "is of an SVI, and the target is a module", tmp_path)
    check_refused(
        with_loader(batch_size=3, shuffle=True),
        "There is a DataLoader.*written with none",
        tmp_path,
    )


@pytest.mark.parametrize("name", ["TraceREBAR_ELBO", "TraceNVIL_ELBO", "TraceRELAX_ELBO"])
def test_an_optimizer_made_by_fit_trains_what_the_objective_learns(name):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x = torch.tensor([0.8, -1.0, 2.0])
    logits = torch.nn.Parameter(torch.zeros(3))

    def model(x):
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    objective, start = getattr(pyro_vi_ext, name)(), {}

    def adam(parameters):
        start.update({n: p.detach().clone() for n, p in objective.learned.named_parameters()})
        return torch.optim.Adam(parameters, lr=0.01)

    fit(objective(model, guide), x, num_steps=5, optimizer=adam, progress=False)
    moved = [n for n, p in objective.learned.named_parameters() if not torch.equal(p, start[n])]
    assert start and moved
