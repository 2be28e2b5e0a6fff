"""Compiled steps beside plain ones: the same losses, parameters, buffers and optimizer states."""

import logging
import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import (
    SVI,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints

import pyro_vi_ext.compiled.backends
from pyro_vi_ext import (
    VQELBO,
    CannotCompile,
    CompiledSVI,
    ImportanceWeightedELBO,
    SemiImplicitELBO,
    TraceRELAX_ELBO,
    TraceSTL_ELBO,
)
from pyro_vi_ext.guides import AutoSemiImplicit, CodePrior, VectorQuantized, VectorQuantizer

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.3, -1.2, 0.8, 1.9, -0.4, 0.1], dtype=torch.float64)
Eager = partial(CompiledSVI, backend="eager")


# --- pairs -------------------------------------------------------------------------------------


def regression(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def with_params(x):
    loc = pyro.param("q_loc", lambda: torch.randn(()))
    scale = pyro.param("q_scale", lambda: torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(loc, scale))
    pyro.sample("scale", dist.LogNormal(0.0, scale))


def amortised(batch_norm=False, subsample_size=None):
    net = nn.Linear(2, 2, bias=not batch_norm)
    norm = nn.BatchNorm1d(2) if batch_norm else nn.Identity()

    def model(x):
        with pyro.plate("data", len(x), subsample_size=subsample_size) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])

    def guide(x):
        pyro.module("net", net)
        pyro.module("norm", norm)
        with pyro.plate("data", len(x), subsample_size=subsample_size) as index:
            features = torch.stack([x[index], x[index].square()], -1)
            mean, log_scale = norm(net(features)).unbind(-1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()))

    return model, guide


class Bayesian(PyroModule):
    def __init__(self):
        super().__init__()
        self.noise = PyroParam(torch.tensor(0.5), constraints.positive)
        self.linear = PyroModule[nn.Linear](1, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))

    def forward(self, x):
        mean = self.linear(x.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, self.noise), obs=x)


def mixture(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    locs = torch.tensor([-1.0, 0.0, 1.0])
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[k], 0.5), obs=x)


def coins(x):
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2 * b - 1, 0.8), obs=x)


def coins_guide(x):
    logits = pyro.param("logits", lambda: torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("b", dist.Bernoulli(logits=logits))


@config_enumerate
def coins_enumerated(x):
    logits = pyro.param("logits", lambda: torch.tensor([0.0, 800.0, 0.1, 0.2, -0.3, 0.4]))
    with pyro.plate("data", len(x)):
        pyro.sample("b", dist.Bernoulli(logits=logits))  # impossible outcomes


def quantised():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 2, ema_decay=0.9)
    net = nn.Linear(1, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", CodePrior(quantizer))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", VectorQuantized(net(x.unsqueeze(-1)), quantizer))

    model.quantizer = quantizer
    return model, guide


def pair(model, guide_class, objective, *args, **kwargs):
    return lambda: (model, guide_class(model), objective(*args, **kwargs))


CASES = {
    "param": lambda: (regression, with_params, Trace_ELBO()),
    "module": lambda: (*amortised(), Trace_ELBO()),
    "batch-norm": lambda: (*amortised(batch_norm=True), Trace_ELBO()),
    "subsampling": lambda: (*amortised(subsample_size=3), Trace_ELBO(num_particles=2)),
    "AutoNormal": pair(regression, AutoNormal, Trace_ELBO, 4, vectorize_particles=True),
    "AutoMultivariateNormal": pair(regression, AutoMultivariateNormal, TraceMeanField_ELBO),
    "AutoDelta": pair(regression, AutoDelta, Trace_ELBO),
    "Bayesian": lambda: (m := Bayesian(), AutoNormal(m), Trace_ELBO()),
    "enumerated": lambda: (
        mixture,
        AutoNormal(poutine.block(mixture, hide=["k"])),
        TraceEnum_ELBO(max_plate_nesting=1),
    ),
    "impossible": lambda: (coins, coins_enumerated, TraceEnum_ELBO(max_plate_nesting=1)),
    "score": lambda: (coins, coins_guide, Trace_ELBO(num_particles=2)),
    "graph": lambda: (coins, coins_guide, TraceGraph_ELBO()),
    "Renyi": lambda: (
        regression,
        with_params,
        RenyiELBO(0.5, num_particles=3, vectorize_particles=True),
    ),
    "wake-sleep": lambda: (coins, coins_guide, ReweightedWakeSleep(num_particles=3)),
    "dreg": lambda: (*amortised(), ImportanceWeightedELBO(5, gradient="dreg")),
    "RELAX": lambda: (coins, coins_guide, TraceRELAX_ELBO(hidden_dims=(5,))),
    "quantised": lambda: (*quantised(), VQELBO()),
    "semi-implicit": lambda: (
        regression,
        AutoSemiImplicit(regression, hidden_dims=(5,)),
        SemiImplicitELBO(3, num_mixing_particles=1000),
    ),
}

ADAM = partial(pyro.optim.Adam, {"lr": 0.03})


def start(kind, make, make_optimizer=ADAM, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    model, guide, objective = make()
    return kind(model, guide, make_optimizer(), objective, **options)


def left_behind(svi):
    """All that steps change."""
    state = {n: leaf.detach().clone() for n, leaf in pyro.get_param_store().named_parameters()}
    for module in (svi.model, svi.guide, getattr(svi.model, "quantizer", None)):
        if isinstance(module, nn.Module):
            state |= {n: b.clone() for n, b in module.state_dict().items()}
    for name, kept in svi.optim.get_state().items():
        for k, entry in kept.get("state", {}).items():
            for key, value in entry.items():
                state[f"{name}.{k}.{key}"] = torch.as_tensor(value).detach().clone()
        for group in kept.get("param_groups", ()):
            state[f"{name}.lr"] = torch.tensor(group.get("lr", 0.0))
    return state, torch.get_rng_state()


def assert_same(svi, plain, losses, plain_losses, rtol=1e-10):
    (ours, rng), (theirs, plain_rng) = svi, plain
    torch.testing.assert_close(
        torch.tensor(losses), torch.tensor(plain_losses), rtol=rtol, atol=rtol
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=rtol, msg=name)
    assert torch.equal(rng, plain_rng)


def both(make, make_optimizer=ADAM, num_steps=8, kind=Eager, rtol=1e-10, **options):
    x = X.to(torch.get_default_dtype())
    plain = start(SVI, make, make_optimizer)
    plain_losses = [plain.step(x) for _ in range(num_steps)]
    expected = left_behind(plain)
    svi = start(kind, make, make_optimizer, **options)
    losses = [svi.step(x) for _ in range(num_steps // 2)]
    losses += svi.run(num_steps - num_steps // 2, x).tolist()
    if isinstance(plain_losses[0], tuple):
        losses = [tuple(loss) for loss in losses]
    assert_same(left_behind(svi), expected, losses, plain_losses, rtol)
    assert len(svi.programs) == 1 and svi.refused is None
    return svi


# --- the same as plain steps -------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_svi(case):
    both(CASES[case])


OPTIMIZERS = {
    "AdamW": partial(pyro.optim.AdamW, {"lr": 0.03, "weight_decay": 0.1}),
    "ClippedAdam": partial(pyro.optim.ClippedAdam, {"lr": 0.03, "lrd": 0.98, "clip_norm": 0.5}),
    "SGD": partial(pyro.optim.SGD, {"lr": 0.003, "momentum": 0.9, "nesterov": True}),
    "clipped": partial(pyro.optim.Adam, {"lr": 0.03}, {"clip_norm": 0.4}),
    "two kinds": partial(
        pyro.optim.Adam, lambda name: {"lr": 0.02, "betas": (0.8 if "loc" in name else 0.9, 0.99)}
    ),
    "by name": partial(pyro.optim.Adam, lambda name: {"lr": 0.05 if "loc" in name else 0.01}),
}
OUTSIDE = {
    "RMSprop": partial(pyro.optim.RMSprop, {"lr": 0.01}),
    "AdagradRMSProp": partial(pyro.optim.AdagradRMSProp, {"eta": 0.1}),
    "amsgrad": partial(pyro.optim.Adam, {"lr": 0.03, "amsgrad": True}),
}


@pytest.mark.parametrize("name", [*OPTIMIZERS, *OUTSIDE])
def test_optimizers(name):
    svi = both(CASES["param"], {**OPTIMIZERS, **OUTSIDE}[name])
    assert (svi.programs[0].optimizer is None) == (name in OUTSIDE)


def test_torch_optimizer():
    def make(kind, optimizer):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        model, guide = amortised()
        module = Trace_ELBO()(model, guide)
        with poutine.trace(param_only=True) as capture:
            module(X)
        parameters = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
        optimizer = optimizer(parameters)
        torch.manual_seed(0)
        return kind(model, guide, optimizer, Trace_ELBO()), parameters

    svi, parameters = make(Eager, partial(torch.optim.Adam, lr=0.02))
    losses = [svi.step(X) for _ in range(6)]
    assert svi.programs[0].optimizer is not None
    plain, others = make(SVI_of_torch, partial(torch.optim.Adam, lr=0.02))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor([plain() for _ in range(6)]))
    for a, b in zip(parameters, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def SVI_of_torch(model, guide, optimizer, objective):
    def step():
        optimizer.zero_grad()
        loss = objective.differentiable_loss(model, guide, X)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def test_torch_optimizer_without_a_parameter():
    def extra(x):
        pyro.param("new", torch.tensor(1.0))
        with_params(x)
        pyro.factor("use", pyro.param("new").square(), has_rsample=True)

    other = nn.Parameter(torch.zeros(()))
    svi = Eager(regression, extra, torch.optim.Adam([other]), Trace_ELBO())
    with pytest.raises(ValueError, match="does not hold parameter"):
        svi.step(X)


@pytest.mark.parametrize("kind", ["ExponentialLR", "StepLR"])
def test_schedules_need_no_new_graph(kind):
    arguments = {"ExponentialLR": {"gamma": 0.9}, "StepLR": {"step_size": 2, "gamma": 0.5}}[kind]

    def make():
        scheduler = getattr(pyro.optim, kind)
        return scheduler({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, **arguments})

    found = []
    for which in (SVI, Eager):
        svi = start(which, CASES["param"], make)
        losses = []
        for _ in range(8):
            losses.append(svi.step(X))
            svi.optim.step()
        values = [value.item() for value in pyro.get_param_store().values()]
        found.append([*losses, *values])
    assert found[0] == found[1]
    assert svi._programs.num_traces == 1


def test_a_plain_svi_may_go_on_with_the_optimizer():
    plain = start(SVI, CASES["AutoNormal"])
    expected = [plain.step(X) for _ in range(9)]
    svi = start(Eager, CASES["AutoNormal"])
    other = SVI(svi.model, svi.guide, svi.optim, Trace_ELBO(4, vectorize_particles=True))
    other.step.__self__.loss.__self__.max_plate_nesting = 2  # known, so that nothing is drawn
    losses = []
    for k in range(9):
        losses.append((other if k in (3, 4, 7) else svi).step(X))
    assert losses == expected


def test_prepare_takes_no_step_and_draws_nothing():
    found = []
    for kind in (SVI, Eager):
        svi = start(kind, CASES["param"])
        svi.guide(X)  # makes the parameters
        if kind is Eager:
            state, before = torch.get_rng_state(), left_behind(svi)[0]
            svi.prepare(X)
            assert torch.equal(torch.get_rng_state(), state)
            after = left_behind(svi)[0]
            assert all(torch.equal(after[name], value) for name, value in before.items())
            assert svi.programs[0].num_steps == 0
        found.append(([svi.step(X) for _ in range(5)], left_behind(svi)[0]))
    assert found[0] == found[1]


def test_what_made_parameters_is_not_drawn_again():
    noise = torch.zeros(3)

    def guide(x):
        loc = pyro.param("q_loc", lambda: torch.randn(3))
        noise.copy_(pyro.sample("z", dist.Normal(loc, 1.0).to_event(1)) - loc)

    def model(x):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    svi = start(Eager, lambda: (model, guide, Trace_ELBO()))
    svi.prepare(X)
    first = pyro.param("q_loc").detach().clone()
    svi.step(X)
    assert not torch.isclose(noise, first).any()


def test_evaluate_loss():
    svi = start(Eager, CASES["param"])
    svi.run(3, X)
    torch.manual_seed(1)
    loss = svi.evaluate_loss(X)
    torch.manual_seed(1)
    assert loss == Trace_ELBO().loss(regression, with_params, X)


# --- what is taken for granted, and changes ----------------------------------------------------


def replace_parameter(svi):
    pyro.get_param_store()["q_loc"] = torch.tensor(-0.7)


def restore_store(svi):
    store = pyro.get_param_store()
    store.set_state(store.get_state())


def freeze(svi):
    pyro.get_param_store()._params["q_loc"].requires_grad_(False)


def weight_decay(svi):
    for optimizer in svi.optim.optim_objs.values():
        optimizer.param_groups[0]["weight_decay"] = 0.5


def reload_optimizer(svi):
    for optimizer in svi.optim.optim_objs.values():
        optimizer.load_state_dict(optimizer.state_dict())


def lower_rate(svi):
    for optimizer in svi.optim.optim_objs.values():
        optimizer.param_groups[0]["lr"] *= 0.1


def shrink_data(svi):
    svi.data = X[:4]


def stride_data(svi):
    svi.data = X.repeat_interleave(2)[::2]


CHANGES = {
    replace_parameter: 2,
    restore_store: 1,  # with the same tensors
    freeze: 2,
    weight_decay: 2,
    reload_optimizer: 2,
    lower_rate: 1,
    shrink_data: 2,
    stride_data: 2,
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_between_steps_are_followed(change):
    found = []
    for kind in (SVI, Eager):
        svi = start(kind, CASES["param"])
        svi.data = X
        losses = [svi.step(svi.data) for _ in range(4)]
        change(svi)
        losses += [svi.step(svi.data) for _ in range(4)]
        found.append((left_behind(svi), losses))
    assert_same(*found[1][:1], found[0][0], found[1][1], found[0][1])
    assert svi._programs.num_traces == CHANGES[change]


def test_training_mode_is_part_of_the_key():
    found = []
    for kind in (SVI, Eager):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        model, guide = amortised(batch_norm=True)
        svi = kind(model, guide, ADAM(), Trace_ELBO())
        norm = next(c.cell_contents for c in guide.__closure__ if "Norm" in str(c.cell_contents))
        losses = []
        for train in (True, False, True, False):
            norm.train(train)
            losses += [svi.step(X), svi.step(X)]
        found.append((losses, norm.running_mean.tolist(), norm.num_batches_tracked.item()))
    assert found[0] == found[1]
    assert svi._programs.num_traces == 2


def test_data_of_a_closure_are_read_in_every_step():
    data = X.clone()

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=data)

    found = []
    for kind in (SVI, Eager):
        data.copy_(X)
        svi = start(kind, lambda: (model, AutoNormal(model), Trace_ELBO()))
        losses = [svi.step() for _ in range(3)]
        data.add_(1.0)
        found.append(losses + [svi.step() for _ in range(3)])
    assert found[0] == found[1]


def test_a_tensor_of_a_closure_that_the_model_writes_to():
    found = []
    for kind in (SVI, Eager):
        count = torch.zeros(())

        def model(x, count=count):
            count.add_(1.0)
            pyro.sample("loc", dist.Normal(count, 1.0))

        svi = start(kind, lambda: (model, AutoNormal(model), Trace_ELBO()))
        losses = [svi.step(X) for _ in range(20)]
        found.append((losses, count.item(), [v.item() for v in pyro.get_param_store().values()]))
    assert found[0] == found[1]


def test_assigned_parts_are_used():
    found = []
    for kind in (SVI, Eager):
        svi = start(kind, CASES["param"])
        losses = [svi.step(X) for _ in range(3)]
        svi.optim = pyro.optim.SGD({"lr": 0.0})
        losses += [svi.step(X) for _ in range(3)]
        found.append((losses, [v.item() for v in pyro.get_param_store().values()]))
    assert found[0] == found[1]


def test_gradients_switched_off_are_refused():
    svi = start(Eager, CASES["param"])
    svi.step(X)
    with torch.no_grad(), pytest.raises(CannotCompile, match="no_grad"):
        svi.step(X)


def test_unfreezing_a_module_is_followed():
    found = []
    for kind in (SVI, Eager):
        model, guide = amortised()
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        net = next(c.cell_contents for c in guide.__closure__ if hasattr(c.cell_contents, "weight"))
        nn.init.ones_(net.weight)
        nn.init.zeros_(net.bias)
        net.weight.requires_grad_(False)
        svi = kind(model, guide, ADAM(), Trace_ELBO())
        losses = [svi.step(X) for _ in range(4)]
        net.weight.requires_grad_(True)
        losses += [svi.step(X) for _ in range(4)]
        found.append((losses, net.weight.tolist()))
    assert found[0] == found[1] and found[0][1] != [[1.0] * 2] * 2


def test_one_tensor_given_twice_and_then_two():
    def model(x, y):
        loc = pyro.sample("loc", dist.Normal(x.mean(), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    found = []
    for kind in (SVI, Eager):
        svi = start(kind, lambda: (model, AutoNormal(model), Trace_ELBO()))
        losses = [svi.step(X, X) for _ in range(3)]
        found.append(losses + [svi.step(X, X + 2.0) for _ in range(3)])
    assert found[0] == found[1]


def test_a_loss_that_is_infinite_by_design():
    class Infinite(Trace_ELBO):
        def loss_and_grads(self, *args, **kwargs):
            super().loss_and_grads(*args, **kwargs)
            return float("inf")

    found = []
    for kind in (SVI, Eager):
        svi = start(kind, lambda: (regression, with_params, Infinite()))
        losses = [svi.step(X) for _ in range(4)]
        found.append((losses, [v.item() for v in pyro.get_param_store().values()]))
    assert found[0] == found[1] and losses[-1] == float("inf")


def test_too_many_kinds_of_arguments(caplog):
    svi = start(Eager, CASES["param"], max_traces=3)
    with caplog.at_level(logging.INFO, logger="pyro_vi_ext.compiled"):
        for size in (6, 5, 4, 3):
            svi.step(X[:size])
    assert sum("arguments of another kind" in r.message for r in caplog.records) == 2
    assert [r.levelname for r in caplog.records if r.message.startswith("traced")] == [
        "INFO",
        "WARNING",
        "WARNING",
    ]
    with pytest.raises(CannotCompile, match="traced 3 times.*drop_last"):
        svi.step(X[:2])


def annealed(kind, steps, every):
    """Losses of steps between which a global number changes."""
    global STRENGTH
    STRENGTH = 1.0

    def model(x):
        with poutine.scale(scale=STRENGTH):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0).expand([len(x)]).to_event(1), obs=x)

    svi, losses = start(kind, lambda: (model, AutoNormal(model), Trace_ELBO())), []
    for step in range(steps):
        STRENGTH = 1.0 + step // every
        losses.append(svi.step(X))
    return losses


STRENGTH = 1.0


def test_a_number_that_changes_is_followed_from_the_next_step(caplog):
    with caplog.at_level(logging.WARNING, logger="pyro_vi_ext.compiled"):
        losses = annealed(Eager, 12, every=3)
    expected = annealed(SVI, 12, every=3)
    assert losses == pytest.approx(expected, rel=1e-12, abs=0)
    assert sum("'STRENGTH', which was changed" in r.message for r in caplog.records) == 3


def test_a_number_that_changes_in_every_step_is_refused():
    with pytest.raises(CannotCompile, match="'STRENGTH', which was changed.*as tensors"):
        annealed(Eager, 40, every=1)


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceSTL_ELBO])
def test_a_tensor_anneals_without_a_trace(objective):
    strength = torch.tensor(1.0)

    def model(x):
        with poutine.scale(scale=strength):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    found = []
    for kind in (SVI, Eager):
        svi = start(kind, lambda: (model, AutoNormal(model), objective(num_particles=3)))
        found.append([])
        for step in range(10):
            strength.fill_(0.1 * (step + 1))
            found[-1].append(svi.step(X))
    assert found[1] == pytest.approx(found[0], rel=1e-12, abs=0)
    assert svi._programs.num_traces == 1


@pytest.mark.parametrize("place", ["closure", "attribute", "objective"])
def test_what_the_pass_counts_is_refused(place):
    """A warm-up that both records of the pass, one after the other, would not notice."""
    calls = [0]

    class Counting(Trace_ELBO):
        count = 0

        def loss_and_grads(self, *args):
            self.count += place == "objective"
            return super().loss_and_grads(*args)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.count = 0

        def forward(self, x):
            calls[0] += place == "closure"
            self.count += place == "attribute"
            scale = 0.1 if max(calls[0], self.count, objective.count) < 50 else 1.0
            loc = pyro.sample("loc", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(loc, 1.0).expand([len(x)]).to_event(1), obs=x)

    model, objective = Model(), Counting()
    svi = start(Eager, lambda: (model, AutoNormal(model), objective))
    svi.step(X)
    with pytest.raises(CannotCompile, match="The pass changes .*(calls|count)"):
        svi.step(X)


def test_a_change_that_no_name_leads_to_is_found_by_comparison():
    scale = np.ones(100)

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, float(scale[0])))
        pyro.sample("x", dist.Normal(loc, 1.0).expand([len(x)]).to_event(1), obs=x)

    svi = start(Eager, lambda: (model, AutoNormal(model), Trace_ELBO()))
    for _ in range(5):
        svi.step(X)
    scale[0] = 2.0
    with pytest.raises(CannotCompile, match="does not do what a plain one does"):
        for _ in range(15):
            svi.step(X)
    svi.step(X)  # the program that differed is gone
    assert svi._programs.num_traces == 2


# --- refusals ----------------------------------------------------------------------------------


def branching(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    if loc > 0:
        loc = 2 * loc
    pyro.sample("x", dist.Normal(loc, 1.0).expand([len(x)]).to_event(1), obs=x)


def test_refusals_name_the_line():
    svi = start(Eager, lambda: (branching, AutoNormal(branching), Trace_ELBO()))
    svi.step(X)
    with pytest.raises(CannotCompile, match=r"test_compiled_svi.py:\d+ `if loc > 0:`"):
        svi.step(X)
    assert isinstance(CannotCompile(), NotImplementedError)


def test_fallback_warns_once_and_takes_plain_steps():
    make = lambda: (branching, AutoNormal(branching), Trace_ELBO())  # noqa: E731
    plain = start(SVI, make)
    expected = [plain.step(X) for _ in range(8)]
    svi = start(Eager, make, fallback=True)
    losses = [svi.step(X)]
    with pytest.warns(UserWarning, match="Plain SVI steps are taken.*if loc > 0"):
        losses.append(svi.step(X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses += [svi.step(X), *svi.run(5, X).tolist()]
    assert losses == expected
    assert isinstance(svi.refused, CannotCompile) and not svi.programs


def test_decaying_average_baselines_are_refused():
    def guide(x):
        logits = pyro.param("logits", lambda: torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            infer = {"baseline": {"use_decaying_avg_baseline": True}}
            pyro.sample("b", dist.Bernoulli(logits=logits), infer=infer)

    svi = start(Eager, lambda: (coins, guide, TraceGraph_ELBO()))
    svi.step(X)
    before = {n: v.clone() for n, v in pyro.get_param_store().items()}
    with pytest.raises(CannotCompile, match="parameter store's entry '__baseline_avg"):
        svi.step(X)
    assert all(torch.equal(v, before[n]) for n, v in pyro.get_param_store().items())


def test_effect_handlers_around_a_step_are_refused():
    svi = start(Eager, CASES["param"])
    svi.step(X)
    with pytest.raises(CannotCompile, match="inside effect handlers"), poutine.scale(scale=0.5):
        svi.step(X)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(pyro_vi_ext.compiled.backends, "has_compiler", lambda: False)
    with pytest.warns(UserWarning, match="found none"):
        svi = start(CompiledSVI, CASES["param"])
    assert svi.backend == "eager"


def test_unknown_backend():
    with pytest.raises(ValueError, match="inductor, eager, cudagraphs"):
        start(CompiledSVI, CASES["param"], backend="jit")


# --- not finite --------------------------------------------------------------------------------


def fragile(x):
    """A gradient that is not finite where the loss is, for x[0] = 0, and a loss for x[0] = nan."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    bad = 0.0 * (x[0] * loc).square().sqrt()
    pyro.sample("x", dist.Normal(loc + bad, 1.0).expand([len(x)]).to_event(1), obs=x)


@pytest.mark.parametrize("value, what", [(float("nan"), "loss is nan"), (0.0, "a gradient is not")])
def test_a_step_that_is_not_finite_changes_no_parameter(value, what):
    refuse_nonfinite("eager", value, what)


def refuse_nonfinite(backend, value, what):
    good, bad = X.clone(), X.clone()
    bad[0] = value
    svi = start(CompiledSVI, lambda: (fragile, AutoNormal(fragile), Trace_ELBO()), backend=backend)
    for _ in range(3):
        svi.step(good)
    before = left_behind(svi)[0]
    with pytest.raises(ValueError, match=f"At step 1 of the call the .*{what}"):
        svi.step(bad)
    with pytest.raises(ValueError, match=f"At step 1 of the call the .*{what}"):
        svi.run(5, bad)
    after = left_behind(svi)[0]
    assert all(torch.equal(after[name], value) for name, value in before.items())
    svi.step(good)
    assert all(value.isfinite().all() for value in left_behind(svi)[0].values())


# --- Inductor ----------------------------------------------------------------------------------


def test_inductor():
    """The whole way once: score function, double backward, subsampling, a loop, both dtypes."""
    kind = partial(CompiledSVI, backend="inductor")
    svi = both(CASES["AutoNormal"], OPTIMIZERS["ClippedAdam"], 12, kind)
    assert svi.programs[0].has_loop and svi.programs[0].loop_is_compiled
    refuse_nonfinite("inductor", float("nan"), "loss is nan")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("case", CASES)
def test_inductor_everywhere(case, dtype):
    torch.set_default_dtype(dtype)
    kind = partial(CompiledSVI, backend="inductor")
    svi = both(CASES[case], ADAM, 8, kind, rtol=1e-5 if dtype == torch.float32 else 1e-10)
    assert svi.programs[0].has_loop and svi.programs[0].loop_is_compiled


@pytest.mark.slow
@pytest.mark.parametrize("value, what", [(float("nan"), "loss is nan"), (0.0, "a gradient is not")])
def test_inductor_refuses_what_is_not_finite(value, what):
    refuse_nonfinite("inductor", value, what)


@pytest.mark.slow
def test_200_steps_in_float32():
    torch.set_default_dtype(torch.float32)
    both(CASES["AutoNormal"], ADAM, 200, partial(CompiledSVI, backend="inductor"), rtol=2e-5)
