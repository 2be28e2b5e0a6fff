"""LAX: unbiased for chains of Normals, by definition, for a black box, and what it learns from."""

import contextlib
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_vi_ext import TraceLAX_ELBO, TraceScore_ELBO, lax

from .test_discrete import deviation, stir

pytestmark = pytest.mark.usefixtures("float64")

COPIES = 20_000


def log_normal(x, loc, scale):
    return dist.Normal(loc, scale).log_prob(torch.as_tensor(x))


# --- chains of Normals ---------------------------------------------------------------------------


class Chain:
    """z0 of all, then z1 of units that are subsampled, one masked, or of all; and data x.

    Everything is linear and Gaussian, so that the bound is a polynomial in the means and deviations
    of the guide. The first of its parameters is also the model's.
    """

    x = torch.tensor([0.9, -0.6, 1.4], dtype=torch.double)
    mask = torch.tensor([True, True, False])
    num_plates = 1

    def __init__(self, chained=True, plated=True, copies=COPIES):
        self.chained, self.plated, self.copies = chained, plated, copies
        self.seen = []

    def leaves(self, *batch):
        start = torch.tensor([0.5, 0.6, -0.3, 0.4, 0.8])
        return start.expand(*batch, 5).clone().requires_grad_()

    def z0(self, p):
        return p[..., 0] + 0.2, p[..., 1]

    def z1(self, p, z0, x):
        return p[..., 2] + p[..., 3] * z0 + 0.1 * x, p[..., 4]

    def units(self):
        return pyro.plate("units", 3, subsample_size=2, dim=-1) if self.plated else one_unit()

    def pair(self, p):
        copies = pyro.plate("copies", self.copies, dim=-2)

        def guide():
            with copies:
                z0 = pyro.sample("z0", dist.Normal(*self.z0(p)))
                with self.units() as index, poutine.mask(mask=self.mask[index]):
                    if self.chained:
                        pyro.sample("z1", dist.Normal(*self.z1(p, z0, self.x[index])))

        def model():
            with copies:
                z = pyro.sample("z0", dist.Normal(0.0, 1.0))
                with self.units() as index, poutine.mask(mask=self.mask[index]):
                    self.seen.append(index)
                    if self.chained:
                        z = pyro.sample("z1", dist.Normal(p[..., 0] * z, 1.2))
                    pyro.sample("x", dist.Normal(z, 0.7), obs=self.x[index])

        return model, guide

    def exact(self, index):
        """The expectation of (x - z)^2 / s^2 is (x - mean of z)^2 / s^2 + variance / s^2."""
        p = self.leaves()
        loc, scale = self.z0(p)
        x, weight = self.x[index], self.mask[index] * (3 / 2 if self.plated else 1.0)
        bound = log_normal(loc, 0.0, 1.0) - scale**2 / 2 + scale.log()
        if self.chained:
            mean, own = self.z1(p, loc, x)
            variance = own**2 + (p[3] * scale) ** 2
            ahead = own**2 + ((p[3] - p[0]) * scale) ** 2  # of z1 - p0 z0
            terms = log_normal(mean, p[0] * loc, 1.2) - ahead / 2 / 1.2**2 + own.log()
        else:
            mean, variance, terms = loc, scale**2, 0.0
        terms = terms + log_normal(x, mean, 0.7) - variance / 2 / 0.7**2
        loss = -bound - (terms * weight).sum()
        return loss.detach(), torch.autograd.grad(loss, p)[0]


@contextlib.contextmanager
def one_unit():
    yield torch.tensor([0])


@pytest.mark.parametrize("vectorized, num_particles", [(True, 1), (True, 2), (False, 2)])
@pytest.mark.parametrize("plated", [True, False])
@pytest.mark.parametrize("chained", [True, False])
def test_mean_gradient_is_exact(chained, plated, vectorized, num_particles):
    """With a network that is not zero."""
    objective = TraceLAX_ELBO(
        num_particles=num_particles, hidden_dims=(5,), vectorize_particles=vectorized
    )
    assert deviation(Chain(chained, plated), objective) < 4


def own_control(sites):
    *earlier, z = sites.values()
    return torch.sin(z) - 0.3 * z**2 + sum(z * other for other in earlier)


@pytest.mark.parametrize("control_variate", [None, own_control])
def test_without_the_path_of_c_the_gradient_is_rejected(control_variate, monkeypatch):
    objective = TraceLAX_ELBO(control_variate, hidden_dims=(50,))
    assert deviation(Chain(), objective) < 4
    pyro.clear_param_store()
    monkeypatch.setattr(lax, "slopes_at", lambda c, points, train: [torch.zeros_like(*points)])
    objective = TraceLAX_ELBO(control_variate, hidden_dims=(50,))
    assert deviation(Chain(), objective) > 6


def test_mean_gradient_for_an_auto_guide():
    """AutoNormal, of a positive z: that of Trace_ELBO's closed form."""
    x = torch.tensor(0.8)

    def model():
        with pyro.plate("copies", COPIES):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x.expand(COPIES))

    guide = AutoNormal(model, init_scale=0.6)
    objective = TraceLAX_ELBO(hidden_dims=(5,))
    objective.differentiable_loss(model, guide)
    stir(objective)
    leaves = list(guide.parameters())
    found = torch.autograd.grad(objective.differentiable_loss(model, guide), leaves)
    loc, scale = guide.locs.z, guide.scales.z
    loss = loc**2 / 2 + (x - loc) ** 2 / 2 + scale**2 - scale.log()
    for gradient, exact in zip(found, torch.autograd.grad(loss.sum(), leaves), strict=True):
        error = gradient - exact
        assert error.mean().abs() < 4 * error.std() / COPIES**0.5 and error.std() > 0.1


# --- by definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_gradient_by_definition(num_particles, vectorized):
    """From the noise of recorded draws; z1 is drawn at the detached z0."""
    problem, drawn = Chain(copies=4), []
    p = problem.leaves(4, 1)
    model, guide = problem.pair(p)

    def recorded():
        nodes = poutine.trace(guide).get_trace().nodes
        drawn.append([nodes[name]["value"].detach() for name in ("z0", "z1")])

    objective = TraceLAX_ELBO(own_control, num_particles, vectorize_particles=vectorized)
    objective.differentiable_loss(model, recorded)
    drawn.clear()
    problem.seen.clear()
    loss = objective.differentiable_loss(model, recorded)
    index, total = problem.seen[0], 0.0
    x, weight = problem.x[index], problem.mask[index] * 1.5
    for z0, z1 in drawn[-1:] if vectorized else drawn[-num_particles:]:
        path0, path1 = (
            loc + scale * ((z - loc) / scale).detach()
            for z, (loc, scale) in ((z0, problem.z0(p)), (z1, problem.z1(p, z0, x)))
        )
        q0, q1 = log_normal(z0, *problem.z0(p)), log_normal(z1, *problem.z1(p, z0, x))
        prior = log_normal(z0, 0.0, 1.0)
        own = log_normal(z1, p[..., 0] * z0, 1.2) + log_normal(x, z1, 0.7)
        f0 = prior - q0 + ((own - q1) * weight).sum(-1, keepdim=True)
        f1 = prior + (own - q1) * weight
        c0 = {"z0": z0}, {"z0": path0}
        c1 = {"z0": z0, "z1": z1}, {"z0": z0, "z1": path1}
        total = total + (own * weight).sum()  # the model's own gradient
        for f, q, (at, path) in ((f0, q0, c0), (f1, q1, c1)):
            total = total + ((f - own_control(at)).detach() * q + own_control(path)).sum()
    (expected,) = torch.autograd.grad(-total / num_particles, p)
    torch.testing.assert_close(torch.autograd.grad(loss, p)[0], expected)


# --- a black box ---------------------------------------------------------------------------------


def table(logs, loc, x=2.0):
    """A model that takes the floor of z."""
    copies = pyro.plate("copies", len(loc))

    def model():
        with copies:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            logs.append(z.requires_grad)
            pyro.sample("x", dist.Normal(z.floor(), 1.0), obs=torch.tensor(x).expand(len(loc)))

    def guide():
        with copies:
            pyro.sample("z", dist.Normal(loc, 0.5))

    return model, guide


def test_the_model_never_sees_a_path():
    """So it may be a table; the pathwise gradient of it is wrong."""
    logs, loc = [], torch.full((COPIES,), 0.3, requires_grad=True)
    pair = table(logs, loc)
    objective = TraceLAX_ELBO(hidden_dims=(5,))
    objective.differentiable_loss(*pair)
    stir(objective)
    logs.clear()
    found = torch.autograd.grad(objective.differentiable_loss(*pair), loc)[0]
    assert logs == [False]

    leaf, k = torch.tensor(0.3, requires_grad=True), torch.arange(-8.0, 8.0)
    inside = dist.Normal(leaf, 0.5).cdf(k + 1) - dist.Normal(leaf, 0.5).cdf(k)
    bound = (inside * dist.Normal(k, 1.0).log_prob(torch.tensor(2.0))).sum() - leaf**2 / 2
    (exact,) = torch.autograd.grad(-bound, leaf)
    error = found.std() / COPIES**0.5
    assert abs(found.mean() - exact) < 4 * error
    stock = torch.autograd.grad(Trace_ELBO().differentiable_loss(*pair), loc)[0]
    assert abs(stock.mean() - exact) > 6 * stock.std() / COPIES**0.5


# --- control variates of one's own ---------------------------------------------------------------


@pytest.mark.parametrize("vectorized", [True, False])
def test_what_a_control_variate_is_called_with(vectorized):
    """Earlier draws, detached; its own z; the arguments of the pair."""
    calls = []

    def control_variate(sites, *args, **kwargs):
        calls.append((dict(sites), args, kwargs))
        return own_control(sites)

    problem = Chain(copies=5)
    model, guide = problem.pair(problem.leaves(5, 1))

    def taking(fn):
        return lambda data, flag=False: fn()

    objective = TraceLAX_ELBO(control_variate, 3, vectorize_particles=vectorized)
    objective.loss_and_grads(taking(model), taking(guide), 7, flag=True)
    repeats, lead = (1, (3,)) if vectorized else (3, ())
    names = [list(sites) for sites, _, _ in calls]
    assert names == [["z0"]] * repeats + [["z0", "z1"]] * repeats
    for sites, args, kwargs in calls:
        assert args == (7,) and kwargs == {"flag": True}
        *earlier, name = sites
        assert sites[name].shape == lead + {"z0": (5, 1), "z1": (5, 2)}[name]
        assert all(not sites[other].requires_grad for other in earlier)


@pytest.mark.parametrize("value, found", [(torch.zeros(3), r"shape \(3,\)"), (1.0, "float")])
@pytest.mark.parametrize("vectorized", [True, False])
def test_another_shape_than_one_value_per_unit_is_refused(value, found, vectorized):
    pair = table([], torch.zeros(5, requires_grad=True))
    objective = TraceLAX_ELBO(lambda sites: value, 2, vectorize_particles=vectorized)
    with pytest.raises(ValueError, match=f"control variate returned {found} for site 'z'"):
        objective.loss_and_grads(*pair)


def test_a_control_variate_without_z_is_a_baseline():
    """Of the score function, by hand."""
    loc = torch.full((20,), 0.4, requires_grad=True)
    pair, gradients = table([], loc), []
    for objective in (TraceLAX_ELBO(lambda sites: torch.tensor(-1.5)), score()):
        objective.loss(*pair)
        pyro.set_rng_seed(2)
        gradients += torch.autograd.grad(objective.differentiable_loss(*pair), loc)
    pyro.set_rng_seed(2)
    z = dist.Normal(loc, 0.5).sample()
    shift = -1.5 * (z - loc.detach()) / 0.5**2
    torch.testing.assert_close(gradients[0], gradients[1] + shift)


# --- what is learned -----------------------------------------------------------------------------


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))

    def forward(self, sites):
        (*_, z) = sites.values()
        return self.weight[0] + self.weight[1] * z + self.weight[2] * z**2


def score():
    return TraceScore_ELBO(score_sites="all")


def at_seed(objective, pair, leaves):
    pyro.set_rng_seed(3)
    return torch.autograd.grad(objective.differentiable_loss(*pair), leaves)


@pytest.mark.parametrize("vectorized", [True, False])
def test_control_variates_learn_from_the_squared_gradient(vectorized):
    """By finite differences, where a parameter of the guide is also the model's."""
    problem, module = Chain(copies=3), Quadratic()
    p = problem.leaves(1)
    pair = problem.pair(p)
    objective = TraceLAX_ELBO(module, 2, vectorize_particles=vectorized)
    objective.loss(*pair)
    (found,) = at_seed(objective, pair, module.weight)
    step, expected = 1e-5, []
    for k in range(3):
        squares = []
        for size in (step, -2 * step):
            module.weight.data[k] += size
            squares.append(at_seed(objective, pair, p)[0].square().sum())
        module.weight.data[k] += step
        expected.append((squares[0] - squares[1]) / (2 * step))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-5)
    assert (found.abs() > 1e-3).all()


def test_neither_guide_nor_model_sees_what_it_learns_from():
    """Their gradient is the same when there is nothing to learn."""
    problem, module, found = Chain(copies=3), Quadratic(), []
    p = problem.leaves(1)
    pair = problem.pair(p)
    for learns in (True, False):
        module.requires_grad_(learns)
        pyro.clear_param_store()
        objective = TraceLAX_ELBO(module, 2)
        objective.loss(*pair)
        found += at_seed(objective, pair, p)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_training_lowers_the_variance_below_that_of_the_score_function():
    loc = torch.full((500,), 0.4, requires_grad=True)
    pair, objective = table([], loc), TraceLAX_ELBO(hidden_dims=(10,))

    def spread(objective):
        losses = [objective.differentiable_loss(*pair) for _ in range(20)]
        return torch.cat([torch.autograd.grad(loss, loc)[0] for loss in losses]).var().item()

    assert spread(objective) == pytest.approx(spread(score()), rel=0.1)  # the network is zero
    learned = list(objective.learned.parameters())
    adam = torch.optim.Adam(learned, lr=0.03)
    for _ in range(100):
        slopes = torch.autograd.grad(objective.differentiable_loss(*pair), learned)
        for parameter, slope in zip(learned, slopes, strict=True):
            parameter.grad = slope
        adam.step()
    assert spread(objective) < 0.2 * spread(score())


# --- refusals ------------------------------------------------------------------------------------


def test_a_discrete_draw_is_refused_by_name():
    logits = torch.zeros((), requires_grad=True)

    def pair(logits):
        return lambda: pyro.sample("b", dist.Bernoulli(logits=logits))

    objective = TraceLAX_ELBO()
    with pytest.raises(NotImplementedError, match="site 'b' .Bernoulli. is not repara.*RELAX"):
        objective.loss_and_grads(pair(torch.zeros(())), pair(logits))
    assert math.isfinite(objective.loss(pair(torch.zeros(())), pair(logits)))
