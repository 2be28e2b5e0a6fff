"""The plain score-function gradient: by definition, and its mean over every possible draw."""

import itertools

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_vi_ext import TraceScore_ELBO

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.9, -0.4], dtype=torch.double)


def leaves():
    return torch.tensor([0.3, -0.8, 0.5], requires_grad=True)  # of b1, of b2, of the model


def pair(p):
    """b1 for all, b2 and x in a plate."""
    plate = pyro.plate("data", 2)

    def model():
        b1 = pyro.sample("b1", dist.Bernoulli(0.3))
        with plate:
            b2 = pyro.sample("b2", dist.Bernoulli(0.6))
            pyro.sample("x", dist.Normal(p[2] * b1 + b2, 0.7), obs=X)

    def guide():
        b1 = pyro.sample("b1", dist.Bernoulli(logits=p[0]))
        with plate:
            pyro.sample("b2", dist.Bernoulli(logits=p[1] * (1 + b1)))

    return model, guide


def log_densities(p, b1, b2):
    """Of b1 (J,), and of each datum (J, 2): log p and log q of b1, log p and log q of b2 and x."""
    q1, q2 = dist.Bernoulli(logits=p[0]), dist.Bernoulli(logits=p[1] * (1 + b1[:, None]))
    x = dist.Normal(p[2] * b1[:, None] + b2, 0.7).log_prob(X)
    p2 = dist.Bernoulli(0.6).log_prob(b2) + x
    return dist.Bernoulli(0.3).log_prob(b1), q1.log_prob(b1), p2, q2.log_prob(b2)


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_gradient_by_definition(num_particles, vectorized):
    p, drawn = leaves(), []
    model, guide = pair(p)

    def recorded():
        trace = poutine.trace(guide).get_trace()
        drawn.append((trace.nodes["b1"]["value"], trace.nodes["b2"]["value"]))

    objective = TraceScore_ELBO(num_particles, vectorize_particles=vectorized)
    objective.differentiable_loss(model, recorded)
    drawn.clear()
    loss = objective.differentiable_loss(model, recorded)
    b1 = torch.cat([b.reshape(-1) for b, _ in drawn])[:num_particles]
    b2 = torch.cat([b.reshape(-1, 2) for _, b in drawn])[:num_particles]

    p1, q1, p2, q2 = log_densities(p, b1, b2)
    f1, f2 = p1 - q1 + (p2 - q2).sum(1), p1[:, None] + p2 - q2
    by_hand = p1 + p2.sum(1) + f1.detach() * q1 + (f2.detach() * q2).sum(1)
    (expected,) = torch.autograd.grad(-by_hand.mean(), p)
    torch.testing.assert_close(torch.autograd.grad(loss, p)[0], expected)
    assert loss.item() == pytest.approx(-f1.mean().item())


def forced(values):
    """A Bernoulli whose draws are given."""

    class Forced(dist.Bernoulli):
        def sample(self, sample_shape=()):
            return values

    return Forced


def test_expectation_over_every_draw_is_the_exact_gradient():
    """All states are elements of a plate, each with its probability as its scale."""
    p = leaves()
    b = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2))).T
    prior, likelihood = dist.Bernoulli(0.3), dist.Normal(0.0, 0.7)

    def log_q(p):
        first, second = dist.Bernoulli(logits=p[0]), dist.Bernoulli(logits=p[1] * (1 + b[0]))
        return first.log_prob(b[0]) + second.log_prob(b[1])

    probability = log_q(p).exp().detach()

    def model():
        with pyro.plate("states", 4), poutine.scale(scale=probability):
            b1, b2 = pyro.sample("b1", prior), pyro.sample("b2", prior)
            loc = likelihood.loc + p[2] * b1 + b2
            pyro.sample("x", dist.Normal(loc, 0.7), obs=X[0])

    def guide():
        with pyro.plate("states", 4), poutine.scale(scale=probability):
            b1 = pyro.sample("b1", forced(b[0])(logits=p[0]))
            pyro.sample("b2", forced(b[1])(logits=p[1] * (1 + b1)))

    loss = TraceScore_ELBO().differentiable_loss(model, guide)
    f = prior.log_prob(b).sum(0) + dist.Normal(p[2] * b[0] + b[1], 0.7).log_prob(X[0]) - log_q(p)
    exact = -(log_q(p).exp() * f).sum()
    torch.testing.assert_close(loss, exact)
    found, expected = (torch.autograd.grad(value, p)[0] for value in (loss, exact))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def normal_pair(p):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

    def guide():
        pyro.sample("z", dist.Normal(p[0], p[1].exp()))

    return model, guide


def test_reparameterised_draws_keep_their_path_unless_all_are_scored():
    """Of KL and likelihood in closed form: two gradients of one mean, of different variance."""
    p = torch.tensor([0.3, -0.5], requires_grad=True)
    exact = 0.5 * ((2 * p[1]).exp() + p[0] ** 2) - p[1]
    exact = exact + 0.5 * ((X[0] - p[0]) ** 2 + (2 * p[1]).exp())
    (exact,) = torch.autograd.grad(exact, p)
    spread = {}
    for sites in ("discrete", "all"):
        objective = TraceScore_ELBO(10, score_sites=sites)
        rows = []
        for _ in range(100):
            loss = objective.differentiable_loss(*normal_pair(p))
            rows.append(torch.autograd.grad(loss, p)[0])
        rows = torch.stack(rows)
        error = rows.std(0) / 10
        assert ((rows.mean(0) - exact).abs() < 4 * error).all()
        spread[sites] = error
    assert (spread["all"] > 1.1 * spread["discrete"]).all()


def test_all_sites_are_scored_at_detached_draws():
    """The model sees no path: here it has none to give."""
    p = torch.tensor([0.3, -0.5], requires_grad=True)
    seen = []

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        seen.append(z.requires_grad)
        pyro.sample("x", dist.Normal(z.floor(), 1.0), obs=X[0])

    for sites, path in (("discrete", True), ("all", False)):
        objective = TraceScore_ELBO(2, score_sites=sites)
        seen.clear()
        objective.loss_and_grads(model, normal_pair(p)[1])
        assert seen[-1] is path


def test_another_choice_of_sites_is_refused():
    with pytest.raises(ValueError, match="score_sites must be 'discrete' or 'all', got 'none'"):
        TraceScore_ELBO(score_sites="none")


def test_any_distribution_is_taken():
    """Here a Poisson: the mean of the gradient against the sum over counts."""
    p, counts = torch.tensor(0.4, requires_grad=True), torch.arange(60.0)
    log_p = dist.Poisson(3.0).log_prob(counts) + dist.Normal(counts, 2.0).log_prob(X[0])
    q = dist.Poisson(p.exp()).log_prob(counts)
    (exact,) = torch.autograd.grad(-(q.exp() * (log_p - q)).sum(), p)
    copies, leaf = 20_000, p.detach().expand(20_000).clone().requires_grad_()

    def model():
        with pyro.plate("copies", copies):
            n = pyro.sample("n", dist.Poisson(3.0))
            pyro.sample("x", dist.Normal(n, 2.0), obs=X[0])

    def guide():
        with pyro.plate("copies", copies):
            pyro.sample("n", dist.Poisson(leaf.exp()))

    loss = TraceScore_ELBO().differentiable_loss(model, guide)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert abs(gradient.mean() - exact) < 4 * gradient.std() / copies**0.5
