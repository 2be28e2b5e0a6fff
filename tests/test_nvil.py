"""NVIL: the gradient by definition, its running means and baselines, and what is refused."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import nn

from pyro_vi_ext import TraceNVIL_ELBO, TraceScore_ELBO, nvil
from pyro_vi_ext.checkpoint import load_checkpoint
from pyro_vi_ext.control_variates import features

from .enumerating import Problem
from .resuming import STEPS, adam, check_resumed, svi, with_svi
from .test_discrete import deviation, stir
from .test_trace_score import X, leaves, log_densities, pair

pytestmark = pytest.mark.usefixtures("float64")


# --- by definition -------------------------------------------------------------------------------


class Recorded:
    """The chain b1 -> b2 of ``test_trace_score``, its parameters, and the draws of its guide."""

    def __init__(self):
        self.p, self.drawn = leaves(), []
        self.model, self.own = pair(self.p)

    def guide(self):
        nodes = poutine.trace(self.own).get_trace().nodes
        self.drawn.append((nodes["b1"]["value"].detach(), nodes["b2"]["value"].detach()))

    def call(self, objective):
        """The differentiable loss, and the draws (J,) and (J, 2) it was made from."""
        self.drawn.clear()
        loss = objective.differentiable_loss(self.model, self.guide)
        num = objective.num_particles
        b1 = torch.cat([b.reshape(-1) for b, _ in self.drawn])[-num:]
        b2 = torch.cat([b.reshape(-1, 2) for _, b in self.drawn])[-num:]
        return loss, b1, b2

    def signals(self, b1, b2):
        p1, q1, p2, q2 = log_densities(self.p.detach(), b1, b2)
        return p1 - q1 + (p2 - q2).sum(1), p1[:, None] + p2 - q2


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_gradient_by_definition(num_particles, vectorized):
    """The signal less its running mean and a network of b1 and x; the network learns the rest."""
    pair_of = Recorded()
    p = pair_of.p
    objective = TraceNVIL_ELBO(
        num_particles=num_particles, hidden_dims=(4,), vectorize_particles=vectorized
    )
    pair_of.call(objective)
    stir(objective)
    m1, m2 = (objective.means.get(name).value.item() for name in ("b1", "b2"))
    loss, b1, b2 = pair_of.call(objective)
    network = objective.networks.get("b2")
    known = torch.stack([b1[:, None].expand(-1, 2), X.asinh().expand(num_particles, 2)], -1)
    predicted = network(known).squeeze(-1)

    f1, f2 = pair_of.signals(b1, b2)
    p1, q1, p2, q2 = log_densities(p, b1, b2)
    by_hand = p1 + p2.sum(1) + (f1 - m1) * q1 + ((f2 - m2 - predicted.detach()) * q2).sum(1)
    learned = list(network.parameters())
    assert [id(w) for w in objective.learned.parameters()] == [id(w) for w in learned]
    found = torch.autograd.grad(loss, [p, *learned])
    error = (f2 - m2 - predicted).square().sum() / num_particles
    expected = [*torch.autograd.grad(-by_hand.mean(), p), *torch.autograd.grad(error, learned)]
    torch.testing.assert_close(list(found), expected)
    assert abs(m1) > 0.1 and abs(m2) > 0.1 and predicted.abs().min() > 1e-3
    assert loss.item() == pytest.approx(-f1.mean().item())


def test_the_default_network_is_of_what_is_known_of_a_unit():
    """Earlier draws and the unit's data; where there is neither, the running mean alone."""
    pair_of = Recorded()
    objective = TraceNVIL_ELBO(hidden_dims=(4,))
    pair_of.call(objective)
    assert objective.networks.get("b1") is None
    assert objective.networks.get("b2")[0].in_features == 2
    assert set(objective.means.by_site) == {"'b1'", "'b2'"}


def test_a_baseline_that_sees_its_own_draw_is_rejected(monkeypatch):
    problem = Problem("scalar", 2)
    assert deviation(problem, TraceNVIL_ELBO(hidden_dims=(5,))) < 4
    pyro.clear_param_store()
    monkeypatch.setattr(nvil, "context", lambda site: features(site.value, site))
    assert deviation(problem, TraceNVIL_ELBO(hidden_dims=(5,))) > 6


# --- running means -------------------------------------------------------------------------------


def test_running_means_are_corrected_for_their_start():
    pair_of, decay, seen = Recorded(), 0.7, []
    objective = TraceNVIL_ELBO(num_particles=2, decay=decay)
    for _ in range(4):
        _, b1, b2 = pair_of.call(objective)
        seen.append([f.mean() for f in pair_of.signals(b1, b2)])
        weights = decay ** torch.arange(len(seen) - 1.0, -1.0, -1.0)
        for k, name in enumerate(["b1", "b2"]):
            expected = (weights * torch.stack([f[k] for f in seen])).sum() / weights.sum()
            torch.testing.assert_close(objective.means.get(name).value, expected)


def test_running_means_are_updated_after_use():
    """The first gradient is that of the score function: the draw is not in its own baseline."""
    gradients = []
    for objective in (TraceNVIL_ELBO(num_particles=2), TraceScore_ELBO(2)):
        pair_of = Recorded()
        objective.loss(pair_of.model, pair_of.guide)  # the set-up pass
        pyro.set_rng_seed(3)
        gradients += torch.autograd.grad(pair_of.call(objective)[0], pair_of.p)
    torch.testing.assert_close(*gradients)


def test_a_loss_leaves_running_means_alone():
    pair_of, objective = Recorded(), TraceNVIL_ELBO()
    pair_of.call(objective)
    before = {name: b.clone() for name, b in objective.means.named_buffers()}
    objective.loss(pair_of.model, pair_of.guide)
    with torch.no_grad():
        objective.differentiable_loss(pair_of.model, pair_of.guide)
    after = dict(objective.means.named_buffers())
    assert len(before) == 4 and all(torch.equal(after[name], before[name]) for name in before)
    objective.loss_and_grads(pair_of.model, pair_of.guide)
    assert not any(torch.equal(after[name], before[name]) for name in before)


def test_decay_zero_is_the_last_call():
    pair_of, objective = Recorded(), TraceNVIL_ELBO(decay=0)
    for _ in range(3):
        _, b1, b2 = pair_of.call(objective)
    for f, name in zip(pair_of.signals(b1, b2), ["b1", "b2"], strict=True):
        torch.testing.assert_close(objective.means.get(name).value, f.mean())


def bits_model(x):
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2 * b, 0.7), obs=x)


def bits_guide(x):
    logits = pyro.param("logits", torch.zeros(len(x)))
    with pyro.plate("data", len(x)):
        pyro.sample("b", dist.Bernoulli(logits=logits))


@pytest.mark.parametrize("when", [1, 6])
def test_a_checkpoint_keeps_means_and_networks(when, tmp_path):
    """An interrupted and resumed run is the uninterrupted one."""

    def make_loss():
        return TraceNVIL_ELBO(hidden_dims=(3,))

    check_resumed(with_svi(svi(adam, bits_guide, bits_model, make_loss)), when, tmp_path)
    modules = load_checkpoint(tmp_path / "whole.pt")["target"]["modules"]
    (saved,) = [m for m in modules.values() if "by_site.'b'.weight" in m]
    assert saved["by_site.'b'.weight"].item() == pytest.approx(1 - 0.9**STEPS)


# --- baselines of one's own ----------------------------------------------------------------------


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.4, -0.3, 0.1]))

    def forward(self, x):
        return self.weight @ torch.stack([torch.ones_like(x), x, x**2])


DATA = torch.linspace(-1.0, 3.0, 8, dtype=torch.double)


def gradients(objective, seed=2):
    """Of the logits of the guide, at a seed, after a first call."""
    objective.loss_and_grads(bits_model, bits_guide, DATA)
    pyro.set_rng_seed(seed)
    loss = objective.differentiable_loss(bits_model, bits_guide, DATA)
    return loss, pyro.param("logits").unconstrained()


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_module_learns_by_its_squared_error(vectorized):
    baseline, drawn = Quadratic(), []

    def recorded(x):
        drawn.append(poutine.trace(bits_guide).get_trace(x).nodes["b"]["value"])

    objective = TraceNVIL_ELBO(baseline, 3, vectorize_particles=vectorized)
    objective.loss_and_grads(bits_model, recorded, DATA)
    mean = objective.means.get("b").value
    drawn.clear()
    loss = objective.differentiable_loss(bits_model, recorded, DATA)
    b = torch.cat([b.reshape(-1, len(DATA)) for b in drawn])
    f = dist.Bernoulli(0.3).log_prob(b) + dist.Normal(2 * b, 0.7).log_prob(DATA) - math.log(0.5)
    error = (f - mean - baseline(DATA)).square().sum() / 3
    expected = torch.autograd.grad(error, baseline.weight)
    torch.testing.assert_close(torch.autograd.grad(loss, baseline.weight), expected)


def test_what_a_baseline_learns_from_reaches_no_one_else():
    """The guide's gradient is the same if the baseline has nothing to learn."""
    found, fixed = [], Quadratic().requires_grad_(False)
    for baseline in (Quadratic(), fixed, lambda x: fixed(x)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        found += torch.autograd.grad(*gradients(TraceNVIL_ELBO(baseline, 2)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)


def test_the_error_of_the_network_reaches_neither_guide_nor_model():
    """A network that predicts from draws with a path, and from data: neither is moved by it."""
    problem, found = Problem("scalar", 2, copies=4), []
    for learns in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        p = problem.leaves(1)
        objective = TraceNVIL_ELBO(num_particles=2, hidden_dims=(4,))
        objective.differentiable_loss(*problem.pair(p))
        stir(objective)
        objective.learned.requires_grad_(learns)
        pyro.clear_param_store()
        found += torch.autograd.grad(objective.differentiable_loss(*problem.pair(p)), p)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_baseline_is_called_with_the_arguments_of_the_pair():
    calls = []

    def baseline(*args, **kwargs):
        calls.append((args, kwargs))
        return torch.tensor(0.5)

    def taking(fn):
        return lambda x, flag=False: fn(x)

    objective = TraceNVIL_ELBO(baseline, 3)
    objective.loss_and_grads(taking(bits_model), taking(bits_guide), DATA, flag=True)
    assert len(calls) == 1 and calls[0][0][0] is DATA and calls[0][1] == {"flag": True}
    assert not [name for name in pyro.get_param_store().keys() if "NVIL" in name]


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize(
    "value, found",
    [(torch.zeros(3), r"shape \(3,\)"), (torch.zeros(8, 1), r"shape \(8, 1\)"), (1.0, "float")],
)
def test_another_shape_than_one_value_per_unit_is_refused(value, found, vectorized):
    objective = TraceNVIL_ELBO(lambda x: value, 2, vectorize_particles=vectorized)
    with pytest.raises(ValueError, match=f"baseline returned {found} for site 'b'.*one value per"):
        objective.loss_and_grads(bits_model, bits_guide, DATA)


def test_what_cannot_be_called_is_refused():
    with pytest.raises(ValueError, match="baseline must be a module or function.*got int"):
        TraceNVIL_ELBO(5)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_must_be_below_one(decay):
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got"):
        TraceNVIL_ELBO(decay=decay)


# --- variance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_training_lowers_the_variance_below_that_of_the_score_function(own):
    """The level of the signal differs between units: a running mean does not suffice."""
    x = torch.linspace(-2.0, 4.0, 50)
    pyro.param("logits", torch.zeros(50))

    def spread(objective):
        found = []
        for _ in range(60):
            loss = objective.differentiable_loss(bits_model, bits_guide, x)
            found += torch.autograd.grad(loss, pyro.param("logits").unconstrained())
        return torch.stack(found).var(0).sum().item()

    objective = TraceNVIL_ELBO(Quadratic() if own else None, hidden_dims=(20,))
    score, mean_alone = spread(TraceScore_ELBO()), spread(TraceNVIL_ELBO(lambda x: x * 0))
    objective.loss_and_grads(bits_model, bits_guide, x)
    learned = list(objective.learned.parameters())
    optimizer = torch.optim.Adam(learned, lr=0.05)
    for _ in range(200):
        loss = objective.differentiable_loss(bits_model, bits_guide, x)
        for parameter, slope in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            parameter.grad = slope
        optimizer.step()
    trained = spread(objective)
    assert trained < 0.7 * score and trained < 0.7 * mean_alone
