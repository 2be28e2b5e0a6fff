"""The leave-one-out baseline: its mean over every pair of draws, and no variance at the optimum."""

import itertools

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_vi_ext import TraceRLOO_ELBO, TraceScore_ELBO, leave_one_out

pytestmark = pytest.mark.usefixtures("float64")


def forced(values):
    """A Bernoulli whose draws are given."""

    class Forced(dist.Bernoulli):
        def sample(self, sample_shape=()):
            return values

    return Forced


def expected_and_exact(num_particles, cls=TraceRLOO_ELBO):
    """Mean over all J-tuples of draws, elements of a plate with their probabilities as scales."""
    p = torch.tensor([0.3, -0.8, 0.5], requires_grad=True)
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)))
    tuples = torch.tensor(list(itertools.product(range(4), repeat=num_particles))).T
    b1, b2 = states[tuples].unbind(-1)  # (J, tuples)

    def log_q(b1, b2):
        first, second = dist.Bernoulli(logits=p[0]), dist.Bernoulli(logits=p[1] * (1 + b1))
        return first.log_prob(b1) + second.log_prob(b2)

    def log_p(b1, b2):
        prior = dist.Bernoulli(0.3).log_prob(b1) + dist.Bernoulli(0.3).log_prob(b2)
        return prior + dist.Normal(p[2] * b1 + b2, 0.7).log_prob(torch.tensor(0.9))

    probability = log_q(b1, b2).sum(0).exp().detach()
    plate = pyro.plate("tuples", tuples.shape[1])

    def model():
        with plate, poutine.scale(scale=probability):
            c1 = pyro.sample("b1", dist.Bernoulli(0.3))
            c2 = pyro.sample("b2", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(p[2] * c1 + c2, 0.7), obs=torch.tensor(0.9))

    def guide():
        with plate, poutine.scale(scale=probability):
            c1 = pyro.sample("b1", forced(b1)(logits=p[0]))
            pyro.sample("b2", forced(b2)(logits=p[1] * (1 + c1)))

    with pyro.validation_enabled(False):  # a set-up run sees all particles' draws
        loss = cls(num_particles, max_plate_nesting=1).differentiable_loss(model, guide)
    c1, c2 = states.unbind(-1)
    exact = -(log_q(c1, c2).exp() * (log_p(c1, c2) - log_q(c1, c2))).sum()
    return torch.autograd.grad(loss, p)[0], torch.autograd.grad(exact, p)[0]


@pytest.mark.parametrize("num_particles", [2, 3])
def test_expectation_over_every_tuple_of_draws_is_the_exact_gradient(num_particles):
    found, exact = expected_and_exact(num_particles)
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


def test_a_baseline_that_sees_its_own_draw_is_rejected(monkeypatch):
    monkeypatch.setattr(leave_one_out, "without_mean_of_others", lambda f, run: f - f.mean(0))
    found, exact = expected_and_exact(2)
    assert (found - exact).abs().max() > 0.05


def test_the_mean_of_the_others_is_subtracted():
    class Run:
        num_particles = 4

    f = torch.randn(4, 3)
    found = leave_one_out.without_mean_of_others(f, Run)
    for j in range(4):
        others = torch.cat([f[:j], f[j + 1 :]])
        torch.testing.assert_close(found[j], f[j] - others.mean(0))
    same = leave_one_out.without_mean_of_others(f[:1], Run)  # equal for all particles
    torch.testing.assert_close(same, torch.zeros(4, 3))


# --- variance ----------------------------------------------------------------------------------


def pair(logits, x):
    def model():
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide():
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    return model, guide


@pytest.mark.parametrize("vectorized", [True, False])
def test_no_variance_at_the_exact_posterior(vectorized):
    """f is constant there; the plain score function keeps its variance."""
    x = torch.tensor([0.9, -0.4, 2.0])
    logits = (x - 0.5).requires_grad_()
    for cls, zero in ((TraceRLOO_ELBO, True), (TraceScore_ELBO, False)):
        objective = cls(2, vectorize_particles=vectorized)
        model, guide = pair(logits, x)
        losses = [objective.differentiable_loss(model, guide) for _ in range(5)]
        sizes = [torch.autograd.grad(loss, logits)[0].abs().max() for loss in losses]
        assert (max(sizes).item() < 1e-14) is zero


def test_lower_variance_than_without_a_baseline():
    x = torch.full((20_000,), 0.9)
    spread = {}
    for cls in (TraceScore_ELBO, TraceRLOO_ELBO):
        logits = torch.zeros(20_000, requires_grad=True)
        loss = cls(2).differentiable_loss(*pair(logits, x))
        spread[cls] = torch.autograd.grad(loss, logits)[0].var()
    assert spread[TraceRLOO_ELBO] < 0.2 * spread[TraceScore_ELBO]


@pytest.mark.parametrize("num_particles", [0, 1, 2.5])
def test_fewer_than_two_particles_are_refused(num_particles):
    with pytest.raises(ValueError, match=f"num_particles must be .*>= [12], got {num_particles}"):
        TraceRLOO_ELBO(num_particles)
