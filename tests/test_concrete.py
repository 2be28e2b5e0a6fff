"""Concrete relaxations: densities, the relaxed bound, its gradient, extremes, and refusals."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import RelaxedBernoulli, RelaxedOneHotCategorical

from pyro_vi_ext import TraceConcrete_ELBO, gradient_report
from pyro_vi_ext.checkpoint import load_checkpoint
from pyro_vi_ext.concrete import Concrete, _Drawn
from pyro_vi_ext.relaxations import BERNOULLI, ONE_HOT

from .enumerating import KINDS, Problem, log_normal
from .resuming import STEPS, adam, check_resumed, svi, with_svi
from .test_rebar import X, bits

pytestmark = pytest.mark.usefixtures("float64")


# --- densities -----------------------------------------------------------------------------------


def concrete(relaxation, logits, temperature, event_dim=0):
    drawn = _Drawn()
    return Concrete(relaxation, logits, event_dim, temperature, drawn, False), drawn


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_density_of_a_relaxed_bit_is_torchs(temperature):
    logits = torch.linspace(-2, 2, 5)
    law, _ = concrete(BERNOULLI, logits, temperature)
    v = law.rsample((1000,))
    stock = RelaxedBernoulli(torch.tensor(temperature), logits=logits)
    jacobian = v.log() + (-v).log1p()  # of v by y
    expected, inner = stock.log_prob(v) + jacobian, (v - 0.5).abs() < 0.5 - 1e-6  # torch rounds 1-v
    torch.testing.assert_close(law.log_prob(v)[inner], expected[inner], rtol=1e-8, atol=1e-8)
    event, _ = concrete(BERNOULLI, logits, temperature, 1)
    rows = inner.all(-1)
    other = v[rows]  # not values it has drawn
    torch.testing.assert_close(event.log_prob(other), expected[rows].sum(-1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_density_of_relaxed_categories_is_torchs(temperature):
    logits = torch.tensor([[0.3, -1.0, 0.8], [2.0, 0.0, -2.0]]).log_softmax(-1)
    law, _ = concrete(ONE_HOT, logits, temperature, 1)
    v = law.rsample((1000,))
    stock = RelaxedOneHotCategorical(torch.tensor(temperature), logits=logits, validate_args=False)
    expected = stock.log_prob(v) + v.log().sum(-1)
    for value in (v, v.clone()):
        torch.testing.assert_close(law.log_prob(value), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_densities_of_y_integrate_to_one(temperature):
    law, drawn = concrete(BERNOULLI, torch.tensor(0.7), temperature)
    y = torch.linspace(-80, 80, 4001) / temperature
    drawn.add(v := y.sigmoid(), y)
    assert torch.trapezoid(law.log_prob(v).exp(), y).item() == pytest.approx(1, abs=1e-9)
    law, drawn = concrete(ONE_HOT, torch.tensor([0.2, 0.5, 0.3]).log(), temperature, 1)
    side = torch.linspace(-45, 45, 601) / temperature  # log v_1 / v_3 and log v_2 / v_3
    u = torch.cartesian_prod(side, side)
    y = torch.cat([u, torch.zeros(len(u), 1)], -1).log_softmax(-1)
    drawn.add(v := y.exp(), y)
    total = law.log_prob(v).exp().sum() * (side[1] - side[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-6)


# --- the relaxed bound ---------------------------------------------------------------------------


def relaxed_loss(logit, temperature, prior):
    """Of one bit of ``bits``, by quadrature over the noise."""
    noise = torch.linspace(-40, 40, 20_001)
    y = (logit + noise) / temperature

    def log_density(logit, temperature):  # of y
        t = logit - temperature * y
        return math.log(temperature) + t + 2 * F.logsigmoid(-t)

    bound = dist.Normal(y.sigmoid(), 0.5).log_prob(torch.tensor(X))
    bound = bound + log_density(math.log(0.3 / 0.7), prior) - log_density(logit, temperature)
    return -torch.trapezoid(noise.sigmoid() * (-noise).sigmoid() * bound, noise)


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("prior", [None, 0.9])
def test_loss_and_gradient_are_those_of_the_relaxed_model(prior, vectorized):
    """Each within 4 standard errors of quadrature."""
    num, temperature = 20_000, 0.6
    logits = torch.full((num,), 0.4, requires_grad=True)
    objective = TraceConcrete_ELBO(
        temperature, 2, prior_temperature=prior, vectorize_particles=vectorized
    )
    losses = [objective.differentiable_loss(*bits(logits)) for _ in range(10)]
    found = torch.autograd.grad(losses[-1], logits)[0]
    leaf = torch.tensor(0.4, requires_grad=True)
    exact = relaxed_loss(leaf, temperature, temperature if prior is None else prior)
    (slope,) = torch.autograd.grad(exact, leaf)
    assert abs(found.mean() - slope) < 4 * found.std() / num**0.5
    means = torch.stack(losses).detach() / num
    assert abs(means.mean() - exact) < 4 * means.std() / 10**0.5
    wrong = relaxed_loss(torch.tensor(0.4), temperature, 1.3).item()  # of another prior: rejected
    assert abs(means.mean() - wrong) > 6 * means.std() / 10**0.5


def law_of(kind, logits, temperature):
    temperature = torch.tensor(temperature)
    if kind == "one hot":
        return RelaxedOneHotCategorical(temperature, logits=logits, validate_args=False)
    return torch.distributions.Independent(RelaxedBernoulli(temperature, logits=logits), 1)


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("kind", ["scalar", "event", "one hot"])
@pytest.mark.parametrize("pooled", [True, False])
def test_loss_by_hand_from_recorded_draws(kind, vectorized, pooled):
    """Masked, scaled, subsampled sites, a chain, beside draws with a path, with torch's laws."""
    problem, traces = Problem(kind, 2, pooled, copies=4), []
    p = problem.leaves(4, 1)
    model, guide = problem.pair(p)

    def recorded():
        nodes = poutine.trace(guide).get_trace().nodes
        traces.append({name: nodes[name]["value"] for name in ("z0", "z1", "b0", "b1")})

    objective = TraceConcrete_ELBO(0.8, 3, prior_temperature=1.1, vectorize_particles=vectorized)
    objective.differentiable_loss(model, recorded)
    traces.clear()
    problem.seen.clear()
    loss = objective.differentiable_loss(model, recorded)
    index, total = problem.seen[0], 0.0
    weight = problem.mask[index] * (4 / 3)
    for values in traces[-1:] if vectorized else traces[-3:]:
        z0, z1 = values["z0"], values["z1"]
        vectors = [values[f"b{k}"] for k in range(2)]
        vectors = [v.unsqueeze(-1) if kind == "scalar" else v for v in vectors]
        bound = log_normal(z0, 0.0, 1.0) - log_normal(z0, *problem.z0(p))
        terms = log_normal(z1, *problem.z1_prior(vectors))
        terms = terms - log_normal(z1, *problem.z1(p, vectors, z0))
        mean = problem.mean_of_x(p, vectors, z0, z1)
        terms = terms + problem.has_data[index] * log_normal(problem.x[index], mean, 0.7)
        for layer, v in enumerate(vectors):
            is_pooled = pooled and layer == 0
            x = 0.0 if is_pooled else problem.x[index]
            logits = problem.guide_logits(layer, p, vectors[0] if layer else None, z0, x)
            below = vectors[1] if layer == 0 and not pooled else None
            prior = law_of(kind, problem.prior_logits(layer, p, below), 1.1)
            ratio = prior.log_prob(v) - law_of(kind, logits, 0.8).log_prob(v)
            if is_pooled:
                bound = bound + ratio
            else:
                terms = terms + ratio
        total = total - (bound.sum() + (terms * weight).sum()) / 3
    assert loss.item() == pytest.approx(total.item(), rel=1e-8)


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("kind", ["scalar", "event", "one hot"])
def test_gradient_is_that_of_the_loss_at_common_noise(kind, vectorized):
    """By finite differences, for parameters of guide and model."""
    problem = Problem(kind, 2, copies=2)
    objective = TraceConcrete_ELBO(0.7, 2, vectorize_particles=vectorized)

    def evaluate(values):
        p = values.clone().requires_grad_()
        pair = problem.pair(p)
        objective._structures.clear()
        pyro.set_rng_seed(7)
        return objective.differentiable_loss(*pair), p

    start, step = problem.leaves().detach(), 1e-6
    loss, p = evaluate(start)
    (found,) = torch.autograd.grad(loss, p)
    rows = step * torch.eye(len(start))
    by_difference = [(evaluate(start + h)[0] - evaluate(start - h)[0]) / (2 * step) for h in rows]
    torch.testing.assert_close(found, torch.stack(by_difference).detach(), rtol=1e-5, atol=1e-6)
    assert (found.abs() > 1e-6).all()


# --- extremes ------------------------------------------------------------------------------------


def single_and_double(relaxation, logits, temperature, monkeypatch):
    """Draws in single precision, their log-densities, and the latter in double precision."""
    torch.set_default_dtype(torch.float32)
    law, drawn = concrete(relaxation, logits.float(), temperature, relaxation.event_dim)
    noise = relaxation.noise(law.logits)
    monkeypatch.setattr(type(relaxation), "noise", lambda self, logits: noise.to(logits.dtype))
    v, exact = law.rsample(), concrete(relaxation, logits, temperature, relaxation.event_dim)[0]
    return v, law.log_prob(v), exact.log_prob(exact.rsample()).float()


@pytest.mark.parametrize("size", [-40.0, 40.0])
def test_densities_in_single_precision(size, monkeypatch):
    """Stock ones are NaN (one-hot), or, cut off, the same for all draws."""
    logits = torch.tensor([size, 0.0, -size]).log_softmax(-1).expand(500, 3)
    cases = {
        dist.RelaxedBernoulli: (BERNOULLI, torch.full((500,), size)),
        dist.RelaxedBernoulliStraightThrough: (BERNOULLI, torch.full((500,), size)),
        dist.RelaxedOneHotCategorical: (ONE_HOT, logits),
        dist.RelaxedOneHotCategoricalStraightThrough: (ONE_HOT, logits),
    }
    for cls, (relaxation, logits) in cases.items():
        v, log_prob, exact = single_and_double(relaxation, logits, 0.1, monkeypatch)
        torch.testing.assert_close(log_prob, exact, rtol=1e-4, atol=1e-4)
        assert ((v > 0) & (v < 1)).all() and exact.std() > 0.5
        stock = cls(torch.tensor(0.1), logits=logits.float(), validate_args=False)
        theirs = stock.log_prob(stock.rsample())
        assert theirs.isnan().all() or theirs.std() < 1e-4


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("size", [-40.0, 40.0])
@pytest.mark.parametrize("name", ["scalar", "one hot"])
def test_loss_and_gradient_are_finite_in_single_precision(name, size, hard):
    torch.set_default_dtype(torch.float32)
    kind, plate = KINDS[name], pyro.plate("data", 500)
    logits = torch.zeros(500, kind.width)
    logits[:, 0] = size
    logits.requires_grad_()

    def model():
        with plate:
            b = kind.vector(pyro.sample("b", kind.make(torch.zeros_like(logits))))
            pyro.sample("x", dist.Normal(b[..., 0], 1.0), obs=torch.zeros(500))

    def guide():
        with plate:
            pyro.sample("b", kind.make(logits))

    loss = TraceConcrete_ELBO(0.1, 2, hard=hard).differentiable_loss(model, guide)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.dtype == torch.float32 and loss.isfinite() and gradient.isfinite().all()
    assert (gradient[:, 0] * size > 0).all()  # towards 0, where the prior is


# --- hard values ---------------------------------------------------------------------------------


def test_hard_values_have_the_gradient_of_the_soft_ones(monkeypatch):
    """The model sees exact bits; the path is that of v, densities are those of y."""
    made, noise, seen = [], BERNOULLI.noise, []

    def recorded(self, logits):
        made.append(noise(logits))
        return made[-1]

    monkeypatch.setattr(type(BERNOULLI), "noise", recorded)
    logits = torch.linspace(-2, 2, 9).requires_grad_()
    objective = TraceConcrete_ELBO(0.7, 2, hard=True)
    loss = objective.differentiable_loss(*bits(logits, lambda b: seen.append(b.detach()) or b**2))
    v = ((logits + made[-1]) / 0.7).sigmoid()
    b = (v > 0.5).double() + v - v.detach()
    assert torch.equal(seen[-1], (v > 0.5).double())
    temperature = torch.tensor(0.7)
    ratio = RelaxedBernoulli(temperature, torch.tensor(0.3)).log_prob(v)
    ratio = ratio - RelaxedBernoulli(temperature, logits=logits).log_prob(v)
    by_hand = -(ratio + dist.Normal(b**2, 0.5).log_prob(torch.tensor(X))).sum() / 2
    assert loss.item() == pytest.approx(by_hand.item())
    found, expected = (torch.autograd.grad(value, logits)[0] for value in (loss, by_hand))
    torch.testing.assert_close(found, expected)


# --- temperatures --------------------------------------------------------------------------------


def test_anneal_is_called_with_the_number_of_gradient_calls():
    steps, pair = [], bits(torch.zeros(3, requires_grad=True))

    def anneal(step):
        steps.append(step)
        return 1.0 / (1 + step)

    objective = TraceConcrete_ELBO(anneal=anneal)
    for call in ("loss_and_grads", "loss", "differentiable_loss", "loss", "loss_and_grads"):
        getattr(objective, call)(*pair)
    assert steps == [0, 1, 1, 2, 2] and all(type(step) is int for step in steps)
    assert objective.temperature == 0.25


def test_anneal_sets_the_temperature_of_guide_and_prior():
    pair, losses = bits(torch.linspace(-1, 1, 5).requires_grad_()), []
    for objective in (TraceConcrete_ELBO(anneal=lambda step: 0.9), TraceConcrete_ELBO(0.9)):
        objective.loss(*pair)
        pyro.set_rng_seed(1)
        losses.append(objective.loss_and_grads(*pair))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("when", [1, 6])
def test_a_checkpoint_keeps_the_step_of_the_schedule(when, tmp_path):
    def guide(x):
        pair(x)[1]()

    def pair(x):
        return bits(pyro.param("logits", torch.zeros(len(x))))

    def loss():
        return TraceConcrete_ELBO(anneal=lambda step: 2.0 / (1 + step))

    make = with_svi(svi(adam, guide, lambda x: pair(x)[0](), loss))
    check_resumed(make, when, tmp_path)
    modules = load_checkpoint(tmp_path / "whole.pt")["target"]["modules"]
    (steps,) = [m["count"].item() for m in modules.values() if "count" in m]
    assert steps == STEPS


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_temperatures_must_be_positive(value):
    for name in ("temperature", "prior_temperature"):
        with pytest.raises(ValueError, match=f"^{name} must be positive, got"):
            TraceConcrete_ELBO(**{name: value})
    with pytest.raises(ValueError, match="^anneal must be positive"):
        TraceConcrete_ELBO(anneal=lambda step: value).loss(*bits(torch.zeros(2)))


@pytest.mark.parametrize("logit, vanishes", [(0.4, False), (math.log(0.3 / 0.7), True)])
def test_the_bias_is_real_and_shrinks_with_the_temperature(logit, vanishes):
    """Against the enumerated gradient of the discrete model; to zero only beside the prior."""
    logits = torch.full((3,), logit, requires_grad=True)
    objectives = {str(t): TraceConcrete_ELBO(t, 1000) for t in (0.5, 0.05)}
    report = gradient_report(objectives, *bits(logits), num_repeats=100, progress=False)
    high, low = report.rows
    assert report.exact and high.looks_biased and high.bias > 1.2 * low.bias
    assert low.looks_biased != vanishes


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_at_equal_temperatures_the_divergence_is_that_of_z(temperature):
    """Of two logistic laws, at any temperature: more than that of the bits."""
    logit, prior = torch.tensor(0.9), torch.tensor(-0.7)

    def pair(logit):
        def fn():
            with pyro.plate("data", 50_000):
                pyro.sample("b", dist.Bernoulli(logits=logit))

        return fn

    found = TraceConcrete_ELBO(temperature).loss(pair(prior), pair(logit)) / 50_000
    z = torch.linspace(-60, 60, 20_001)
    log_q, log_p = (F.logsigmoid(z - a) + F.logsigmoid(a - z) for a in (logit, prior))
    density, ratio = log_q.exp(), log_q - log_p
    exact = torch.trapezoid(density * ratio, z)
    variance = torch.trapezoid(density * ratio**2, z) - exact**2
    assert abs(found - exact) < 4 * (variance / 50_000) ** 0.5
    q, p = (dist.Bernoulli(logits=a) for a in (logit, prior))
    assert exact > 1.1 * torch.distributions.kl_divergence(q, p)


# --- which sites ---------------------------------------------------------------------------------


def test_observed_bits_stay():
    """Only latents are relaxed; an observed bit has its own probability."""
    logits, seen = torch.zeros(4, requires_grad=True), []

    def model():
        with pyro.plate("data", 4):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            y = pyro.sample("y", dist.Bernoulli(0.2 + 0.5 * b), obs=torch.ones(4))
            seen.append((b.detach(), y))

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    loss = TraceConcrete_ELBO(0.6).loss(model, guide)
    b, y = seen[-1]
    laws = [RelaxedBernoulli(torch.tensor(0.6), torch.tensor(p)) for p in (0.3, 0.5)]
    expected = (0.2 + 0.5 * b).log() + laws[0].log_prob(b) - laws[1].log_prob(b)
    assert torch.equal(y, torch.ones(4)) and loss == pytest.approx(-expected.sum().item())


def test_a_mask_of_the_distribution_is_one_of_the_site():
    mask, losses = torch.tensor([True, False, True]), []

    def sample(logit, own):
        law, outer = dist.Bernoulli(logits=logit).expand([3]), mask
        if own:
            law, outer = law.mask(mask), True
        with pyro.plate("data", 3), poutine.mask(mask=outer):
            pyro.sample("b", law)

    for own in (True, False):
        pyro.set_rng_seed(1)
        both = [
            lambda logit=logit, own=own: sample(logit, own) for logit in torch.ones(2).cumsum(0)
        ]
        losses.append(TraceConcrete_ELBO().loss(*both))
    assert losses[0] == losses[1] != 0


@pytest.mark.parametrize("name, width", [("Categorical", 3), ("Poisson", 1)])
def test_other_discrete_latents_are_refused_by_name(name, width):
    p = torch.full((width,), 0.5, requires_grad=True)

    def fn():
        pyro.sample("k", getattr(dist, name)(p if width > 1 else p[0]))

    for call in ("loss", "loss_and_grads", "differentiable_loss"):
        with pytest.raises(NotImplementedError, match=f"Site 'k' .{name}. has no concrete relax"):
            getattr(TraceConcrete_ELBO(), call)(fn, fn)
