"""Two known Gaussians in Pyro: model and guides against the exact densities and bounds."""

from functools import partial

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate

from pyro_vi_ext.models.gaussian_mixture_exact import GaussianMixture
from pyro_vi_ext.models.two_gaussians import (
    LECTURE_MIXTURE,
    QUERY_POINT,
    two_gaussians,
    two_gaussians_guide,
    two_gaussians_posterior,
)

pytestmark = pytest.mark.usefixtures("float64")


def points():
    return torch.tensor([QUERY_POINT, (1.0, 1.0), (4.0, 5.0)])


def labels(lam):
    return torch.stack([1 - lam, lam], -1)


def log_weights(guide, x, num_particles, model=two_gaussians):
    """log p(x_i, z_i) - log q(z_i) of vectorised draws, shape (num_particles, N)."""
    particles = pyro.plate("particles", num_particles, dim=-2)
    guide_trace = poutine.trace(particles(guide)).get_trace(x)
    model_trace = poutine.trace(poutine.replay(particles(model), guide_trace)).get_trace(x)
    for trace in (guide_trace, model_trace):
        trace.compute_log_prob()
    nodes = model_trace.nodes
    return nodes["z"]["log_prob"] + nodes["x"]["log_prob"] - guide_trace.nodes["z"]["log_prob"]


def within_four_standard_errors(values, want):
    """Whether the mean over dimension 0 is the value wanted, by its own standard error."""
    se = values.std(0) / len(values) ** 0.5
    return bool(((values.mean(0) - want).abs() < 4 * se).all())


@pytest.mark.parametrize("label", [0, 1])
def test_log_joint_is_that_of_the_mixture(label):
    x = points()
    z = {"z": torch.full((3,), float(label))}
    trace = poutine.trace(poutine.condition(two_gaussians, z)).get_trace(x)
    trace.compute_log_prob()
    got = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]
    assert got.allclose(LECTURE_MIXTURE.log_joint(x)[:, label], rtol=1e-13)


def test_every_weight_of_the_exact_posterior_is_the_evidence():
    # The last point is so far out that its posterior rounds to 1.
    x = torch.cat([points(), torch.tensor([[40.0, 40.0]])])
    log_w = log_weights(two_gaussians_posterior, x, 50)
    assert log_w.shape == (50, 4)
    assert log_w.allclose(LECTURE_MIXTURE.log_evidence(x).expand(50, 4), rtol=1e-12)
    biased = partial(two_gaussians_guide, probs=LECTURE_MIXTURE.responsibilities(x)[:, 1] * 0.99)
    assert not log_weights(biased, x, 50).allclose(LECTURE_MIXTURE.log_evidence(x), rtol=1e-4)


def test_enumerated_elbo_is_the_exact_one():
    x, lam = points(), torch.tensor([0.1, 0.5, 0.9])
    guide = config_enumerate(partial(two_gaussians_guide, probs=lam))
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(two_gaussians, guide, x)
    want = LECTURE_MIXTURE.elbo(x, labels(lam)).sum().item()
    assert -loss == pytest.approx(want, rel=1e-12)
    # And with the labels of the model enumerated, the evidence.
    empty = TraceEnum_ELBO(max_plate_nesting=1).loss(
        config_enumerate(two_gaussians), lambda x: None, x
    )
    assert -empty == pytest.approx(LECTURE_MIXTURE.log_evidence(x).sum().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exact_posterior_keeps_the_digits_of_a_label_next_to_impossible(dtype):
    x = torch.tensor([[10.0, 10.0]], dtype=dtype)  # 1 - p(z = 1 | x) is far below rounding
    guide = poutine.condition(two_gaussians_posterior, {"z": x.new_zeros(1)})
    log_q = poutine.trace(guide).get_trace(x).log_prob_sum()
    want = LECTURE_MIXTURE.log_joint(x)[0, 0] - LECTURE_MIXTURE.log_evidence(x)[0]
    assert log_q.item() == pytest.approx(want.item(), rel=1e-5) and want < -100


@pytest.mark.parametrize("size", [1, 5, 20])
def test_sampled_bounds_have_the_exact_mean(size):
    x, lam = points(), torch.tensor([0.33, 0.5, 0.9])
    log_w = log_weights(partial(two_gaussians_guide, probs=lam), x, 4000 * size)
    bounds = log_w.reshape(4000, size, 3).logsumexp(1) - torch.tensor(float(size)).log()
    want = LECTURE_MIXTURE.importance_weighted_bound(x, labels(lam), size)
    assert within_four_standard_errors(bounds, want)
    assert not within_four_standard_errors(bounds + 0.1, want)


def test_proposing_from_the_prior_estimates_the_evidence():
    x = points()
    prior = partial(two_gaussians_guide, probs=LECTURE_MIXTURE.weights[1])
    weights = log_weights(prior, x, 20_000).exp()
    evidence = LECTURE_MIXTURE.log_evidence(x).exp()
    assert within_four_standard_errors(weights, evidence)
    assert not within_four_standard_errors(weights * 1.05, evidence)


def test_training_lambda_finds_the_posterior():
    means = LECTURE_MIXTURE.means
    x = torch.lerp(*means, torch.tensor([[0.3], [0.342856], [0.4]]))  # labels that are in doubt
    guide = config_enumerate(two_gaussians_guide)
    svi = SVI(
        two_gaussians, guide, pyro.optim.Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1)
    )
    losses = [svi.step(x) for _ in range(300)]
    lam = pyro.param("lambda").detach()
    assert lam.allclose(LECTURE_MIXTURE.responsibilities(x)[:, 1], rtol=0.0, atol=1e-3)
    start = LECTURE_MIXTURE.elbo(x, labels(torch.full((3,), 0.5))).sum().item()
    assert -losses[0] == pytest.approx(start, rel=1e-12)
    assert -losses[-1] == pytest.approx(LECTURE_MIXTURE.log_evidence(x).sum().item(), abs=1e-3)


def test_stock_svi_with_vectorised_particles_runs():
    loss = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(two_gaussians, two_gaussians_guide, pyro.optim.Adam({"lr": 0.01}), loss)
    assert svi.step(points()) > 0
    assert pyro.param("lambda").shape == (3,)


def test_relaxed_labels_interpolate():
    x, z = points(), torch.tensor([0.0, 0.25, 1.0], requires_grad=True)
    with pyro.validation_enabled(False):
        trace = poutine.trace(poutine.condition(two_gaussians, {"z": z})).get_trace(x)
        trace.compute_log_prob()
    log_prob = trace.nodes["x"]["log_prob"]
    means, trils = LECTURE_MIXTURE.means, LECTURE_MIXTURE.scale_trils
    between = dist.MultivariateNormal(
        0.75 * means[0] + 0.25 * means[1], scale_tril=0.75 * trils[0] + 0.25 * trils[1]
    )
    assert log_prob[1].item() == pytest.approx(between.log_prob(x[1]).item())
    ends = (LECTURE_MIXTURE.log_joint(x) - LECTURE_MIXTURE.weights.log())[[0, 2], [0, 1]]
    assert log_prob[[0, 2]].allclose(ends, rtol=1e-13)
    log_prob.sum().backward()
    assert bool((z.grad != 0).all())


def test_draws_have_the_moments_of_the_mixture():
    n, m = 40_000, LECTURE_MIXTURE
    x = two_gaussians(num_points=n)
    assert x.shape == (n, 2)
    mean = m.weights @ m.means
    assert within_four_standard_errors(x, mean)
    assert not within_four_standard_errors(x, mean + 0.1)
    centred = m.means - mean
    second = m.covariances + centred.unsqueeze(-1) * centred.unsqueeze(-2)
    products = (x - mean).unsqueeze(-1) * (x - mean).unsqueeze(-2)
    assert within_four_standard_errors(products, (m.weights[:, None, None] * second).sum(0))
    draws = Predictive(two_gaussians, num_samples=4, parallel=True)(num_points=6)
    assert draws["x"].shape == (4, 6, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sites_follow_the_dtype_of_x(dtype):
    for function in (two_gaussians, two_gaussians_guide, two_gaussians_posterior):
        pyro.clear_param_store()
        trace = poutine.trace(function).get_trace(points().to(dtype))
        assert trace.nodes["z"]["value"].dtype == dtype
        trace.compute_log_prob()
        assert trace.nodes["z"]["log_prob"].dtype == dtype


def test_another_mixture_of_two():
    mixture = GaussianMixture([0.5, 0.5], [[0.0], [3.0]], [[[1.0]], [[4.0]]])
    x = torch.tensor([[0.5], [2.0]])
    log_w = log_weights(
        partial(two_gaussians_posterior, mixture=mixture),
        x,
        5,
        partial(two_gaussians, mixture=mixture),
    )
    assert log_w.allclose(mixture.log_evidence(x).expand(5, 2))


def test_mistakes_name_the_site():
    with pytest.raises(ValueError, match='site "x".*num_points=N'):
        two_gaussians()
    with pytest.raises(ValueError, match="num_points must be an integer >= 1"):
        two_gaussians(num_points=0)
    three = GaussianMixture([0.2, 0.3, 0.5], torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2))
    for function in (two_gaussians, two_gaussians_guide, two_gaussians_posterior):
        with pytest.raises(ValueError, match=r'site "x".*found \(2,\)'):
            function(torch.tensor(QUERY_POINT))
        with pytest.raises(ValueError, match='site "x".*found nan at row 0, column 1'):
            function(torch.tensor([[0.0, float("nan")]]))
        with pytest.raises(ValueError, match='site "z".*two components, found 3'):
            function(points(), three)
