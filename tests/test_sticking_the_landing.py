"""The path derivative against closed forms: its mean, its zero variance, and its bias for K > 1."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_vi_ext import ImportanceWeightedELBO, TraceSTL_ELBO, sticking_the_landing

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor(0.7, dtype=torch.float64)
EXACT = {"loc": 0.35, "scale": math.sqrt(0.5)}  # the posterior of z ~ N(0, 1), x | z ~ N(z, 1)
OFF = {"loc": -0.5, "scale": 1.1}


def model(copies):
    with pyro.plate("copies", copies):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X)


def guide_at(values):
    """A guide with new parameters, and its parameters."""
    loc, scale = leaves = [torch.tensor(values[n], requires_grad=True) for n in ("loc", "scale")]

    def guide(copies):
        with pyro.plate("copies", copies):
            pyro.sample("z", dist.Normal(loc, scale))

    return guide, leaves


def gradients(objective, values, num_draws=200, copies=100):
    """Draws of the gradient of the loss of one copy, each a mean over copies; one row each."""
    guide, leaves = guide_at(values)
    rows = []
    for _ in range(num_draws):
        loss = objective.differentiable_loss(model, guide, copies) / copies
        rows.append(torch.stack(torch.autograd.grad(loss, leaves)))
    return torch.stack(rows)


def closed_form(values):
    """Of -ELBO = (m^2 + s^2) / 2 + ((x - m)^2 + s^2) / 2 - log s + constant."""
    loc, scale = values["loc"], values["scale"]
    return torch.tensor([2 * loc - X.item(), 2 * scale - 1 / scale])


def standard_errors(rows, exact):
    """How many standard errors the mean of the rows is off, at most."""
    return ((rows.mean(0) - exact) / (rows.std(0) / len(rows) ** 0.5)).abs().max().item()


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_mean_is_the_closed_form(num_particles, vectorize):
    objective = TraceSTL_ELBO(num_particles, vectorize_particles=vectorize)
    assert standard_errors(gradients(objective, OFF), closed_form(OFF)) < 4


def test_no_draw_moves_at_the_exact_posterior():
    path, plain = (
        gradients(elbo, EXACT, 20, 1) for elbo in (TraceSTL_ELBO(), ImportanceWeightedELBO(1))
    )
    assert path.abs().max() < 1e-12
    assert plain.std(0).max() > 0.5


def test_a_path_dropped_with_the_density_is_rejected(monkeypatch):
    def undetached(run, scored):
        return sum(t.log_prob.sum() for part in scored for t in part.guide.values())

    monkeypatch.setattr(sticking_the_landing, "stl_bound", undetached)
    assert standard_errors(gradients(TraceSTL_ELBO(), OFF), closed_form(OFF)) > 10


def test_a_density_that_is_not_dropped_is_rejected(monkeypatch):
    """Its mean is right, and its noise does not vanish."""
    monkeypatch.setattr(sticking_the_landing, "stl_bound", lambda run, scored: 0.0)
    assert standard_errors(gradients(TraceSTL_ELBO(), OFF), closed_form(OFF)) < 4
    assert gradients(TraceSTL_ELBO(), EXACT, 20, 1).abs().max() > 0.5


def test_noise_vanishes_towards_the_exact_posterior():
    """In proportion to the distance: the variance falls with its square."""
    noise = []
    for distance in (0.1, 0.01):
        values = {name: value + distance for name, value in EXACT.items()}
        noise.append(gradients(TraceSTL_ELBO(), values, 100, 1).std(0))
    assert (noise[1] < 0.2 * noise[0]).all()


@pytest.mark.parametrize("num_particles", [1, 4])
def test_loss_is_that_of_trace_elbo(num_particles):
    guide, _ = guide_at(OFF)
    stock = Trace_ELBO(num_particles, max_plate_nesting=1, vectorize_particles=True)
    ours = TraceSTL_ELBO(num_particles)
    ours.loss(model, guide, 5)  # once, for the set-up pass
    for call in ("loss", "loss_and_grads"):
        losses = []
        for objective in (stock, ours):
            pyro.set_rng_seed(1)
            losses.append(getattr(objective, call)(model, guide, 5))
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_scale_multiplies_the_gradient_and_mask_removes_it():
    guide, leaves = guide_at(OFF)

    def gradient(handler, option):
        pyro.set_rng_seed(2)
        pair = [handler(fn, option) for fn in (model, guide)]
        loss = TraceSTL_ELBO().differentiable_loss(*pair, 3)
        return torch.stack(torch.autograd.grad(loss, leaves, materialize_grads=True))

    whole = gradient(poutine.scale, 1.0)
    torch.testing.assert_close(gradient(poutine.scale, 3.0), 3 * whole)
    masks = torch.eye(3, dtype=torch.bool)
    parts = [gradient(lambda fn, m: poutine.mask(fn, mask=m), mask) for mask in masks]
    torch.testing.assert_close(sum(parts), whole)


def test_a_site_without_a_path_is_refused_by_name():
    def bit_model():
        pyro.sample("b", dist.Bernoulli(0.5))

    def bit_guide():
        pyro.sample("b", dist.Bernoulli(pyro.param("p", torch.tensor(0.3))))

    with pytest.raises(NotImplementedError, match="'b'.*Bernoulli.*ImportanceWeightedELBO"):
        TraceSTL_ELBO().loss_and_grads(bit_model, bit_guide)


# --- inside a bound with K > 1 (Tucker et al. 2018, 1810.04152) ----------------------------------


def exact_gradient_of_two(values, nodes=40):
    """Of -E log (w_1 + w_2) / 2, by quadrature over the noise of both draws."""
    points, weights = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    _, (loc, scale) = guide_at(values)
    z = loc + scale * points
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(X)
    log_w = log_p - dist.Normal(loc, scale).log_prob(z)
    bound = torch.logaddexp(log_w[:, None], log_w[None, :]) - math.log(2)
    weights = weights / weights.sum()
    loss = -(weights[:, None] * weights[None, :] * bound).sum()
    return torch.stack(torch.autograd.grad(loss, (loc, scale)))


def test_within_two_weights_it_is_biased_and_dreg_is_not():
    exact = exact_gradient_of_two(OFF)
    stl, dreg, plain = (
        standard_errors(gradients(ImportanceWeightedELBO(2, name), OFF, copies=500), exact)
        for name in ("stl", "dreg", "pathwise")
    )
    assert dreg < 4 and plain < 4 and stl > 10
