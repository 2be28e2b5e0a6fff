"""REBAR: the gradient by definition, less variance, learned temperatures, and what is refused."""

import gc
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI

from pyro_vi_ext import TraceREBAR_ELBO, TraceRLOO_ELBO, TraceScore_ELBO
from pyro_vi_ext.relaxations import BERNOULLI

from .enumerating import Problem

pytestmark = pytest.mark.usefixtures("float64")

X = 0.8


def bits(logits, y=lambda b: b):
    """One bit for each logit, and x of each."""

    def plate():
        return pyro.plate("data", logits.shape[-1])

    def model():
        with plate():
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(y(b), 0.5), obs=torch.full(logits.shape, X))

    def guide():
        with plate():
            pyro.sample("b", dist.Bernoulli(logits=logits))

    return model, guide


def relaxed_f(logits, v):
    """log p(x, v) - log q(v), extended linearly."""
    prior = v * math.log(0.3) + (1 - v) * math.log(0.7)
    log_q = v * F.logsigmoid(logits) + (1 - v) * F.logsigmoid(-logits)
    return prior + dist.Normal(v, 0.5).log_prob(torch.tensor(X)) - log_q


@pytest.mark.parametrize("coupled", [True, False])
def test_gradient_by_definition(coupled, monkeypatch):
    """From the draws b and the noise that were made, with autograd through z and z given b."""
    made, noise = [], BERNOULLI.noise

    def recorded(self, logits):
        made.append(noise(logits))
        return made[-1]

    monkeypatch.setattr(type(BERNOULLI), "noise", recorded)
    logits = torch.linspace(-2, 2, 7).requires_grad_()
    model, guide = bits(logits)
    objective = TraceREBAR_ELBO(2, temperature=0.7, scale=0.9, coupled=coupled)
    objective.loss(model, guide)
    pyro.set_rng_seed(4)
    loss = objective.differentiable_loss(model, guide)
    found = torch.autograd.grad(loss, logits)[0]
    pyro.set_rng_seed(4)
    b = torch.bernoulli(logits.detach().sigmoid().expand(2, 7))

    leaf = logits.detach().expand(2, 7).clone().requires_grad_()
    constant = leaf.detach()  # f itself is not differentiated by the logits

    def c(z):
        return 0.9 * relaxed_f(constant, torch.sigmoid(z / 0.7))

    given_b = BERNOULLI.given(leaf, b, made[0])
    if coupled:  # z has the value of z given b, and its own derivative, 1
        z = leaf + (given_b - leaf).detach()
    else:
        free = BERNOULLI.given(constant, b, made[1])
        z = leaf + (free - constant)
    log_q = b * F.logsigmoid(leaf) + (1 - b) * F.logsigmoid(-leaf)
    residual = relaxed_f(constant, b) - c(given_b)
    surrogate = (residual.detach() * log_q + c(z) - c(given_b)).sum() / 2
    torch.testing.assert_close(found, -torch.autograd.grad(surrogate, leaf)[0].sum(0))


# --- variance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("coupled", [True, False])
def test_lower_variance_than_the_score_function(coupled):
    """Ten bits of one datum: a baseline cannot tell which of them mattered."""
    logits = torch.linspace(-1, 1, 10).expand(2000, 10).clone().requires_grad_()
    plate, weight = pyro.plate("copies", 2000), torch.linspace(0.5, 1.5, 10)

    def model():
        with plate:
            b = pyro.sample("b", dist.Bernoulli(0.3).expand([10]).to_event(1))
            pyro.sample("x", dist.Normal(b @ weight, 1.0), obs=torch.tensor(2.0).expand(2000))

    def guide():
        with plate:
            pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))

    def variance(objective):
        loss = objective.differentiable_loss(model, guide)
        return torch.autograd.grad(loss, logits)[0].var(0).sum().item()

    rebar = variance(TraceREBAR_ELBO(2, coupled=coupled))
    score, rloo = variance(TraceScore_ELBO(2)), variance(TraceRLOO_ELBO(2))
    assert rebar < 0.3 * rloo and rloo < 0.9 * score


@pytest.mark.parametrize("leave_one_out, plain", [(False, TraceScore_ELBO), (True, TraceRLOO_ELBO)])
def test_without_its_control_variate_it_is_the_score_function(leave_one_out, plain):
    problem, gradients = Problem("event", 2, copies=20), []
    rebar = TraceREBAR_ELBO(3, scale=0.0, learn=False, leave_one_out=leave_one_out)
    for objective in (rebar, plain(3)):
        p = problem.leaves(20, 1)
        objective.loss(*problem.pair(p))
        pyro.set_rng_seed(2)
        gradients += torch.autograd.grad(objective.differentiable_loss(*problem.pair(p)), p)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("coupled", [True, False])
def test_training_temperature_and_scale_lowers_the_variance(coupled):
    logits = torch.full((500,), 0.4, requires_grad=True)
    pair = bits(logits, y=lambda b: 2 * b * b - b)
    objective = TraceREBAR_ELBO(temperature=4.0, scale=0.2, coupled=coupled)

    def spread():
        gradients = [
            torch.autograd.grad(objective.differentiable_loss(*pair), logits)[0] for _ in range(20)
        ]
        return torch.cat(gradients).var().item()

    before = spread()
    learned = list(objective.learned.parameters())
    adam = torch.optim.Adam(learned, lr=0.05)
    for _ in range(100):
        loss = objective.differentiable_loss(*pair)
        for parameter, slope in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            parameter.grad = slope
        adam.step()
    assert spread() < 0.5 * before
    constants = objective.constants.get("b")
    assert constants.temperature.item() != 4.0 and constants.scale.item() > 0.2


def test_svi_trains_temperature_and_scale_with_the_guide():
    def guide():
        logits = pyro.param("logits", torch.zeros(50))
        with pyro.plate("data", 50):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    model, _ = bits(torch.zeros(50))
    objective = TraceREBAR_ELBO(10)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=objective)
    for _ in range(120):
        svi.step()
    constants = objective.constants.get("b")
    assert constants.temperature.item() != pytest.approx(0.5, abs=1e-3)
    assert constants.scale.item() != pytest.approx(1.0, abs=1e-3)
    at = torch.tensor([0.0, 1.0])
    log_p = dist.Bernoulli(0.3).log_prob(at) + dist.Normal(at, 0.5).log_prob(torch.tensor(X))
    exact = log_p.softmax(0)[1]
    assert abs(pyro.param("logits").sigmoid().mean() - exact) < 0.03


# --- options -----------------------------------------------------------------------------------


def test_constants_that_are_not_learned_stay_and_are_no_parameters(recwarn):
    logits = torch.zeros(3, requires_grad=True)
    objective = TraceREBAR_ELBO(temperature=0.3, scale=0.7, learn=False)
    module = objective(*bits(logits))
    module().backward()
    assert list(module.parameters()) == [] and len(pyro.get_param_store()) == 0
    constants = objective.constants.get("b")
    assert constants.temperature.item() == pytest.approx(0.3) and constants.scale.item() == 0.7
    assert not [str(w.message) for w in recwarn if "registered" in str(w.message)]


@pytest.mark.parametrize("size", [-90.0, -30.0, 30.0, 90.0])
def test_gradients_are_finite_at_saturated_logits_in_single_precision(size):
    torch.set_default_dtype(torch.float32)
    logits = torch.full((200,), size, requires_grad=True)
    module = TraceREBAR_ELBO(3)(*bits(logits))
    module().backward()
    leaves = [logits, *module.parameters()]
    assert len(leaves) == 3 and all(leaf.grad.isfinite().all() for leaf in leaves)
    assert all(leaf.dtype == torch.float32 for leaf in leaves)


def test_nothing_of_a_step_outlives_it():
    alive, logits = [], torch.zeros(3, requires_grad=True)
    model, guide = bits(logits)

    def watched():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        alive.append(weakref.ref(z))
        model()

    def both():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))
        guide()

    objective = TraceREBAR_ELBO(2)
    for _ in range(2):
        objective.loss_and_grads(watched, both)
        objective.differentiable_loss(watched, both).backward()
    gc.collect()
    assert alive and not any(ref() is not None for ref in alive)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature must be positive, got"):
        TraceREBAR_ELBO(temperature=temperature)


def test_a_baseline_of_the_others_needs_others():
    with pytest.raises(ValueError, match="leave_one_out=True needs num_particles >= 2"):
        TraceREBAR_ELBO(1, leave_one_out=True)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: dist.Categorical(logits=p), "Site 'k' cannot take relaxed.*OneHotCategorical"),
        (lambda p: dist.Poisson(p[0].exp()), "site 'k' is a Poisson, which has no relaxation"),
        (lambda p: dist.Binomial(2, logits=p[0]), "site 'k' is a Binomial.*TraceRLOO_ELBO"),
    ],
    ids=["Categorical", "Poisson", "Binomial"],
)
def test_sites_without_a_relaxation_are_refused_by_name(make, message):
    p = torch.zeros(3, requires_grad=True)
    pair = [lambda: pyro.sample("k", make(torch.zeros(3))), lambda: pyro.sample("k", make(p))]
    objective = TraceREBAR_ELBO()
    with pytest.raises(NotImplementedError, match=message):
        objective.loss_and_grads(*pair)
    assert math.isfinite(objective.loss(*pair))


@pytest.mark.parametrize("learned", [True, False])
def test_a_later_draw_without_a_relaxation_is_refused_by_name(learned):
    """It would have to be drawn given a relaxed value, whether or not it is learned itself."""
    p = torch.zeros(2, requires_grad=True)

    def pair(p, q):
        def fn():
            b = pyro.sample("b", dist.Bernoulli(logits=p))
            pyro.sample("n", dist.Poisson((q + b).exp()))

        return fn

    guide = pair(p[0], p[1] if learned else torch.tensor(0.2))
    with pytest.raises(NotImplementedError, match="[Ss]ite 'n'.*TraceRLOO_ELBO"):
        TraceREBAR_ELBO().loss_and_grads(pair(torch.tensor(0.0), 0.0), guide)


def test_a_decoder_that_cannot_take_relaxed_values_is_named():
    logits = torch.zeros(3, requires_grad=True)

    def strict(b):
        if ((b != 0) & (b != 1)).any():
            raise ValueError("only bits")
        return b

    with pytest.raises(ValueError, match="relaxed values of site 'b'.*TraceRLOO_ELBO.*only bits"):
        TraceREBAR_ELBO().loss_and_grads(*bits(logits, strict))
