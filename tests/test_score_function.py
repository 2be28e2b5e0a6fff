"""Score-function gradients against enumeration: the mean over every possible draw, exactly.

All K-tuples of draws are elements of one plate, each with its probability as its scale. The scale
stands outside the logarithm, so that one call returns the expectation of the estimator.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_vi_ext import ImportanceWeightedELBO, importance_weighted
from pyro_vi_ext.importance_weighted import Weights
from pyro_vi_ext.score_function import learning_signal, score_terms
from pyro_vi_ext.scoring import Term

pytestmark = pytest.mark.usefixtures("float64")

START = {"a": 0.3, "b": -0.5, "c": 0.8, "shared": 0.4}
BITS = ("b1", "b2", "b3")


def parameters():
    return {name: pyro.param(name, torch.tensor(value)) for name, value in START.items()}


def distributions(p, bits):
    """q of each bit, given those before it; a parameter of the model is among its parameters."""
    b1, b2, _ = bits
    return {
        "b1": torch.sigmoid(p["a"]).expand(b1.shape),
        "b2": torch.sigmoid(p["b"] + p["c"] * b1),
        "b3": torch.sigmoid(p["shared"] + p["a"] * b1 - p["c"] * b2),
    }


def priors(p, bits):
    """p of each bit, and of x = 0.6."""
    b1, b2, b3 = bits
    return {
        "b1": dist.Bernoulli(0.3 * torch.ones_like(b1)),
        "b2": dist.Bernoulli(0.4 + 0.3 * b1),
        "b3": dist.Bernoulli(0.2 + 0.5 * b2),
        "x": dist.Normal(b1 + p["shared"] * b2 - b3, 0.7),
    }


def forced(values):
    """A Bernoulli whose draws are given: shape (K, tuples)."""

    class Forced(dist.Bernoulli):
        def sample(self, sample_shape=()):
            shape = self._extended_shape(sample_shape)
            return values if values.shape == shape else values[0]

    return Forced


class Enumeration:
    """Every K-tuple of three bits: a pair whose draws they are, and the exact bound."""

    def __init__(self, num_particles):
        singles = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
        tuples = itertools.product(range(8), repeat=num_particles)
        index = torch.tensor(list(tuples)).T  # (K, tuples)
        self.bits = [singles[index][..., i] for i in range(3)]
        self.num_particles = num_particles
        _, log_q = self.log_densities(parameters())
        self.probability = log_q.sum(0).exp().detach()

    def log_densities(self, p):
        """log p(x, bits) and log q(bits), each of shape (K, tuples)."""
        values = dict(zip(BITS, self.bits, strict=True))
        log_p = sum(
            fn.log_prob(values.get(name, torch.tensor(0.6)))
            for name, fn in priors(p, self.bits).items()
        )
        guide = distributions(p, self.bits)
        return log_p, sum(dist.Bernoulli(guide[name]).log_prob(values[name]) for name in BITS)

    def model(self):
        p = parameters()
        tuples = pyro.plate("tuples", len(self.probability))
        with tuples, poutine.scale(scale=self.probability):
            bits = []
            for name in BITS:
                zeros = [torch.zeros(())] * (3 - len(bits))
                bits.append(pyro.sample(name, priors(p, bits + zeros)[name]))
            pyro.sample("x", priors(p, bits)["x"], obs=torch.tensor(0.6))

    def guide(self):
        p = parameters()
        tuples = pyro.plate("tuples", len(self.probability))
        with tuples, poutine.scale(scale=self.probability):
            bits = []
            for name, values in zip(BITS, self.bits, strict=True):
                zeros = [torch.zeros(())] * (3 - len(bits))
                probs = distributions(p, bits + zeros)[name]
                bits.append(pyro.sample(name, forced(values)(probs)))

    def exact(self):
        """The loss and its gradient: -sum over tuples of q(tuple) log (mean of the weights)."""
        p = parameters()
        log_p, log_q = self.log_densities(p)
        bound = torch.logsumexp(log_p - log_q, 0) - math.log(self.num_particles)
        loss = -(log_q.sum(0).exp() * bound).sum()
        return loss.detach(), torch.stack(torch.autograd.grad(loss, list(p.values())))

    def expected(self, **options):
        """The expectation of what the objective reports."""
        objective = ImportanceWeightedELBO(self.num_particles, **options)
        loss = objective.differentiable_loss(self.model, self.guide)
        grads = torch.autograd.grad(loss, list(parameters().values()))
        return loss.detach(), torch.stack(grads)

    def error(self, **options):
        return (self.expected(**options)[1] - self.exact()[1]).abs().max().item()


@pytest.mark.parametrize("gradient", ["pathwise", "stl", "dreg"])
@pytest.mark.parametrize("num_particles", [1, 2, 3])
def test_expectation_is_the_exact_gradient(num_particles, gradient):
    tuples = Enumeration(num_particles)
    found, exact = tuples.expected(gradient=gradient), tuples.exact()
    torch.testing.assert_close(tuples.probability.sum(), torch.tensor(1.0))
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


# Planted faults: each is seen.


def test_a_baseline_that_sees_its_own_draw_is_rejected(monkeypatch):
    """The mean of all log-weights in place of the mean of the others."""
    of = Weights.of

    def biased(log_w):
        weights, log_w = of(log_w), log_w.detach()
        everyone = log_w.mean(0, keepdim=True).expand_as(log_w)
        rest = [torch.cat([log_w[:k], everyone[:1], log_w[k + 1 :]]) for k in range(len(log_w))]
        without = torch.stack([torch.logsumexp(row, 0) for row in rest]) - math.log(len(log_w))
        return Weights(weights.bound, weights.normalised, weights.bound - without)

    for num_particles in (2, 3):
        assert Enumeration(num_particles).error() < 1e-11
    monkeypatch.setattr(Weights, "of", staticmethod(biased))
    for num_particles in (2, 3):
        assert Enumeration(num_particles).error() > 1e-3


def test_without_scores_the_gradient_is_rejected(monkeypatch):
    monkeypatch.setattr(importance_weighted, "score_terms", lambda trace: [])
    assert Enumeration(2).error() > 0.01
    monkeypatch.setattr(importance_weighted, "score_bound", lambda *args: 0.0)
    assert Enumeration(1).error() > 0.01


def test_a_missing_site_is_rejected(monkeypatch):
    monkeypatch.setattr(importance_weighted, "score_terms", lambda trace: score_terms(trace)[:2])
    assert Enumeration(2).error() > 1e-3


# --- the parts -----------------------------------------------------------------------------------


def test_score_terms_are_learned_draws_without_a_path():
    def guide():
        p = pyro.param("p", torch.tensor(0.3))
        z = pyro.sample("z", dist.Normal(p, 1.0))
        pyro.sample("fixed", dist.Bernoulli(0.5))
        pyro.sample("point", dist.Delta(p))
        with poutine.mask(mask=torch.tensor(False)):
            pyro.sample("masked", dist.Bernoulli(p))
        pyro.sample("given", dist.Bernoulli(logits=z))

    trace = poutine.trace(guide).get_trace()
    terms = score_terms(trace)
    assert [term.name for term in terms] == ["masked", "given"]
    for term in terms:
        site = trace.nodes[term.name]
        fn = getattr(site["fn"], "base_dist", site["fn"])
        torch.testing.assert_close(term.log_prob, fn.log_prob(site["value"]))


def test_learning_signal_is_what_a_site_can_influence():
    """Terms are summed over the plates that the site is not in, and scaled."""
    frames = {}
    for name, size, dim in (("rows", 4, -2), ("columns", 3, -1)):
        with pyro.plate(name, size, dim=dim), poutine.trace() as tracer:
            pyro.sample("z", dist.Normal(0.0, 1.0))
        (frames[name],) = tracer.trace.nodes["z"]["cond_indep_stack"]
    table, column = torch.randn(4, 3), torch.randn(3)
    terms = [
        Term("x", table, 2.0, frames, +1),
        Term("z", column, 5.0, {"columns": frames["columns"]}, -1),
    ]
    by_hand = {
        (): 2 * table.sum() - 5 * column.sum(),
        ("columns",): 2 * table.sum(0) - 5 * column,
        ("rows", "columns"): 2 * table - 5 * column,
    }
    for plates, expected in by_hand.items():
        signal = learning_signal(terms, {name: frames[name] for name in plates}).detach()
        torch.testing.assert_close(signal.squeeze(), expected)
