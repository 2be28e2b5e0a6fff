"""Antithetic pairs: their joint law, exact means and variances of ARM and DisARM, and refusals."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vi_ext import TraceARM_ELBO, TraceDisARM_ELBO, TraceScore_ELBO, antithetic

pytestmark = pytest.mark.usefixtures("float64")

N = 20_000
X = 0.9
PAIRS = {"arm": TraceARM_ELBO, "disarm": TraceDisARM_ELBO}
both = pytest.mark.parametrize("name", PAIRS)


def gain(logit):
    """f(1) - f(0) of one bit with prior 0.3, and x ~ N(b, 0.7)."""
    at = torch.tensor([0.0, 1.0])
    log_p = dist.Bernoulli(0.3).log_prob(at) + dist.Normal(at, 0.7).log_prob(torch.tensor(X))
    f = log_p - dist.Bernoulli(logits=torch.tensor(logit)).log_prob(at)
    return (f[1] - f[0]).item()


def pair(logits):
    """One bit for each logit."""
    plate = pyro.plate("copies", logits.shape[-1])

    def model():
        with plate:
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(b, 0.7), obs=torch.full(logits.shape, X))

    def guide():
        with plate:
            pyro.sample("b", dist.Bernoulli(logits=logits))

    return model, guide


def gradients(cls, logit, num_particles=1):
    """Independent estimates of the gradient of the bound for one logit."""
    logits = torch.full((N,), logit, requires_grad=True)
    loss = cls(num_particles).differentiable_loss(*pair(logits))
    return -torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("logit", [-2.0, 0.0, 0.7])
def test_disarm_has_two_values(logit):
    """g = (f(1) - f(0)) sigma(|l|) / 2 where b and b~ differ: with probability 2 min(p, 1 - p)."""
    p = torch.tensor(logit).sigmoid().item()
    size = 0.5 * gain(logit) * max(p, 1 - p)
    g = gradients(TraceDisARM_ELBO, logit)
    hit = g != 0
    torch.testing.assert_close(g[hit], torch.full((int(hit.sum()),), size))
    rate = 2 * min(p, 1 - p)
    assert abs(hit.double().mean() - rate) <= 4 * (rate * (1 - rate) / N) ** 0.5


def second_moments(logit):
    """Of ARM and DisARM, for one bit."""
    p = torch.tensor(logit).sigmoid().item()
    m = min(p, 1 - p)
    arm = gain(logit) ** 2 * 2 * (0.125 - (0.5 - m) ** 3) / 3
    disarm = (0.5 * gain(logit) * (1 - m)) ** 2 * 2 * m
    return {"arm": arm, "disarm": disarm}


@both
@pytest.mark.parametrize("logit", [-2.0, 0.3])
def test_mean_and_variance_are_those_in_closed_form(name, logit):
    p = torch.tensor(logit).sigmoid().item()
    g = gradients(PAIRS[name], logit)
    assert abs(g.mean() - gain(logit) * p * (1 - p)) < 4 * g.std() / N**0.5
    square = g.square()
    assert abs(square.mean() - second_moments(logit)[name]) < 4 * square.std() / N**0.5


def test_disarm_varies_less_than_arm_and_arm_less_than_score():
    for logit in (-4.0, -2.0, 0.0, 0.3, 1.0, 5.0):
        moments = second_moments(logit)
        assert moments["disarm"] < moments["arm"]
    ladder = (TraceDisARM_ELBO, TraceARM_ELBO, TraceScore_ELBO)
    variances = [gradients(cls, 0.3).var() for cls in ladder]
    assert variances[0] < 0.8 * variances[1] and variances[1] < 0.8 * variances[2]


def test_disarm_is_the_mean_of_arm_given_the_pair(monkeypatch):
    """At the same b and b~, by averaging over u: the Rao-Blackwell step."""
    seen = []

    def record(difference, logits, b, other, u):
        seen.append((difference, logits.detach(), b, other, u))
        return torch.zeros_like(b)

    monkeypatch.setattr(TraceARM_ELBO, "_weigh", staticmethod(record))
    gradients(TraceARM_ELBO, 0.7)
    (arguments,) = seen
    monkeypatch.undo()
    arm, disarm = TraceARM_ELBO._weigh(*arguments), TraceDisARM_ELBO._weigh(*arguments)
    b, other, u = arguments[2:]
    p = torch.tensor(0.7).sigmoid()
    assert torch.equal(b, (u < p).double()) and torch.equal(other, (1 - u < p).double())
    for states in itertools.product([0.0, 1.0], repeat=2):
        here = (b == states[0]) & (other == states[1])
        if here.any() and states[0] != states[1]:
            error = arm[here].std() / here.sum() ** 0.5
            assert abs(arm[here].mean() - disarm[here][0]) < 4 * error
            assert disarm[here].std() < 1e-12
        elif here.any():
            assert (arm[here] == 0).all() and (disarm[here] == 0).all()


@both
def test_num_particles_counts_pairs(name):
    one, ten = (gradients(PAIRS[name], 0.3, num).var() for num in (1, 10))
    assert 0.8 < one / (10 * ten) < 1.25


@both
@pytest.mark.parametrize("size", [-800.0, -40.0, 40.0, 800.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_logits_give_no_gradient(name, size, dtype):
    torch.set_default_dtype(dtype)
    logits = torch.full((10,), size, requires_grad=True)
    objective = PAIRS[name](2)
    (gradient,) = torch.autograd.grad(objective.differentiable_loss(*pair(logits)), logits)
    assert torch.equal(gradient, torch.zeros(10))


def test_both_draws_of_a_pair_see_the_same_subsample():
    logits, seen = torch.zeros(6, requires_grad=True), []

    def model():
        with pyro.plate("data", 6, subsample_size=2) as index:
            seen.append(index)
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(b, 1.0), obs=index / 6.0)

    def guide():
        with pyro.plate("data", 6, subsample_size=2) as index:
            pyro.sample("b", dist.Bernoulli(logits=logits[index]))

    objective = TraceDisARM_ELBO()
    objective.loss(model, guide)
    for _ in range(5):
        seen.clear()
        objective.loss_and_grads(model, guide)
        assert len(seen) == 2 and torch.equal(*seen)


@both
@pytest.mark.parametrize(
    "make, label",
    [
        (lambda p: dist.OneHotCategorical(logits=p), "OneHotCategorical"),
        (lambda p: dist.Categorical(logits=p), "Categorical"),
        (lambda p: dist.Poisson(p[0].exp()), "Poisson"),
        (lambda p: dist.Binomial(3, logits=p[0]), "Binomial"),
    ],
)
def test_other_distributions_are_refused_by_name(name, make, label):
    p = torch.zeros(3, requires_grad=True)

    def model():
        pyro.sample("k", make(torch.zeros(3)))

    def guide():
        pyro.sample("k", make(p))

    objective = PAIRS[name]()
    message = f"site 'k' is a {label}, and Trace(Dis)?ARM_ELBO takes Bernoulli.*TraceRLOO_ELBO"
    with pytest.raises(NotImplementedError, match=message):
        objective.loss_and_grads(model, guide)
    objective.loss(model, guide)  # needs no gradient


def test_a_distribution_made_of_a_bernoulli_is_refused():
    """Its draws do not have the Bernoulli's probabilities."""
    p = torch.tensor(0.2, requires_grad=True)

    def fn(logits):
        return dist.ZeroInflatedDistribution(dist.Bernoulli(logits=logits), gate=torch.tensor(0.3))

    def model():
        pyro.sample("b", fn(torch.tensor(0.0)))

    def guide():
        pyro.sample("b", fn(p))

    with pytest.raises(NotImplementedError, match="site 'b' is a ZeroInflatedDistribution"):
        TraceDisARM_ELBO().loss_and_grads(model, guide)


@both
def test_an_own_u_for_each_draw_is_rejected(name, monkeypatch):
    """b~ drawn independently of b: the check of the mean sees it."""
    rand = torch.rand_like
    of = antithetic._Antithetic._gradient

    def unpaired(self, site):
        site.value = torch.where(rand(site.value) < 0.5, site.value, 1 - site.value)
        return of(self, site)

    monkeypatch.setattr(antithetic._Antithetic, "_gradient", unpaired)
    g = gradients(PAIRS[name], 0.3)
    p = torch.tensor(0.3).sigmoid().item()
    assert abs(g.mean() - gain(0.3) * p * (1 - p)) > 8 * g.std() / N**0.5
