"""The enumerated ELBO and its gradient, against sums written out."""

import itertools

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_vi_ext.enumeration import enumerated_elbo
from pyro_vi_ext.tracing import SharedSubsample

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)


@pytest.fixture
def logits():
    return torch.tensor([0.3, -0.2], requires_grad=True)


def chain_model(x=X[0]):
    top = pyro.sample("top", dist.Bernoulli(torch.tensor([0.4, 0.6])).to_event(1))
    c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    pyro.sample("x", dist.Normal(top.sum(-1) * (c + 1.0), 1.0), obs=x)


def chain_guide(logits):
    def guide(x=X[0]):
        top = pyro.sample("top", dist.Bernoulli(logits=logits).to_event(1))
        rows = torch.stack([top[..., 0], logits[1] * top[..., 1], 0.5 + 0 * top[..., 0]], -1)
        pyro.sample("c", dist.Categorical(logits=rows))

    return guide


def by_hand(logits):
    total = 0.0
    for bits in itertools.product([0.0, 1.0], repeat=2):
        top = torch.tensor(bits)
        rows = torch.stack([top[0], logits[1] * top[1], torch.tensor(0.5)])
        for c in range(3):
            log_q = dist.Bernoulli(logits=logits).log_prob(top).sum() + rows.log_softmax(0)[c]
            log_p = dist.Bernoulli(torch.tensor([0.4, 0.6])).log_prob(top).sum()
            log_p = log_p + torch.tensor([0.2, 0.5, 0.3]).log()[c]
            log_p = log_p + dist.Normal(top.sum() * (c + 1.0), 1.0).log_prob(X[0])
            total = total + log_q.exp() * (log_p - log_q)
    return total


def test_all_joint_values_of_a_chain(logits):
    ours, exact = enumerated_elbo(chain_model, chain_guide(logits)), by_hand(logits)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (ours, exact)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def mixture(x, batch=None):
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        b = pyro.sample("b", dist.OneHotCategorical(torch.tensor([0.2, 0.5, 0.3])))
        loc = (b * torch.tensor([-1.0, 0.0, 1.0])).sum(-1)
        with pyro.plate("pair", 2):
            a = pyro.sample("a", dist.Bernoulli(0.3))
            both = torch.stack([x[index], x[index] + 1.0])
            pyro.sample("x", dist.Normal(loc + a, 0.5), obs=both)


def mixture_guide(weights):
    def guide(x, batch=None):
        with pyro.plate("data", len(x), subsample_size=batch) as index:
            pyro.sample("b", dist.OneHotCategorical(logits=weights[:3] * x[index].unsqueeze(-1)))
            with pyro.plate("pair", 2):
                pyro.sample("a", dist.Bernoulli(logits=weights[3] * x[index]))

    return guide


@pytest.mark.parametrize("scale", [None, 0.3])
def test_units_are_enumerated_side_by_side(scale):
    weights = torch.tensor([0.1, -0.4, 0.6, 0.9], requires_grad=True)
    model, guide = mixture, mixture_guide(weights)

    def summed(x):
        ours = 0.0
        for one in x:
            ours = ours + enumerated_elbo(mixture, guide, (one.reshape(1),))
        return ours

    together = enumerated_elbo(model, guide, (X,), max_states=12)  # 3 x 2^2 for each datum
    torch.testing.assert_close(together, summed(X), rtol=1e-12, atol=0)
    if scale is not None:
        scaled = enumerated_elbo(poutine.scale(model, scale), poutine.scale(guide, scale), (X,))
        torch.testing.assert_close(scaled, scale * together, rtol=1e-12, atol=0)
    assert enumerated_elbo(model, guide, (X,), max_states=11) is None


def test_against_pyros_enumeration():
    weights = torch.tensor([0.1, -0.4, 0.6, 0.9], requires_grad=True)
    guide = mixture_guide(weights)
    ours = enumerated_elbo(mixture, guide, (X,))
    stock = TraceEnum_ELBO(max_plate_nesting=2).differentiable_loss(
        mixture, config_enumerate(guide, expand=True), X
    )
    torch.testing.assert_close(ours, -stock, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(value, weights)[0] for value in (ours, -stock)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


def test_a_minibatch_that_is_fixed():
    weights = torch.tensor([0.1, -0.4, 0.6, 0.9], requires_grad=True)
    guide, subsample = mixture_guide(weights), SharedSubsample()
    first, again = (
        enumerated_elbo(mixture, guide, (X, 2), subsample=subsample).item() for _ in range(2)
    )
    rows = X[subsample.indices["data"]]
    expected = 1.5 * enumerated_elbo(mixture, guide, (rows,)).item()
    assert first == again == pytest.approx(expected, rel=1e-12)


def test_a_masked_draw_counts_once(logits):
    def model():
        with poutine.mask(mask=torch.tensor(False)):
            b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(b, 1.0), obs=X[0])

    def guide():
        with poutine.mask(mask=torch.tensor(False)):
            pyro.sample("b", dist.Bernoulli(logits=logits[0]))

    p = logits[0].sigmoid()
    exact = sum(
        weight * dist.Normal(b, 1.0).log_prob(X[0]) for b, weight in ((0.0, 1 - p), (1.0, p))
    )
    torch.testing.assert_close(enumerated_elbo(model, guide), exact, rtol=1e-12, atol=0)


def test_a_continuous_draw_cannot_be_enumerated(logits):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Bernoulli(logits=z))

    def guide():
        pyro.sample("z", dist.Normal(logits[0], 1.0))
        pyro.sample("b", dist.Bernoulli(logits=logits[1]))

    assert enumerated_elbo(model, guide) is None


def test_the_random_state_stays_as_it_was(logits):
    state = torch.get_rng_state()
    enumerated_elbo(chain_model, chain_guide(logits))
    assert torch.equal(torch.get_rng_state(), state)
