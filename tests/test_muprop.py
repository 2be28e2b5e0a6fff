"""MuProp: exact where f is linear, the gradient by definition, less variance, what is refused."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_vi_ext import TraceMuProp_ELBO, TraceScore_ELBO, branches

from .enumerating import KINDS, Problem, log_prob
from .test_discrete import deviation
from .test_trace_score import X, leaves, log_densities, pair

pytestmark = pytest.mark.usefixtures("float64")

COPIES = 200


# --- where the expansion is exact ----------------------------------------------------------------


def one_draw(kind, logits, f):
    """One draw for each row of logits, a flat prior, and a factor f of the draw."""
    copies = pyro.plate("copies", len(logits))

    def model():
        with copies:
            b = pyro.sample("b", kind.make(torch.zeros_like(logits)))
            pyro.factor("f", f(kind.vector(b)))

    def guide():
        with copies:
            pyro.sample("b", kind.make(logits))

    return model, guide


def gradient(objective, logits, *model_and_guide):
    loss = objective.differentiable_loss(*model_and_guide)
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("name", ["scalar", "event", "one hot"])
def test_every_draw_gives_the_exact_gradient_if_f_is_linear(name, vectorized):
    """The residual is zero, whatever is drawn: no noise at all."""
    kind = KINDS[name]
    start, weight = torch.linspace(-0.7, 1.1, kind.width), torch.linspace(3.0, -2.0, kind.width)
    logits = start.expand(COPIES, -1).clone().requires_grad_()
    objective = TraceMuProp_ELBO(2, vectorize_particles=vectorized)
    found = gradient(objective, logits, *one_draw(kind, logits, lambda b: b @ weight))

    states, leaf = torch.tensor(kind.states).double(), start.clone().requires_grad_()
    log_q = log_prob(name, leaf, states)
    loss = (log_q.exp() * (log_q - states @ weight)).sum()  # less the prior, a constant
    exact = torch.autograd.grad(loss, leaf)[0].expand_as(found)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_a_curved_f_leaves_a_residual_of_mean_zero():
    """f = b1 b2 of two bits at once: noise, and the mean of 4 standard errors."""
    start, num = torch.tensor([0.4, -0.3]), 20_000
    logits = start.expand(num, 2).clone().requires_grad_()
    kind = KINDS["event"]
    both = one_draw(kind, logits, lambda b: 4 * b.prod(-1))
    found = gradient(TraceMuProp_ELBO(), logits, *both)
    leaf = start.clone().requires_grad_()
    q = leaf.sigmoid()
    entropy = -(q * q.log() + (1 - q) * (1 - q).log()).sum()
    (exact,) = torch.autograd.grad(-4 * q.prod() - entropy, leaf)
    error = found.std(0) / num**0.5
    assert (error > 1e-3).all() and ((found.mean(0) - exact).abs() < 4 * error).all()


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_site_that_is_masked_out_has_gradient_zero(vectorized):
    logits = torch.zeros(3, requires_grad=True)
    model, guide = one_draw(KINDS["event"], logits.expand(4, 3), lambda b: torch.zeros(4))
    hidden = [poutine.mask(fn, mask=False) for fn in (model, guide)]
    objective = TraceMuProp_ELBO(2, vectorize_particles=vectorized)
    assert not gradient(objective, logits, *hidden).any()


# --- by definition -------------------------------------------------------------------------------


def linear(logits, b):
    return b * logits.sigmoid().log() + (1 - b) * (-logits).sigmoid().log()


def relaxed(p, b1, b2):
    """f_1 and f_2 at values between 0 and 1: (J,) and (J, 2)."""
    own = linear(torch.tensor(0.6).logit(), b2) + dist.Normal(
        p[2] * b1[:, None] + b2, 0.7
    ).log_prob(X)
    local = own - linear(p[1] * (1 + b1[:, None]), b2)
    p1 = linear(torch.tensor(0.3).logit(), b1)
    return p1 - linear(p[0], b1) + local.sum(1), p1[:, None] + local


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_gradient_by_definition(num_particles, vectorized):
    """A chain, b2 of units given b1 of all: later means follow from earlier ones."""
    p, drawn = leaves(), []
    model, guide = pair(p)

    def recorded():
        nodes = poutine.trace(guide).get_trace().nodes
        drawn.append((nodes["b1"]["value"].detach(), nodes["b2"]["value"].detach()))

    objective = TraceMuProp_ELBO(num_particles, vectorize_particles=vectorized)
    objective.differentiable_loss(model, recorded)
    drawn.clear()
    loss = objective.differentiable_loss(model, recorded)
    b1 = torch.cat([b.reshape(-1) for b, _ in drawn])[:num_particles]
    b2 = torch.cat([b.reshape(-1, 2) for _, b in drawn])[:num_particles]

    fixed = p.detach()
    mean1, mean2 = p[0].sigmoid().expand(num_particles), (p[1] * (1 + b1[:, None])).sigmoid()
    at1, at2 = (m.detach().expand(b.shape).requires_grad_() for m, b in ((mean1, b1), (mean2, b2)))
    f1_mean = relaxed(fixed, at1, (fixed[1] * (1 + at1[:, None])).sigmoid())[0]
    f2_mean = relaxed(fixed, b1, at2)[1]
    (slope1,) = torch.autograd.grad(f1_mean.sum(), at1)
    (slope2,) = torch.autograd.grad(f2_mean.sum(), at2)

    p1, q1, p2, q2 = log_densities(p, b1, b2)
    f1, f2 = relaxed(fixed, b1, b2)
    residual1 = (f1 - f1_mean - slope1 * (b1 - at1)).detach()
    residual2 = (f2 - f2_mean - slope2 * (b2 - at2)).detach()
    by_hand = p1 + p2.sum(1) + residual1 * q1 + slope1 * mean1
    by_hand = by_hand + (residual2 * q2 + slope2 * mean2).sum(1)
    (expected,) = torch.autograd.grad(-by_hand.mean(), p)
    torch.testing.assert_close(torch.autograd.grad(loss, p)[0], expected)
    assert loss.item() == pytest.approx(-f1.mean().item())


def test_a_slope_without_its_mean_is_rejected(monkeypatch):
    """The path of the mean detached: the control variate has no longer mean zero."""
    problem = Problem("scalar", 2)
    assert deviation(problem, TraceMuProp_ELBO()) < 4
    relaxation = branches.relaxation_of(dist.Bernoulli(0.5))[0]
    mean = type(relaxation).mean
    monkeypatch.setattr(type(relaxation), "mean", lambda self, logits: mean(self, logits).detach())
    assert deviation(problem, TraceMuProp_ELBO()) > 6


# --- variance ------------------------------------------------------------------------------------


def test_lower_variance_than_the_score_function_on_a_quadratic():
    num, weight = 4000, torch.linspace(0.2, 1.0, 5)
    logits = torch.linspace(-1, 1, 5).expand(num, 5).clone().requires_grad_()
    make = type("Bits", (), {"make": lambda g: dist.Bernoulli(logits=g).to_event(1)})
    make.vector = staticmethod(lambda b: b)
    both = one_draw(make, logits, lambda b: -((b @ weight - 4.0) ** 2))
    variances = [
        gradient(objective, logits, *both).var(0).sum().item()
        for objective in (TraceMuProp_ELBO(), TraceScore_ELBO())
    ]
    assert variances[0] < 0.1 * variances[1]


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, kind",
    [
        (lambda p: dist.Categorical(logits=p), "Categorical"),
        (lambda p: dist.Poisson(p[0].exp()), "Poisson"),
    ],
)
def test_sites_without_a_real_mean_are_refused_by_name(make, kind):
    p = torch.zeros(3, requires_grad=True)
    both = [lambda: pyro.sample("k", make(torch.zeros(3))), lambda: pyro.sample("k", make(p))]
    objective = TraceMuProp_ELBO()
    with pytest.raises(NotImplementedError, match=f"'k' .{kind}. has no mean.*TraceRLOO_ELBO"):
        objective.loss_and_grads(*both)
    assert math.isfinite(objective.loss(*both))


def test_a_later_draw_without_a_relaxation_is_refused_by_name():
    p = torch.tensor(0.3, requires_grad=True)

    def chain(p):
        def fn():
            b = pyro.sample("b", dist.Bernoulli(logits=p))
            pyro.sample("n", dist.Poisson(1.0 + b))

        return fn

    with pytest.raises(NotImplementedError, match="[Ss]ite 'n'.*TraceRLOO_ELBO"):
        TraceMuProp_ELBO().loss_and_grads(chain(torch.tensor(0.0)), chain(p))


def test_a_decoder_that_indexes_with_the_value_is_an_error():
    logits, table = torch.zeros((), requires_grad=True), [0.2, 0.9]

    def model():
        b = pyro.sample("b", dist.Bernoulli(0.5))
        index = b if b.detach() % 1 else int(b)
        pyro.sample("x", dist.Normal(torch.tensor(table)[index], 1.0), obs=torch.tensor(0.5))

    def guide():
        pyro.sample("b", dist.Bernoulli(logits=logits))

    with pytest.raises(ValueError, match="relaxed values of site 'b'.*not as an index"):
        TraceMuProp_ELBO().loss_and_grads(model, guide)
