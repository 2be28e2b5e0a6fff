"""Chunks of particles against all particles at once, with the same draws: the same loss, the same
gradient; and the memory of one chunk."""

import random
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_vi_ext import ImportanceWeightedELBO, chunks
from pyro_vi_ext.checkpoint import get_rng_state
from pyro_vi_ext.importance_weighted import Weights

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)
K = 6


# --- draws that can be recorded, and played to a run of all particles ----------------------------


class Noise:
    """The uniform numbers of every draw of the guide.

    :ivar drawn: those of each call so far, particles first.
    :ivar played: those to give out, instead of new ones.
    """

    drawn: list
    played: list

    @classmethod
    def rewind(cls, played=()):
        cls.drawn, cls.played = [], list(played)

    @classmethod
    def take(cls, shape):
        cls.drawn.append(cls.played.pop(0) if cls.played else cls.uniform(shape))
        return cls.drawn[-1]

    uniform = staticmethod(torch.rand)


SOURCES = {
    "torch": torch.rand,
    "numpy": lambda shape: torch.as_tensor(np.random.uniform(size=tuple(shape))),
    "python": lambda shape: torch.tensor([random.random() for _ in range(shape.numel())]).view(
        shape
    ),
}


class NoisyNormal(dist.Normal):
    def rsample(self, sample_shape=()):
        uniform = Noise.take(self._extended_shape(sample_shape))
        return self.loc + self.scale * torch.special.ndtri(uniform)


class NoisyBernoulli(dist.Bernoulli):
    def sample(self, sample_shape=()):
        uniform = Noise.take(self._extended_shape(sample_shape))
        return (uniform < self.logits.detach().sigmoid()).to(uniform)


# --- two layers, a bit between them, a parameter of model and guide alike ------------------------

START = {"shared": 0.4, "loc": 0.3, "scale": 0.8, "logit": 0.2, "slope": 0.7}


def parameters():
    return {name: pyro.param(name, torch.tensor(value)) for name, value in START.items()}


def model():
    shared = pyro.param("shared")
    with pyro.plate("data", 3):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Bernoulli(0.4))
        z2 = pyro.sample("z2", dist.Normal(shared * z1, 0.8))
        pyro.sample("x", dist.Normal(z2 + b * shared, 0.6), obs=X)


def guide():
    p = parameters()
    with pyro.plate("data", 3):
        z1 = pyro.sample("z1", NoisyNormal(p["loc"] * X + p["shared"], p["scale"]))
        b = pyro.sample("b", NoisyBernoulli(logits=p["logit"] + p["slope"] * z1))
        pyro.sample("z2", NoisyNormal(p["slope"] * z1 + 0.5 * b, p["scale"]))


def handled(handler, **options):
    return lambda: tuple(handler(fn, **options) for fn in (model, guide))


PAIRS = {
    "plain": lambda: (model, guide),
    "scaled": handled(poutine.scale, scale=torch.tensor([2.0, 0.5, 3.0])),
    "masked": handled(poutine.mask, mask=torch.tensor([True, False, True])),
}
ESTIMATORS = ["pathwise", "stl", "dreg"]


def objective(gradient="dreg", chunk_size=None, num_particles=K, **options):
    return ImportanceWeightedELBO(num_particles, gradient, chunk_size, **options)


def evaluate(elbo, pair, seed=None):
    """The loss and the gradient, by backward passes; with a seed, after a first call for checks."""
    leaves = list(parameters().values())
    if seed is not None:
        Noise.rewind()
        elbo.loss_and_grads(*pair)
        pyro.set_rng_seed(seed)
        Noise.rewind()
    for leaf in leaves:
        leaf.grad = None
    loss = elbo.loss_and_grads(*pair)
    return torch.tensor(loss), torch.stack([leaf.grad for leaf in leaves])


def chunked_and_whole(gradient, pair, chunk_size):
    """What chunks report, what a run of all particles does with the same draws, and the draws."""
    found = evaluate(objective(gradient, chunk_size), pair, seed=1)
    num_draws = 3 * -(-K // chunk_size)
    first, second = Noise.drawn[:num_draws], Noise.drawn[num_draws:]
    whole = objective(gradient)
    evaluate(whole, pair, seed=1)
    Noise.rewind(torch.cat(first[site::3]) for site in range(3))
    return found, evaluate(whole, pair), (first, second)


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("gradient", ESTIMATORS)
@pytest.mark.parametrize("pair", PAIRS)
def test_chunks_are_the_whole(pair, gradient, chunk_size):
    """VIMCO for the bit, the estimator for the draws of both layers, scales and masks."""
    found, expected, _ = chunked_and_whole(gradient, PAIRS[pair](), chunk_size)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradient", ESTIMATORS)
@pytest.mark.parametrize("pair", PAIRS)
def test_one_after_another_chunks_need_no_record(pair, gradient):
    """Particles are drawn in the same order then: the same seed gives the same draws."""
    whole, parts = (
        evaluate(objective(gradient, size, vectorize_particles=False), PAIRS[pair](), seed=1)
        for size in (None, 4)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [K, K + 1])
@pytest.mark.parametrize("gradient", ESTIMATORS)
def test_one_chunk_of_everything_is_identical(gradient, chunk_size):
    pair = PAIRS["plain"]()
    whole = evaluate(objective(gradient), pair, seed=1)
    found = evaluate(objective(gradient, chunk_size), pair, seed=1)
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


@pytest.mark.parametrize("source", SOURCES)
def test_the_second_pass_draws_what_the_first_drew(source, monkeypatch):
    monkeypatch.setattr(Noise, "uniform", staticmethod(SOURCES[source]))
    found, expected, (first, second) = chunked_and_whole("dreg", PAIRS["plain"](), 4)
    assert len(first) == len(second)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def subsampled_model():
    with pyro.plate("data", 3, subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(pyro.param("shared"), 1.0))
        pyro.sample("x", dist.Normal(z, 0.6), obs=X[index])


def subsampled_guide():
    p = parameters()
    with pyro.plate("data", 3, subsample_size=2) as index:
        pyro.sample("z", NoisyNormal(p["loc"] * X[index], p["scale"]))


def test_chunks_share_their_minibatch():
    """One by one, K chunks: every particle sees the data that the first saw."""
    pair = (subsampled_model, subsampled_guide)
    leaves = [parameters()[name] for name in ("shared", "loc", "scale")]
    results = []
    for size in (None, 1):
        elbo = objective("dreg", size, vectorize_particles=False)
        Noise.rewind()
        elbo.loss(*pair)
        pyro.set_rng_seed(2)
        loss = elbo.differentiable_loss(*pair)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


# Planted faults: each is seen.


def error(gradient="dreg"):
    found, expected, _ = chunked_and_whole(gradient, PAIRS["plain"](), 4)
    return (found[1] - expected[1]).abs().max().item()


def test_other_draws_in_the_second_pass_are_rejected(monkeypatch):
    assert error() < 1e-10
    monkeypatch.setattr(chunks, "set_rng_state", lambda state: None)
    assert error() > 1e-3


def test_weights_normalised_within_a_chunk_are_rejected(monkeypatch):
    def within(self, start, stop):
        part = self.normalised[start:stop]
        return replace(self, normalised=part / part.sum(0), signal=self.signal[start:stop])

    monkeypatch.setattr(Weights, "slice", within)
    for gradient in ESTIMATORS:
        assert error(gradient) > 1e-3


# --- as a tensor ---------------------------------------------------------------------------------


def differentiable(elbo, pair, seed):
    pyro.set_rng_seed(seed)
    return elbo.differentiable_loss(*pair)


@pytest.mark.parametrize("gradient", ESTIMATORS)
def test_a_loss_used_twice(gradient):
    """d(3 L + L^2 + |theta|^2) = (3 + 2 L) dL + 2 theta."""
    pair, elbo = PAIRS["plain"](), objective(gradient, 4)
    loss, grad = evaluate(elbo, pair, seed=3)
    theta = torch.stack(list(parameters().values()))
    again = differentiable(elbo, pair, 3)
    torch.testing.assert_close(again.detach(), loss)
    total = 3 * again + again**2 + (theta**2).sum()
    found = torch.autograd.grad(total, list(parameters().values()))
    expected = (3 + 2 * loss) * grad + 2 * theta
    torch.testing.assert_close(torch.stack(found), expected.detach(), rtol=1e-10, atol=1e-10)


def test_two_losses_in_one_backward_pass():
    pair, elbo = PAIRS["plain"](), objective("dreg", 4)
    grads = [evaluate(elbo, pair, seed)[1] for seed in (3, 4)]
    first, second = (differentiable(elbo, pair, seed) for seed in (3, 4))
    found = torch.autograd.grad(first - 2 * second, list(parameters().values()))
    expected = grads[0] - 2 * grads[1]
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-10, atol=1e-10)


def test_two_backward_passes_through_one_loss():
    pair, elbo = PAIRS["plain"](), objective("dreg", 4)
    _, grad = evaluate(elbo, pair, seed=3)
    loss, leaves = differentiable(elbo, pair, 3), list(parameters().values())
    for _ in range(2):
        found = torch.stack(torch.autograd.grad(loss, leaves, retain_graph=True))
        torch.testing.assert_close(found, grad, rtol=1e-10, atol=1e-10)


# --- random state --------------------------------------------------------------------------------


def flat(state):
    """The states of torch, Python and NumPy as one list that can be compared."""
    (_, keys, *rest), (_, words, _) = state["numpy"], state["python"]
    return [state["torch"].tolist(), words.tolist(), keys.tolist(), rest]


@pytest.mark.parametrize("source", SOURCES)
def test_the_random_state_after_a_call_is_that_of_one_pass(source, monkeypatch):
    """As after a call without gradients, whatever is drawn again for the second pass."""
    monkeypatch.setattr(Noise, "uniform", staticmethod(SOURCES[source]))
    pair, elbo = PAIRS["plain"](), objective("dreg", 4)
    evaluate(elbo, pair, seed=5)
    states = []
    for call in (
        lambda: elbo.loss(*pair),
        lambda: elbo.loss_and_grads(*pair),
        lambda: elbo.differentiable_loss(*pair).backward(),
    ):
        pyro.set_rng_seed(5)
        before = flat(get_rng_state())
        call()
        states.append(flat(get_rng_state()))
        assert states[-1] != before
    assert states[0] == states[1] == states[2]


# --- memory --------------------------------------------------------------------------------------


class Saved:
    """One tensor kept for a backward pass, counted while it is alive."""

    live = peak = 0

    def __init__(self, tensor):
        self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
        Saved.live += self.size
        Saved.peak = max(Saved.peak, Saved.live)

    def __del__(self):
        Saved.live -= self.size


def saved_bytes(call):
    """The most bytes that autograd keeps at any time during a call."""
    Noise.rewind()
    Saved.live = Saved.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        call()
    return Saved.peak


@pytest.mark.parametrize("gradient", ESTIMATORS)
def test_memory_is_that_of_one_chunk(gradient):
    pair = PAIRS["plain"]()

    def backward(num_particles, chunk_size):
        elbo = objective(gradient, chunk_size, num_particles)
        elbo.loss(*pair)
        return saved_bytes(lambda: elbo.loss_and_grads(*pair))

    small, large, whole = backward(8, 4), backward(500, 4), backward(500, None)
    assert 0 < small == large
    assert whole > 100 * large


@pytest.mark.parametrize("gradient", ESTIMATORS)
def test_a_loss_that_waits_for_its_backward_pass_keeps_no_particles(gradient):
    pair, elbo = PAIRS["plain"](), objective(gradient, 4, 100)
    elbo.loss(*pair)
    kept = []
    whole = saved_bytes(
        lambda: kept.append(objective(gradient, None, 100)._evaluate(*pair, (), {}))
    )
    parts = saved_bytes(lambda: kept.append(elbo.differentiable_loss(*pair)))
    assert whole > 100 * 8 * 3 > 5 * parts
