"""The estimators against the exact gradient, by quadrature over noise and enumeration of bits."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import RenyiELBO

from pyro_vi_ext import ImportanceWeightedELBO
from pyro_vi_ext.importance_weighted import Weights
from pyro_vi_ext.paths import Paths
from pyro_vi_ext.score_function import score_terms

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.7, -0.4], dtype=torch.float64)
NUM_DATA = len(X)


# --- a pair in which everything depends on everything ----------------------------------------
#
# z1 is reparameterised, b is a bit that depends on z1, z2 is reparameterised and depends on both.
# `shared` is a parameter of model and guide alike. One unit per datum.


START = {"shared": 0.4, "loc": 0.3, "log_scale": -0.2, "logit": 0.2, "slope": 0.7, "shift": 0.5}


def parameters():
    pyro.clear_param_store()
    return {name: pyro.param(name, torch.tensor(value)) for name, value in START.items()}


def guide_sites(p, x):
    """Parameters of each conditional of the guide as functions of what is upstream."""
    return {
        "z1": lambda: (p["loc"] * x + p["shared"], p["log_scale"].exp()),
        "b": lambda z1: p["logit"] + p["slope"] * z1,
        "z2": lambda z1, b: (p["slope"] * z1 + p["shift"] * b, (p["log_scale"] + 0.1).exp()),
    }


def copies_of_data(num):
    """Independent copies of the data in an outer plate: many draws of the bound in one call."""
    return pyro.plate("copies", num, dim=-2)


def model(num, masked=()):
    def prior(name, fn):
        with poutine.mask(mask=torch.tensor(name not in masked)):
            return pyro.sample(name, fn)

    shared = pyro.param("shared")
    with copies_of_data(num), pyro.plate("data", NUM_DATA):
        z1 = prior("z1", dist.Normal(0.0, 1.0))
        b = prior("b", dist.Bernoulli(0.4))
        z2 = prior("z2", dist.Normal(shared * z1, 0.8))
        pyro.sample("x", dist.Normal(z2 + b * shared, 0.6), obs=X)


def guide(num, masked=()):
    p = {name: pyro.param(name) for name in START}
    x = X
    with copies_of_data(num), pyro.plate("data", NUM_DATA):
        sites = guide_sites(p, x)
        z1 = pyro.sample("z1", dist.Normal(*sites["z1"]()))
        b = pyro.sample("b", dist.Bernoulli(logits=sites["b"](z1)))
        pyro.sample("z2", dist.Normal(*sites["z2"](z1, b)))


def exact_bound(p, num_particles, nodes=9, masked=()):
    """E[L] summed over the data: Gauss-Hermite over each particle's noise, all values of the bits.

    :param masked: latents whose prior and guide densities are masked out.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    points = torch.as_tensor(points)
    weights = torch.as_tensor(weights / weights.sum())
    e1, e2, b = torch.meshgrid(points, points, torch.tensor([0.0, 1.0]), indexing="ij")
    w1, w2, _ = torch.meshgrid(weights, weights, torch.ones(2), indexing="ij")
    e1, e2, b, w = e1.reshape(-1), e2.reshape(-1), b.reshape(-1), (w1 * w2).reshape(-1)
    total = 0.0
    for x in X:
        sites = guide_sites(p, x)
        loc, scale = sites["z1"]()
        z1 = loc + scale * e1
        logit = sites["b"](z1)
        mean, sd = sites["z2"](z1, b)
        z2 = mean + sd * e2
        log_q = {
            "z1": dist.Normal(loc, scale).log_prob(z1),
            "b": dist.Bernoulli(logits=logit).log_prob(b),
            "z2": dist.Normal(mean, sd).log_prob(z2),
        }
        log_p = {
            "z1": dist.Normal(0.0, 1.0).log_prob(z1),
            "b": dist.Bernoulli(0.4).log_prob(b),
            "z2": dist.Normal(p["shared"] * z1, 0.8).log_prob(z2),
        }
        log_w = dist.Normal(z2 + b * p["shared"], 0.6).log_prob(x)
        log_w = log_w + sum(log_p[n] - log_q[n] for n in log_q if n not in masked)
        prob = w * log_q["b"].exp()  # of each node: noise by quadrature, bits by enumeration
        if num_particles == 1:
            total = total + (prob * log_w).sum()
        else:
            pair = torch.logaddexp(log_w[:, None], log_w[None, :]) - math.log(2)
            total = total + (prob[:, None] * prob[None, :] * pair).sum()
    return total


def exact_gradient(num_particles, masked=()):
    """Of the loss with respect to each parameter, and the loss."""
    params = parameters()
    loss = -exact_bound(params, num_particles, masked=masked)
    return torch.stack(torch.autograd.grad(loss, list(params.values()))), loss.item()


def estimated_gradient(objective, masked=(), num_draws=200, copies=300):
    """Draws of the gradient, one row each; every row is a mean over independent copies."""
    params = parameters()
    rows = []
    for _ in range(num_draws):
        loss = objective.differentiable_loss(model, guide, copies, masked)
        rows.append(torch.stack(torch.autograd.grad(loss, list(params.values()))) / copies)
    return torch.stack(rows)


def z_scores(rows, exact):
    """How many standard errors the mean of the rows is off."""
    return (rows.mean(0) - exact) / (rows.std(0) / len(rows) ** 0.5)


UNBIASED = [(1, "pathwise"), (1, "stl"), (1, "dreg"), (2, "pathwise"), (2, "dreg")]


@pytest.mark.parametrize(("num_particles", "gradient"), UNBIASED)
def test_gradient_is_that_of_the_exact_bound(num_particles, gradient):
    exact, _ = exact_gradient(num_particles)
    rows = estimated_gradient(ImportanceWeightedELBO(num_particles, gradient))
    assert z_scores(rows, exact).abs().max() < 4


@pytest.mark.parametrize("gradient", ["pathwise", "dreg"])
def test_chunked_sequential_gradient_is_that_of_the_exact_bound(gradient):
    exact, _ = exact_gradient(2)
    objective = ImportanceWeightedELBO(2, gradient, chunk_size=1, vectorize_particles=False)
    assert z_scores(estimated_gradient(objective), exact).abs().max() < 4


@pytest.mark.parametrize("masked", ["z1", "b", "z2"])
@pytest.mark.parametrize("gradient", ["pathwise", "dreg"])
def test_gradient_with_a_masked_latent(gradient, masked):
    """The latent leaves log w, but what was drawn still moves the likelihood."""
    exact, _ = exact_gradient(2, (masked,))
    rows = estimated_gradient(ImportanceWeightedELBO(2, gradient), (masked,))
    assert z_scores(rows, exact).abs().max() < 4


@pytest.mark.parametrize("masked", ["z1", "b"])
def test_gradient_with_a_masked_latent_of_the_elbo(masked):
    exact, _ = exact_gradient(1, (masked,))
    rows = estimated_gradient(ImportanceWeightedELBO(1, "stl"), (masked,))
    assert z_scores(rows, exact).abs().max() < 4


def test_bound_is_the_exact_one():
    parameters()
    for num_particles in (1, 2):
        _, loss = exact_gradient(num_particles)
        objective = ImportanceWeightedELBO(num_particles)
        losses = torch.tensor([objective.loss(model, guide, 300) / 300 for _ in range(100)])
        assert abs(z_scores(losses, loss)) < 4


# Planted biases: the check above sees each of them.


def test_stl_is_biased_for_more_than_one_particle():
    exact, _ = exact_gradient(2)
    assert z_scores(estimated_gradient(ImportanceWeightedELBO(2, "stl")), exact).abs().max() > 10


def test_score_without_the_weight_is_rejected(monkeypatch):
    of = Weights.of

    def biased(log_w):
        weights = of(log_w)
        return Weights(weights.bound, weights.normalised, weights.signal + weights.normalised)

    monkeypatch.setattr(Weights, "of", staticmethod(biased))
    exact, _ = exact_gradient(2)
    rows = estimated_gradient(ImportanceWeightedELBO(2, "dreg"), num_draws=400)
    assert z_scores(rows, exact).abs().max() > 6


def test_paths_of_another_weight_are_rejected(monkeypatch):
    weigh = Paths.weigh
    monkeypatch.setattr(Paths, "weigh", lambda self, weights: weigh(self, weights**2))
    exact, _ = exact_gradient(2)
    assert z_scores(estimated_gradient(ImportanceWeightedELBO(2, "dreg")), exact).abs().max() > 10


def test_draws_detached_from_the_score_of_what_depends_on_them_are_rejected(monkeypatch):
    def detached(guide_trace):
        guide_trace = guide_trace.copy()
        site = guide_trace.nodes["b"]
        p, z1 = parameters_now(), guide_trace.nodes["z1"]["value"].detach()
        site["fn"] = dist.Bernoulli(logits=guide_sites(p, X)["b"](z1))
        return score_terms(guide_trace)

    monkeypatch.setattr("pyro_vi_ext.importance_weighted.score_terms", detached)
    exact, _ = exact_gradient(2)
    assert z_scores(estimated_gradient(ImportanceWeightedELBO(2)), exact).abs().max() > 10


def parameters_now():
    return {name: pyro.param(name) for name in START}


# --- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [2, 3, 50])
def test_leave_one_out_by_definition(num):
    log_w = 30 * torch.randn(num, 4)
    weights = Weights.of(log_w)
    for k in range(num):
        others = torch.cat([log_w[:k], log_w[k + 1 :]])
        replaced = torch.cat([others, others.mean(0, keepdim=True)])
        without = torch.logsumexp(replaced, 0) - math.log(num)
        torch.testing.assert_close(weights.signal[k], weights.bound - without)
    torch.testing.assert_close(weights.normalised, log_w.softmax(0))


def test_weights_of_zero_are_no_nan():
    log_w = torch.tensor([[0.0, -torch.inf], [-torch.inf, 1.0], [1.0, 2.0]])
    weights = Weights.of(log_w)
    assert torch.isfinite(weights.bound).all() and torch.isfinite(weights.normalised).all()
    assert torch.isfinite(weights.signal).all()


# --- what stock Pyro gets wrong ----------------------------------------------------------------


def linear_gaussian(num_data):
    """z_i ~ N(0, 1), x_i ~ N(z_i, 1), and a guide that is off; log p(x) is known."""
    x = torch.linspace(-2.0, 2.5, num_data)

    def model(batch):
        with pyro.plate("data", num_data, subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(batch):
        with pyro.plate("data", num_data, subsample_size=batch) as index:
            pyro.sample("z", dist.Normal(0.4 * x[index], 0.9))

    return model, guide, dist.Normal(0.0, 2**0.5).log_prob(x).sum().item()


def mean_and_error(values):
    values = torch.tensor(values)
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def test_bound_climbs_to_the_evidence_and_does_not_depend_on_the_minibatch():
    model, guide, evidence = linear_gaussian(100)
    before = -math.inf
    for num_particles in (1, 10, 100):
        objective = ImportanceWeightedELBO(num_particles)
        full, error = mean_and_error([-objective.loss(model, guide, None) for _ in range(200)])
        assert before < full + 4 * error < evidence + 8 * error
        before = full
        for batch in (50, 10, 1):
            bounds = [-objective.loss(model, guide, batch) for _ in range(500)]
            mean, small_error = mean_and_error(bounds)
            assert abs(mean - full) < 4 * math.hypot(error, small_error)
    assert evidence - before < 0.5


def test_stock_renyi_exceeds_the_evidence_where_ours_does_not():
    """pyro-ppl 1.9.2 puts the scale N/B into the exponential."""
    model, guide, evidence = linear_gaussian(100)
    stock = RenyiELBO(alpha=0, num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    ours = ImportanceWeightedELBO(10)
    stock, stock_error = mean_and_error([-stock.loss(model, guide, 10) for _ in range(200)])
    ours, ours_error = mean_and_error([-ours.loss(model, guide, 10) for _ in range(200)])
    assert stock > evidence + 10 * stock_error
    assert ours < evidence + 4 * ours_error


def bit(x):
    b = pyro.sample("b", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def bit_guide(x):
    pyro.sample("b", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.5))))


def test_stock_renyi_has_no_gradient_for_a_bit_and_ours_is_exact():
    x, num = torch.tensor(0.8), 4
    logit = torch.tensor(0.5, requires_grad=True)
    bound = 0.0
    for values in itertools.product([0.0, 1.0], repeat=num):
        b = torch.tensor(values)
        log_q = dist.Bernoulli(logits=logit).log_prob(b)
        log_w = dist.Bernoulli(0.3).log_prob(b) + dist.Normal(b, 1.0).log_prob(x) - log_q
        bound = bound + log_q.sum().exp() * (torch.logsumexp(log_w, 0) - math.log(num))
    (exact,) = torch.autograd.grad(-bound, logit)
    assert exact.abs() > 0.01

    def gradients(objective, num_draws):
        pyro.param("logit", torch.tensor(0.5))
        leaf = pyro.get_param_store()._params["logit"]
        result = []
        for _ in range(num_draws):
            leaf.grad = torch.zeros_like(leaf)
            objective.loss_and_grads(bit, bit_guide, x)
            result.append(leaf.grad.item())
        return torch.tensor(result)

    ours = gradients(ImportanceWeightedELBO(num), 2000)
    assert abs(z_scores(ours, exact)) < 4
    stock = RenyiELBO(alpha=0, num_particles=num, vectorize_particles=True, max_plate_nesting=0)
    stock = gradients(stock, 2000)
    assert abs(z_scores(stock, exact)) > 10 or not stock.any()


def test_stock_renyi_has_no_module_interface_and_ours_has():
    model, guide, _ = linear_gaussian(5)
    with pytest.raises(AttributeError):
        RenyiELBO(num_particles=2)(model, guide)(None)
    assert ImportanceWeightedELBO(2)(model, guide)(None).isfinite()


# --- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "kwargs"),
    [
        ("gradient must be 'pathwise', 'stl' or 'dreg', got 'DReG'", {"gradient": "DReG"}),
        ("chunk_size must be an integer >= 1, got 0", {"chunk_size": 0}),
        ("num_particles must be an integer >= 1", {"num_particles": 0}),
    ],
)
def test_bad_arguments(match, kwargs):
    with pytest.raises(ValueError, match=match):
        ImportanceWeightedELBO(**kwargs)


def test_global_latent_with_subsampling_has_no_multi_sample_bound():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=2):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=torch.zeros(2))

    def guide():
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="one scale per unit.*'mu'.*'x'"):
        ImportanceWeightedELBO(2).loss(model, guide)
    assert math.isfinite(ImportanceWeightedELBO(1).loss(model, guide))


def test_inner_subsampled_plate_is_refused():
    def model():
        with pyro.plate("groups", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("members", 10, subsample_size=2, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3, 2))

    def guide():
        with pyro.plate("groups", 3, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="one scale per unit.*'z'.*'x'"):
        ImportanceWeightedELBO(2).loss(model, guide)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("gradient", ["pathwise", "stl", "dreg"])
def test_step_on_cuda(gradient):
    loc = torch.zeros((), device="cuda", requires_grad=True)
    x = torch.linspace(-1.0, 1.0, 6, device="cuda")

    def model():
        with pyro.plate("data", 6, device="cuda"):
            z = pyro.sample("z", dist.Normal(torch.zeros((), device="cuda"), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        with pyro.plate("data", 6, device="cuda"):
            pyro.sample("z", dist.Normal(loc, 1.0))

    for chunk_size in (None, 2):
        loss = ImportanceWeightedELBO(5, gradient, chunk_size).differentiable_loss(model, guide)
        assert loss.device.type == "cuda"
        (grad,) = torch.autograd.grad(loss, loc)
        assert grad.isfinite()
