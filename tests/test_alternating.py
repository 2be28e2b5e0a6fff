"""With guide_steps=n the model's own parameters rest n - 1 steps, and the guide catches up."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger, init_to_feasible, init_to_mean
from pyro.infer.util import zero_grads
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

import pyro_vi_ext.targets
from pyro_vi_ext.alternating import users
from pyro_vi_ext.checkpoint import load_checkpoint, save_checkpoint
from pyro_vi_ext.learned import register_learned
from pyro_vi_ext.objective import Estimate, Objective
from pyro_vi_ext.scoring import linear_bound, pair_terms
from pyro_vi_ext.training import fit

from .fitting import DATA, assert_same, clear, parameters
from .resuming import check_resumed

pytestmark = pytest.mark.usefixtures("float64")

STEPS, N = 10, 3


class WithBaseline(Objective):
    """The ELBO plus the loss of a network that has nothing to do with it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 2)

    def estimate(self, run):
        net = register_learned(self, "learned", self.net)
        scored = pair_terms(run, run.pairs[0])
        loss = -linear_bound([*scored.model, *scored.guide.values()], run)
        return Estimate(loss, surrogate=loss + net(torch.ones(1)).square().sum())


# Pairs of a model and a guide. What is the model's alone has "theta" in its name.


def functions():
    def model(x):
        mean = pyro.param("theta_mean", lambda: torch.randn(()))
        sd = pyro.param("theta_sd", torch.tensor(1.5), constraint=constraints.positive)
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, sd), obs=x)

    def guide(x):
        mean = pyro.param("phi_mean", torch.tensor(0.1))
        sd = pyro.param("phi_sd", torch.tensor(0.5), constraint=constraints.positive)
        pyro.sample("z", dist.Normal(mean, sd))

    return model, guide


def shared():
    """Both use the standard deviation: it is the guide's."""
    plain_model, _ = functions()

    def model(x):
        with poutine.scale(scale=0.5):
            pyro.sample("w", dist.Normal(0.0, pyro.param("shared", torch.tensor(1.2))))
        plain_model(x)

    def guide(x):
        pyro.sample("w", dist.Normal(0.0, pyro.param("shared", torch.tensor(1.2))))
        pyro.sample("z", dist.Normal(pyro.param("phi", torch.tensor(0.1)), 1.0))

    return model, guide


def pyro_modules():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.theta_sd = PyroParam(torch.tensor(1.5), constraints.positive)
            self.theta_net = PyroModule[nn.Linear](1, 1)

        def forward(self, x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.theta_net(z[..., None])[0], self.theta_sd), obs=x)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.phi = nn.Parameter(torch.tensor(0.1))
            self.phi_sd = PyroParam(torch.tensor(0.5), constraints.positive)

        def forward(self, x):
            pyro.sample("z", dist.Normal(self.phi, self.phi_sd))

    return Model(), Guide()


def auto_guide():
    net = nn.Linear(1, 1)

    def model(x):
        pyro.module("theta_net", net)
        sd = pyro.param("theta_sd", torch.tensor(1.5), constraint=constraints.positive)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(z[..., None])[0], sd), obs=x)

    return model, AutoNormal(model)


class VAE(nn.Module):
    """Encoder and decoder in one module, which model and guide both register as a whole."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Sequential(
            nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 1)
        )
        self.phi = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.BatchNorm1d(3), nn.Linear(3, 1))

    def model(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(self.theta(z[:, None])[:, 0], 1.0), obs=x)

    def guide(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.phi(x[:, None])[:, 0], 1.0))


def vae():
    net = VAE()
    return net.model, net.guide


def discrete():
    def model(x):
        b = pyro.sample("b", dist.Bernoulli(0.5))
        c = pyro.sample("c", dist.Bernoulli(0.2), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x)):
            loc = pyro.param("theta", torch.tensor(0.3)) * (1 + b) + c
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        p = pyro.param("phi", torch.tensor(0.4), constraint=constraints.unit_interval)
        pyro.sample("b", dist.Bernoulli(p))

    return model, guide


def sometimes():
    """A parameter that had a gradient once has one of zeros in steps that ignore it."""
    plain_model, plain_guide = functions()

    def model(x):
        theta = pyro.param("theta_sometimes", torch.tensor(0.3))
        used = torch.rand(()) < 0.5
        pyro.sample("w", dist.Normal(theta if used else 0.0, 1.0))
        plain_model(x)

    def guide(x):
        pyro.sample("w", dist.Normal(pyro.param("phi", torch.tensor(0.1)), 1.0))
        plain_guide(x)

    return model, guide


def effectful():
    model, _ = functions()
    return model, AutoNormalMessenger(model, init_loc_fn=init_to_feasible)


PAIRS = {f.__name__: f for f in (functions, shared, pyro_modules, auto_guide, vae)}
SVI_PAIRS = {**PAIRS, "discrete": discrete, "sometimes": sometimes, "effectful": effectful}

# Either with state that would move a parameter whose gradient is zero.
OPTIMIZERS = {
    "adam": (torch.optim.Adam, {"lr": 0.05}),
    "sgd": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
}


def make_svi(pair, optimizer="adam", loss=None):
    loss = loss or (TraceEnum_ELBO() if pair is discrete else Trace_ELBO())
    return SVI(*pair(), pyro.optim.PyroOptim(*OPTIMIZERS[optimizer]), loss)


def is_own(name):
    return "theta" in name


def check_rests(history, first=1):
    """The model's own parameters change at steps n, 2n, ... only, the others at each.

    The history has the parameters after each step from the first one on.
    """
    for name in history[0]:
        values = [entry[name] for entry in history]
        moved = [not torch.equal(a, b) for a, b in zip(values, values[1:], strict=False)]
        steps = range(first + 1, first + len(values))
        assert moved == [not is_own(name) or step % N == 0 for step in steps], name


# The same numbers as a loop by hand.


def svi_by_hand(svi, n):
    losses = []
    for step in range(1, STEPS + 1):
        with poutine.trace(param_only=True) as capture:
            losses.append(svi.loss_and_grads(svi.model, svi.guide, DATA))
        nodes = capture.trace.nodes
        leaves = {name: site["value"].unconstrained() for name, site in nodes.items()}
        svi.optim([p for name, p in leaves.items() if step % n == 0 or not is_own(name)])
        zero_grads(leaves.values())
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("pair", SVI_PAIRS)
def test_svi_is_the_loop_by_hand(pair, optimizer):
    pair = SVI_PAIRS[pair]
    svi = make_svi(pair, optimizer)
    losses = svi_by_hand(svi, N)
    expected, rng, buffers = parameters(), torch.get_rng_state(), state_of(svi)
    clear()
    history = []
    svi = make_svi(pair, optimizer)
    result = fit(
        svi, DATA, num_steps=STEPS, guide_steps=N, callback=lambda *_: history.append(parameters())
    )
    assert result.losses.tolist() == losses
    assert_same(parameters(), expected)
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same(state_of(svi), buffers)
    check_rests(history)


def state_of(svi):
    """Parameters and buffers of a network that model and guide are methods of."""
    owner = getattr(svi.model, "__self__", None)
    return {k: v.clone() for k, v in owner.state_dict().items()} if owner else {}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_module_is_the_loop_by_hand(pair, optimizer):
    """By hand with two optimizers, one of which the other n - 1 steps do not know of."""

    def make():
        target = WithBaseline()(*PAIRS[pair]())
        with torch.random.fork_rng():
            target(DATA)
        return target

    def values():
        return {name: p.detach().clone() for name, p in target.named_parameters()}

    make_optimizer, options = OPTIMIZERS[optimizer]
    target = make()
    named = dict(target.named_parameters())
    own = make_optimizer([p for name, p in named.items() if is_own(name)], **options)
    others = make_optimizer([p for name, p in named.items() if not is_own(name)], **options)
    losses = []
    for step in range(1, STEPS + 1):
        target.zero_grad()
        for p in named.values():
            p.grad = None
        loss = target(DATA)
        loss.backward()
        others.step()
        if step % N == 0:
            own.step()
        losses.append(loss.item())
    expected = values()
    clear()
    target = make()
    history = []
    result = fit(
        target,
        DATA,
        num_steps=STEPS,
        guide_steps=N,
        optimizer=lambda parameters: make_optimizer(parameters, **options),
        callback=lambda *_: history.append(values()),
    )
    assert result.losses.tolist() == losses
    assert_same(values(), expected)
    check_rests(history)
    assert any("learned" in name for name in expected)


def test_a_module_of_pyro_and_parameters_that_only_the_optimizer_knows():
    """The network is in no parameter store, and no part of the module."""
    net, pair = nn.Linear(1, 1), pyro_modules()

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(z[..., None])[0], 1.0), obs=x)

    target = Trace_ELBO()(model, pair[1])
    optimizer = torch.optim.Adam([*target.parameters(), *net.parameters()], lr=0.05)
    history = []

    def callback(step, loss):
        phi = {name: p.detach().clone() for name, p in target.named_parameters()}
        history.append(phi | {"theta": net.weight.detach().clone()})

    fit(target, DATA, num_steps=STEPS, guide_steps=N, optimizer=optimizer, callback=callback)
    check_rests(history)


def test_one_guide_step_is_joint_training_at_no_cost(monkeypatch):
    svi = make_svi(functions)
    losses = [svi.step(DATA) for _ in range(STEPS)]
    expected = parameters()
    monkeypatch.setattr(pyro_vi_ext.targets, "users", None)
    clear()
    result = fit(make_svi(functions), DATA, num_steps=STEPS, guide_steps=1)
    assert result.losses.tolist() == losses
    assert_same(parameters(), expected)


def test_learned_parts_of_an_objective_are_updated_at_every_step():
    history = []
    fit(
        make_svi(functions, loss=WithBaseline()),
        DATA,
        num_steps=STEPS,
        guide_steps=N,
        callback=lambda *_: history.append(parameters()),
    )
    check_rests(history)
    assert sum("learned$$$" in name for name in history[0]) == 2


def test_schedules_and_clipping_go_on_in_the_steps_between():
    def run(make_optim):
        clear()
        optim = make_optim({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, "gamma": 0.5})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(SVI(*functions(), optim, Trace_ELBO()), DATA, num_steps=N + 1, guide_steps=N)
        return {pyro.get_param_store().param_name(p): o for p, o in optim.optim_objs.items()}

    for clip in (None, {"clip_norm": 1.0}):
        objects = run(lambda options, c=clip: pyro.optim.ExponentialLR(options, c))
        rates = {name: o.optimizer.param_groups[0]["lr"] for name, o in objects.items()}
        assert len(rates) == 4 and set(rates.values()) == {0.01 / 2 ** (N + 1)}
    objects = run(lambda _: pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.5}))
    assert {o.param_groups[0]["lr"] for o in objects.values()} == {0.01 / 2 ** (N + 1)}
    steps = {n: o.state_dict()["state"][0]["step"] for n, o in objects.items()}
    assert {n: s for n, s in steps.items() if is_own(n)} == {"theta_mean": 1, "theta_sd": 1}
    assert all(s == N + 1 for n, s in steps.items() if not is_own(n))


def test_parameters_that_appear_later(monkeypatch):
    """Each is told apart at its first gradient, and not before; nothing else runs the pair."""
    runs, history, late = [], [], []

    def counted(*args):
        runs.append(len(history) + 1)
        return users(*args)

    monkeypatch.setattr(pyro_vi_ext.targets, "users", counted)
    plain_model, plain_guide = functions()

    def model(x):
        unused = pyro.param("theta_late", torch.tensor(0.4))
        pyro.sample("w", dist.Normal(unused if late else 0.0, 1.0))
        plain_model(x)

    def guide(x):
        pyro.sample("w", dist.Normal(pyro.param("phi_late", torch.tensor(0.3)) if late else 0, 1.0))
        plain_guide(x)

    def callback(step, loss):
        history.append(parameters())
        late.extend([step] * (step == 4))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    fit(svi, DATA, num_steps=STEPS, guide_steps=N, callback=callback)
    assert runs == [1, 5]
    assert [torch.equal(h["theta_late"], torch.tensor(0.4)) for h in history] == [True] * 5 + [
        False
    ] * 5
    check_rests(history[4:], first=5)


# Who uses a parameter.


def test_a_use_is_a_dependence_of_value_scale_or_density():
    class Implicit(dist.TorchDistribution):
        """No density."""

        arg_constraints, has_rsample = {}, True

        def __init__(self, shift):
            self.shift = shift
            super().__init__()

        def rsample(self, sample_shape=()):
            return self.shift

    def param(name):
        return pyro.param(name, torch.tensor(0.5), constraint=constraints.positive)

    def guide():
        param("registered only")
        pyro.sample("a", Implicit(param("of a value")))
        pyro.sample("e", Implicit(pyro.param("a leaf", torch.tensor(0.5))))
        pyro.sample("b", dist.Poisson(param("of a density")))
        pyro.sample("c", dist.Delta(pyro.param("the value", torch.tensor(0.1))))
        pyro.sample("d", dist.Delta(param("detached").detach()))

    def model():
        param("registered only")
        pyro.sample("a", dist.Normal(0.0, param("of a prior")))
        pyro.sample("b", dist.Poisson(1.0))
        pyro.sample("e", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
        pyro.sample("d", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=param("of a scale")):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.2))
        pyro.factor("factor", -param("of a factor") * c)
        pyro.deterministic("shown", param("only shown"))

    stored = pyro.get_param_store()
    by_guide, by_model = (
        {name for name, p in stored.named_parameters() if id(p) in ids}
        for ids in users(model, guide, (), {})
    )
    assert by_guide == {"of a value", "of a density", "the value", "a leaf"}
    assert by_model - by_guide == {"of a prior", "of a scale", "of a factor"}


def test_the_run_that_tells_parameters_apart_takes_the_random_branches_of_the_step():
    for seed in range(8):
        clear(seed)
        seen = []

        def callback(step, loss, seen=seen):
            seen.append(pyro.param("theta_sometimes").item())

        fit(make_svi(sometimes), DATA, num_steps=N, guide_steps=N, callback=callback)
        assert seen[:-1] == [0.3] * (N - 1)


# What cannot alternate.


def test_what_guide_steps_needs():
    class OwnStep(SVI):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    class Custom(nn.Linear):
        def forward(self, x):
            return super().forward(x[:, None]).square().sum()

    def constant_model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def constant_guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def make_adam(parameters):
        return torch.optim.Adam(parameters)

    def run(target, n=N, **options):
        fit(target, DATA, num_steps=STEPS, guide_steps=n, **options)

    (model, guide), optim = functions(), pyro.optim.Adam({"lr": 0.05})
    with pytest.raises(ValueError, match="guide_steps=3.*OwnStep has its own step"):
        run(OwnStep(model, guide, optim, Trace_ELBO()))
    with pytest.raises(ValueError, match=r"guide_steps=3.*\.model and a \.guide.*got Custom"):
        run(Custom(1, 1), optimizer=make_adam)
    run(OwnStep(model, guide, optim, Trace_ELBO()), n=1)
    run(Custom(1, 1), n=1, optimizer=make_adam)
    clear()
    with pytest.raises(ValueError, match="guide_steps=3.*used by the model and not by the guide"):
        run(SVI(constant_model, guide, optim, Trace_ELBO()))
    with pytest.raises(ValueError, match="guide_steps=3.*used by the model and not by the guide"):
        run(WithBaseline()(constant_model, guide), optimizer=make_adam)
    with pytest.raises(ValueError, match="guide_steps=3.*used by the guide"):
        run(SVI(model, constant_guide, optim, Trace_ELBO()))
    for wrong in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="guide_steps must be an integer >= 1"):
            run(make_svi(functions), n=wrong)
    with pytest.raises(ValueError, match="guide_steps=11 is more than num_steps=10"):
        run(make_svi(functions), n=11)


def test_a_refusal_leaves_no_gradient_behind():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("phi", torch.tensor(0.1)), 1.0))

    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO())
    with pytest.raises(ValueError, match="Leave out guide_steps"):
        fit(svi, DATA, num_steps=STEPS, guide_steps=N)
    assert pyro.param("phi").item() == 0.1 and pyro.param("phi").grad.item() == 0.0


@pytest.mark.parametrize("auto", [AutoNormal, AutoNormalMessenger])
def test_a_guide_that_starts_in_the_memory_of_the_model_is_refused(auto):
    """Pyro's init_to_mean may hand out the model's own tensor, which then moves with the guide."""
    model, _ = functions()
    svi = SVI(model, auto(model, init_loc_fn=init_to_mean), pyro.optim.Adam({}), Trace_ELBO())
    with pytest.raises(ValueError, match="'theta_mean' of the model and '.*z' of the guide share"):
        fit(svi, DATA, num_steps=STEPS, guide_steps=N)


# Resuming.


def scenario(pair, kind, optim=lambda: pyro.optim.PyroOptim(*OPTIMIZERS["sgd"])):
    def make():
        torch.manual_seed(11)  # networks
        options = {"guide_steps": N}
        if kind == "svi":
            return SVI(*pair(), optim(), Trace_ELBO()), (DATA,), options
        target = WithBaseline()(*pair())
        options["optimizer"] = lambda p: torch.optim.Adam(p, lr=0.05)
        return target, (DATA,), options

    return make


def scheduled():
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
    return pyro.optim.ExponentialLR(options)


SCENARIOS = {
    "functions": scenario(functions, "svi"),
    "schedule": scenario(functions, "svi", scheduled),
    "VAE": scenario(vae, "svi"),
    "module": scenario(functions, "module"),
    "pyro modules": scenario(pyro_modules, "module"),
}


@pytest.mark.parametrize("when", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_resumed_run_continues_the_cycle(name, when, tmp_path):
    check_resumed(SCENARIOS[name], when, tmp_path)


def test_the_checkpoint_remembers_guide_steps_and_who_uses_what(tmp_path, monkeypatch):
    def run(n, path, num_steps=STEPS):
        clear()
        fit(make_svi(functions), DATA, num_steps=num_steps, guide_steps=n, checkpoint=path)

    run(3, tmp_path / "three", num_steps=5)
    with pytest.raises(ValueError, match="written with guide_steps=3, here it is 2"):
        run(2, tmp_path / "three")
    with pytest.raises(ValueError, match="written with guide_steps=3, here it is 1"):
        run(1, tmp_path / "three")
    with monkeypatch.context() as patch:
        patch.setattr(pyro_vi_ext.targets, "users", None)
        run(3, tmp_path / "three")
    run(1, tmp_path / "one", num_steps=5)
    state = load_checkpoint(tmp_path / "one")
    del state["guide_steps"], state["target"]["sides"]
    save_checkpoint(tmp_path / "old", state)  # as written before there was such an option
    with pytest.raises(ValueError, match="written with guide_steps=1, here it is 2"):
        run(2, tmp_path / "old")
    run(1, tmp_path / "old")
    found = parameters()
    run(1, tmp_path / "one")
    assert_same(found, parameters())


# What it is for.


def test_a_guide_that_keeps_up_makes_the_model_climb_the_likelihood():
    r"""With a guide at its optimum, :math:`\nabla_\theta` ELBO is that of the log-likelihood.

    Model z ~ N(0, 1), x | z ~ N(w z, 1), so x ~ N(0, 1 + w^2); guide z ~ N(a x, s^2), exact at
    a = w / (1 + w^2), s^2 = 1 / (1 + w^2). The loss is the exact negative ELBO.
    """
    x = 2.0 * torch.randn(20)
    updates, rate = 15, 0.002

    def evidence(w):
        return dist.Normal(0.0, (1 + w**2).sqrt()).log_prob(x).sum()

    def model():
        w = pyro.param("w", torch.tensor(0.3))
        z = pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(w * z, 1.0).to_event(1), obs=x)

    def guide():
        a, t = pyro.param("a", torch.tensor(0.0)), pyro.param("t", torch.tensor(0.0))
        pyro.sample("z", dist.Normal(a * x, t.exp()).to_event(1))

    def loss(model, guide):
        w, a, t = pyro.param("w"), pyro.param("a"), pyro.param("t")
        mean, variance = a * x, (2 * t).exp()
        reconstruction = -((x - w * mean) ** 2 + w**2 * variance) / 2 - math.log(2 * math.pi) / 2
        minus_kl = (1 + 2 * t - mean**2 - variance) / 2
        return -(reconstruction + minus_kl).sum()

    def train(n):
        clear()
        for fn in (model, guide):
            poutine.trace(fn).get_trace()
        rates = {"w": rate, "a": 0.5 / (x**2).sum().item(), "t": 0.02}
        optim = pyro.optim.SGD(lambda name: {"lr": rates[name]})
        seen = [pyro.param("w").item()]

        def callback(step, loss):
            if step % n == 0:
                seen.append(pyro.param("w").item())

        result = fit(
            SVI(model, guide, optim, loss),
            num_steps=n * updates,
            guide_steps=n,
            callback=callback,
        )
        return torch.tensor(seen), -result.losses[-1].item()

    w = torch.tensor(0.3, requires_grad=True)
    climb = [w.item()]
    for _ in range(updates):
        (gradient,) = torch.autograd.grad(evidence(w), w)
        w = (w + rate * gradient).detach().requires_grad_()
        climb.append(w.item())
    climb = torch.tensor(climb)

    runs = {n: train(n) for n in (1, 5, 60)}
    assert torch.allclose(runs[60][0], climb, rtol=0.0, atol=1e-12)
    lag = {n: (seen - climb).abs().max().item() for n, (seen, _) in runs.items()}
    assert lag[1] > 10 * lag[5] and lag[5] > 10 * lag[60]
    bounds = {n: bound for n, (_, bound) in runs.items()}
    assert bounds[1] < bounds[5] < bounds[60] <= evidence(climb[-2]).item() + 1e-12
