"""SemiImplicitELBO against Gauss-Hermite quadrature at the same K, never against its limit."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vi_ext import SemiImplicitELBO

S, RHO = 0.8, 0.6  # q(z | psi) = N(m + b psi, S^2), psi ~ N(0, 1); q(z) = N(m, S^2 + b^2)


pytestmark = pytest.mark.usefixtures("float64")


def grid(dims, points):
    """Nodes (dims, n) and weights (n,) of a standard normal expectation in `dims` dimensions."""
    x, w = np.polynomial.hermite_e.hermegauss(points)
    w = w / w.sum()
    nodes = torch.tensor(list(itertools.product(x, repeat=dims))).T
    weights = torch.tensor(list(itertools.product(w, repeat=dims))).prod(1)
    return nodes, weights


def log_normal(z, mean, sd):
    return dist.Normal(mean, sd).log_prob(z)


def lower_by_quadrature(num_mixing, log_p, points, m=0.0, b=RHO, s=S):
    nodes, w = grid(num_mixing + 2, points)
    psi, e, extra = nodes[0], nodes[1], nodes[2:]
    z = m + b * psi + s * e
    q = torch.stack([log_normal(z, m + b * p, s) for p in [psi, *extra]])
    log_h = q.logsumexp(0) - math.log(num_mixing + 1)
    return (w * (log_p(z) - log_h)).sum()


def upper_by_quadrature(num_mixing, log_p, points):
    nodes, w = grid(num_mixing + 2, points)
    z = RHO * nodes[0] + S * nodes[1]
    q = torch.stack([log_normal(z, RHO * p, S) for p in nodes[2:]])
    return (w * (log_p(z) - q.logsumexp(0) + math.log(num_mixing))).sum()


def standard_normal(z):
    return log_normal(z, 0.0, 1.0)


def model():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def guide():
    psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    pyro.sample("z", dist.Normal(RHO * psi, S))


def mean_and_error(objective, model, guide, repeats=200, args=()):
    draws = torch.tensor([-objective.loss(model, guide, *args) for _ in range(repeats)])
    return draws.mean().item(), (draws.std() / math.sqrt(repeats)).item()


def assert_within(objective, model, guide, expected, args=(), repeats=200):
    mean, error = mean_and_error(objective, model, guide, repeats, args)
    assert abs(mean - float(expected)) < 4 * error + 1e-12, (mean, error, float(expected))
    assert error < 0.025  # sharp enough to tell


SEQUENTIAL = dict(vectorize_particles=False)


@pytest.mark.parametrize("num_mixing", [0, 1, 2])
def test_lower_bound_equals_quadrature(num_mixing):
    expected = lower_by_quadrature(num_mixing, standard_normal, 24)
    assert_within(SemiImplicitELBO(100, num_mixing), model, guide, expected)


@pytest.mark.parametrize("num_mixing", [1, 2])
def test_upper_bound_equals_quadrature(num_mixing):
    expected = upper_by_quadrature(num_mixing, standard_normal, 32)
    assert_within(
        SemiImplicitELBO(200, num_mixing, bound="upper"), model, guide, expected, repeats=600
    )


@pytest.mark.parametrize("particles", [1, 5])
def test_sequential_particles_equal_quadrature(particles):
    expected = lower_by_quadrature(1, standard_normal, 24)
    objective = SemiImplicitELBO(particles, 1, **SEQUENTIAL)
    assert_within(objective, model, guide, expected, repeats=1500)


def test_sequential_guides_need_not_broadcast():
    """vectorize_particles=False also runs the extra draws one by one, for any number of them."""

    def scalar_only():
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(RHO * psi + 0 * psi.item(), S))

    for particles in (1, 2):
        SemiImplicitELBO(particles, 3, **SEQUENTIAL).loss(model, scalar_only)
        with pytest.raises(ValueError, match="vectorize_particles=False"):
            SemiImplicitELBO(particles, 3).loss(model, scalar_only)


def importance_weighted_by_quadrature(points):
    nodes, w = grid(5, points)
    extra = nodes[4]
    log_w = []
    for psi, e in (nodes[0:2], nodes[2:4]):
        z = RHO * psi + S * e
        log_h = torch.logaddexp(log_normal(z, RHO * psi, S), log_normal(z, RHO * extra, S))
        log_w.append(standard_normal(z) - log_h + math.log(2))
    return (w * (torch.logaddexp(*log_w) - math.log(2))).sum()


@pytest.mark.parametrize("mode", [{}, SEQUENTIAL], ids=["vectorised", "sequential"])
def test_importance_weighted_equals_quadrature(mode):
    expected = importance_weighted_by_quadrature(14)
    assert lower_by_quadrature(1, standard_normal, 24) < expected < 0
    objective = SemiImplicitELBO(2, 1, importance_weighted=True, **mode)
    assert_within(objective, model, guide, expected, repeats=4000)


def test_biased_estimator_is_rejected():
    """The comparison has power: forgetting the own psi's place in the average is noticed."""
    expected = lower_by_quadrature(1, standard_normal, 24)
    mean, error = mean_and_error(SemiImplicitELBO(100, 1, bound="upper"), model, guide)
    assert abs(mean - float(expected)) > 10 * error


def test_bounds_are_monotone_and_sandwich():
    """K = 0, 1, 5, 20, 100 rise to the ELBO (here 0), the upper bounds fall to it."""
    lower = [mean_and_error(SemiImplicitELBO(500, k), model, guide, 60) for k in (0, 1, 5, 20, 100)]
    upper = [
        mean_and_error(SemiImplicitELBO(500, k, bound="upper"), model, guide, 60)
        for k in (100, 20, 5, 1)
    ]
    chain = [*lower, (0.0, 0.0), *upper]
    for (a, ea), (b, eb) in itertools.pairwise(chain):
        assert a < b + 4 * math.hypot(ea, eb)
    assert lower[0][0] < lower[1][0] - 0.03 and lower[1][0] < lower[2][0] - 0.03


def test_naive_guide_of_demand_reports_at_most_the_evidence():
    """Stock Trace_ELBO adds the entropy of the noise: +7.08 for a log evidence of 0."""

    def noisy():
        noise = dist.Normal(torch.zeros(5), 1.0).to_event(1)
        psi = pyro.sample("psi", noise, infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(RHO * psi[..., 0], S))

    stock = pyro.infer.Trace_ELBO(num_particles=20_000, vectorize_particles=True)
    wrong = -stock.loss(model, noisy)
    assert wrong == pytest.approx(2.5 * math.log(2 * math.pi * math.e), abs=0.3)
    assert_within(
        SemiImplicitELBO(100, 1), model, noisy, lower_by_quadrature(1, standard_normal, 24)
    )


# --- several conditionals, plates --------------------------------------------------------------


def test_average_is_over_the_product_of_dependent_conditionals():
    def two():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    def q():
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("a", dist.Normal(RHO * psi, S))
        pyro.sample("b", dist.Normal(-RHO * psi, S))

    nodes, w = grid(4, 20)
    psi, extra = nodes[0], nodes[3]
    a, b = RHO * psi + S * nodes[1], -RHO * psi + S * nodes[2]
    columns = [log_normal(a, RHO * p, S) + log_normal(b, -RHO * p, S) for p in (psi, extra)]
    log_h = torch.logaddexp(*columns) - math.log(2)
    expected = (w * (standard_normal(a) + standard_normal(b) - log_h)).sum()
    assert_within(SemiImplicitELBO(100, 1), two, q, expected)
    assert_within(SemiImplicitELBO(1, 1, **SEQUENTIAL), two, q, expected, repeats=5000)


def test_conditionals_independent_of_the_noise_factor_out():
    def two():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    def q():
        guide()
        pyro.sample("b", dist.Normal(0.5, 1.0))

    expected = lower_by_quadrature(1, standard_normal, 24) - 0.125
    assert_within(SemiImplicitELBO(100, 1), two, q, expected)


def chain_model():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(a, 1.0))


def test_dependence_through_another_site_factors_out():
    def q():
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        a = pyro.sample("a", dist.Normal(RHO * psi, S))
        pyro.sample("b", dist.Normal(a, 1.0))

    expected = lower_by_quadrature(1, standard_normal, 24)
    assert_within(SemiImplicitELBO(100, 1), chain_model, q, expected)


def test_conditional_on_a_conditional_and_the_noise():
    """The guide concatenates z1 and psi, so both must have shape (J, K) in the second run."""

    def q():
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        a = pyro.sample("a", dist.Normal(RHO * psi, S))
        mean = torch.stack([a, psi], -1) @ torch.tensor([1.0, 0.5])
        pyro.sample("b", dist.Normal(mean, 0.9))

    nodes, w = grid(4, 20)
    psi, extra = nodes[0], nodes[3]
    a = RHO * psi + S * nodes[1]
    b = a + 0.5 * psi + 0.9 * nodes[2]
    columns = [log_normal(a, RHO * p, S) + log_normal(b, a + 0.5 * p, 0.9) for p in (psi, extra)]
    log_h = torch.logaddexp(*columns) - math.log(2)
    expected = (w * (standard_normal(a) + log_normal(b, a, 1.0) - log_h)).sum()
    for objective, repeats in [
        (SemiImplicitELBO(100, 1), 200),
        (SemiImplicitELBO(1, 1), 5000),
        (SemiImplicitELBO(2, 1, **SEQUENTIAL), 2000),
    ]:
        assert_within(objective, chain_model, q, expected, repeats=repeats)


X = torch.tensor([0.3, -1.2, 0.8, 1.9])


def plated(x, batch=None):
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def plated_guide(x, batch=None):
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(x[index] / 2 + RHO * psi, S))


def plated_by_quadrature(num_mixing=1):
    total = 0.0
    for x in X:
        log_p = lambda z: standard_normal(z) + log_normal(x, z, 1.0)  # noqa: B023, E731
        total += lower_by_quadrature(num_mixing, log_p, 24, m=x / 2)
    return total


@pytest.mark.parametrize("batch", [None, 2, 1])
def test_noise_inside_a_plate_is_averaged_per_unit(batch):
    repeats = 200 if batch is None else 4000  # the minibatch is most of the noise
    objective = SemiImplicitELBO(50, 1)
    expected = plated_by_quadrature()
    assert_within(objective, plated, plated_guide, expected, (X, batch), repeats)


def test_noise_outside_the_plate_is_averaged_over_the_product():
    def q(x):
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + RHO * psi, S))

    x = X[:2]
    nodes, w = grid(4, 20)
    psi, extra = nodes[0], nodes[3]
    z = torch.stack([x[i] / 2 + RHO * psi + S * nodes[1 + i] for i in (0, 1)])
    columns = [sum(log_normal(z[i], x[i] / 2 + RHO * p, S) for i in (0, 1)) for p in (psi, extra)]
    log_h = torch.logaddexp(*columns) - math.log(2)
    log_p = sum(standard_normal(z[i]) + log_normal(x[i], z[i], 1.0) for i in (0, 1))
    expected = (w * (log_p - log_h)).sum()
    assert_within(SemiImplicitELBO(100, 1), plated, q, expected, (x,))


@pytest.mark.parametrize("batch", [None, 2, 1])
def test_importance_weights_are_per_unit_and_unscaled(batch):
    """E over minibatches of the J = 2, K = 1 bound does not depend on the minibatch."""
    objective = SemiImplicitELBO(2, 1, importance_weighted=True)
    mean, error = mean_and_error(objective, plated, plated_guide, 4000, (X, batch))
    expected = 0.0
    for x in X:
        nodes, w = grid(5, 12)
        log_w = []
        for psi, e in (nodes[0:2], nodes[2:4]):
            z = x / 2 + RHO * psi + S * e
            q = [log_normal(z, x / 2 + RHO * p, S) for p in (psi, nodes[4])]
            log_h = torch.logaddexp(*q) - math.log(2)
            log_w.append(standard_normal(z) + log_normal(x, z, 1.0) - log_h)
        expected += (w * (torch.logaddexp(*log_w) - math.log(2))).sum().item()
    assert abs(mean - expected) < 4 * error


# --- gradients ---------------------------------------------------------------------------------


def gradient_by_quadrature(num_mixing):
    m, b, s = (torch.tensor(v, requires_grad=True) for v in (0.3, 0.5, 0.7))
    value = lower_by_quadrature(num_mixing, standard_normal, 24, m, b, s)
    return torch.stack(torch.autograd.grad(-value, [m, b, s]))


def learned_guide(detach=False):
    m = pyro.param("m", lambda: torch.tensor(0.3))
    b = pyro.param("b", lambda: torch.tensor(0.5))
    s = pyro.param("s", lambda: torch.tensor(0.7))
    psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    mean = m + b * psi
    pyro.sample("z", dist.Normal(mean.detach() if detach else mean, s))


def gradient_draws(detach, repeats=400):
    module = SemiImplicitELBO(50, 1)(lambda detach: model(), learned_guide)
    module(detach)
    leaves = [pyro.param(name).unconstrained() for name in "mbs"]
    draws = []
    for _ in range(repeats):
        grads = torch.autograd.grad(module(detach), leaves, allow_unused=True)
        draws.append(torch.stack([torch.zeros(()) if g is None else g for g in grads]))
    draws = torch.stack(draws)
    return draws.mean(0), draws.std(0) / math.sqrt(repeats)


def test_gradient_is_unbiased_for_the_stated_bound():
    mean, error = gradient_draws(detach=False)
    assert ((mean - gradient_by_quadrature(1)).abs() < 4 * error).all()
    biased, error = gradient_draws(detach=True)
    assert ((biased - gradient_by_quadrature(1)).abs() > 10 * error).any()


def test_exact_posterior_without_noise_has_zero_variance():
    def exact(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    evidence = dist.Normal(0.0, 2**0.5).log_prob(X).sum().item()
    for kwargs in [dict(), dict(importance_weighted=True), dict(bound="upper")]:
        assert -SemiImplicitELBO(3, 4, **kwargs).loss(plated, exact, X) == pytest.approx(evidence)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(num_mixing_particles=-1), "num_mixing_particles must be an integer >= 0"),
        (dict(num_mixing_particles=2.0), "num_mixing_particles"),
        (dict(num_particles=0), "num_particles must be an integer >= 1"),
        (dict(bound="middle"), "bound must be"),
        (dict(bound="upper", num_mixing_particles=0), "num_mixing_particles=0"),
        (dict(bound="upper", importance_weighted=True), "bounds nothing"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SemiImplicitELBO(**kwargs)


def test_discrete_conditional_is_refused():
    def discrete():
        pyro.sample("z", dist.Bernoulli(0.3))

    with pytest.raises(NotImplementedError, match="'z' .Bernoulli. is not reparameterised"):
        SemiImplicitELBO().loss(discrete, discrete)


def test_learned_discrete_noise_is_refused_and_fixed_noise_is_not():
    def noisy(logits):
        psi = pyro.sample("psi", dist.Bernoulli(logits=logits), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(psi, 1.0))

    def target(logits):
        model()

    SemiImplicitELBO().differentiable_loss(target, noisy, torch.tensor(0.0))
    with pytest.raises(ValueError, match="Mixing site 'psi' is not reparameterised"):
        SemiImplicitELBO().differentiable_loss(target, noisy, torch.tensor(0.0, requires_grad=True))


def test_delta_of_a_mixing_site_is_refused():
    def q():
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("a", dist.Normal(psi, 1.0))
        pyro.sample("b", dist.Delta(psi))

    with pytest.raises(ValueError, match="'b' is a Delta that depends directly on the mixing"):
        SemiImplicitELBO().loss(chain_model, q)


def test_implicit_guide_without_density_is_refused():
    def q():
        noise = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        psi = pyro.sample("psi", noise, infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(psi.sum(-1)))

    with pytest.raises(ValueError, match="'psi' has 3 dimensions.*'z'.*have 1"):
        SemiImplicitELBO().loss(model, q)


def test_subsampled_conditional_with_noise_outside_its_plate_is_refused():
    def q(x, batch):
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        with pyro.plate("data", len(x), subsample_size=batch) as index:
            pyro.sample("z", dist.Normal(x[index] / 2 + RHO * psi, S))

    with pytest.raises(ValueError, match="'z' is in the subsampled plate 'data'.*'psi' is outside"):
        SemiImplicitELBO().loss(plated, q, X, 2)


def test_importance_weights_with_subsampling_and_global_latents_are_refused():
    def hierarchical(x, batch):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=batch) as index:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])

    def q(x, batch):
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    SemiImplicitELBO(3).loss(hierarchical, q, X, 2)
    iw = SemiImplicitELBO(3, importance_weighted=True)
    with pytest.raises(ValueError, match="one scale per unit, but site 'loc' .* site 'x'"):
        iw.loss(hierarchical, q, X, 2)
    iw.loss(hierarchical, q, X, None)


def test_dependence_that_comes_and_goes_is_noticed():
    """Roles are learned once; a log h_K with the wrong number of columns is no bound."""

    def q(x, on):
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(1 + (psi / 2 if on else 0.0), 0.5))

    def target(x, on):
        model()

    objective = SemiImplicitELBO(20, 30)
    objective.loss(target, q, X, True)
    with pytest.raises(ValueError, match="'z' and 30 extra draws.*do not depend on the mixing"):
        objective.loss(target, q, X, False)


def test_indexing_from_the_left_is_noticed():
    def target():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def q():
        noise = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        psi = pyro.sample("psi", noise, infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(torch.stack([psi[0], psi[1]], -1), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"\[..., i\]"):
        SemiImplicitELBO(1, 7).loss(target, q)
    SemiImplicitELBO(1, 7, **SEQUENTIAL).loss(target, q)


@pytest.mark.parametrize("total", [lambda z: z.sum(), lambda z: z.sum(-1)], ids=["all", "right"])
def test_models_that_mix_particles_are_noticed(total):
    def target():
        with pyro.plate("units", 7):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(total(z), 1.0), obs=torch.tensor(1.0))

    def q():
        with pyro.plate("units", 7):
            pyro.sample("z", dist.Normal(0.0, 0.5))

    with pytest.raises(ValueError, match="'y'.*vectorize_particles=False"):
        SemiImplicitELBO(5).loss(target, q)
    SemiImplicitELBO(5, **SEQUENTIAL).loss(target, q)


@pytest.mark.parametrize("mode", [{}, SEQUENTIAL], ids=["vectorised", "sequential"])
def test_subsampled_sequential_plates(mode):
    def target(x):
        for i in pyro.plate("data", len(x), subsample_size=2):
            z = pyro.sample(f"z{int(i)}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{int(i)}", dist.Normal(z, 1.0), obs=x[int(i)])

    def q(x):
        for i in pyro.plate("data", len(x), subsample_size=2):
            pyro.sample(f"z{int(i)}", dist.Normal(x[int(i)] / 2, 0.5**0.5))

    x = torch.full((4,), 0.7)
    expected = 4 * dist.Normal(0.0, 2**0.5).log_prob(x[0]).item()
    assert -SemiImplicitELBO(3, 2, **mode).loss(target, q, x) == pytest.approx(expected)


def test_deterministic_site_in_a_plate_of_its_own():
    def target():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 3):
            pyro.deterministic("r", z * torch.ones(3))

    SemiImplicitELBO(5, 4).loss(target, guide)
