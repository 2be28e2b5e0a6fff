"""Evidence by annealing against closed forms; E[w] = p(x) with hardly any temperatures."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vi_ext import unconstrained
from pyro_vi_ext.annealed import annealed_log_weights

pytestmark = pytest.mark.usefixtures("float64")


def weights(model, *args, **options):
    chunks = list(annealed_log_weights(model, args, **options))
    return torch.cat([chunk.log_weights for chunk in chunks])


def estimate(log_w):
    """log of the mean weight, its standard error by the delta method, effective sample size."""
    n = len(log_w)
    w = (log_w - log_w.amax(0)).exp()
    log_mean = log_w.logsumexp(0) - math.log(n)
    return log_mean, w.std(0) / w.mean(0) / n**0.5, w.sum(0) ** 2 / w.square().sum(0)


def assert_evidence(log_w, exact, least_ess=30.0):
    log_mean, error, ess = estimate(log_w)
    assert (ess > least_ess).all(), ess
    assert ((log_mean - exact).abs() < 4 * error).all(), (log_mean, exact, error)


# --- models whose evidence is known ------------------------------------------------------------


def far_data(x, scale):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, scale), obs=x)


def linear_gaussian(x, loading):
    z = pyro.sample("z", dist.Normal(torch.zeros(loading.shape[1]), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z @ loading.T, 0.3).to_event(1), obs=x)


def beta_bernoulli(x):
    p = pyro.sample("p", dist.Beta(0.5, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(p), obs=x)


def gamma_poisson(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def dirichlet_multinomial(x, concentration):
    p = pyro.sample("p", dist.Dirichlet(concentration))
    pyro.sample("x", dist.Multinomial(int(x.sum()), p), obs=x)


def local(x, scale, size=None, index=None):
    """One latent per datum; a unit is a datum."""
    with pyro.plate("data", len(x), subsample_size=size, subsample=index) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x[i])


BITS = torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.float64)
COUNTS = torch.tensor([9.0, 12, 14, 8], dtype=torch.float64)
VOTES = torch.tensor([7.0, 1, 4, 0], dtype=torch.float64)
PRIOR_VOTES = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)


def log_beta(*concentration):
    concentration = torch.as_tensor(concentration, dtype=torch.float64)
    return concentration.lgamma().sum() - concentration.sum().lgamma()


def beta_bernoulli_evidence():
    ones = BITS.sum().item()
    return log_beta(0.5 + ones, 2.0 + len(BITS) - ones) - log_beta(0.5, 2.0)


def gamma_poisson_evidence(a=2.0, b=0.5):
    total, n = COUNTS.sum().item(), len(COUNTS)
    log_p = a * math.log(b) - math.lgamma(a) + math.lgamma(a + total)
    return log_p - (a + total) * math.log(b + n) - (COUNTS + 1).lgamma().sum()


def dirichlet_multinomial_evidence():
    orders = (VOTES.sum() + 1).lgamma() - (VOTES + 1).lgamma().sum()
    return orders + log_beta(*(VOTES + PRIOR_VOTES)) - log_beta(*PRIOR_VOTES)


CONSTRAINED = {
    "beta_bernoulli": (beta_bernoulli, (BITS,), beta_bernoulli_evidence),
    "gamma_poisson": (gamma_poisson, (COUNTS,), gamma_poisson_evidence),
    "dirichlet_multinomial": (
        dirichlet_multinomial,
        (VOTES, PRIOR_VOTES),
        dirichlet_multinomial_evidence,
    ),
}

# --- the evidence ------------------------------------------------------------------------------


def test_annealing_finds_what_the_prior_misses():
    x, scale = torch.tensor(6.0), 0.1
    exact = dist.Normal(0.0, math.hypot(1.0, scale)).log_prob(x)
    size = {"num_particles": 1000, "chunk_size": 1000}
    assert_evidence(weights(far_data, x, scale, num_temperatures=100, **size), exact, 100.0)
    prior = weights(far_data, x, scale, num_temperatures=1, **size)
    log_mean, error, ess = estimate(prior)
    assert ess < 1.5 and (log_mean - exact).abs() > 10 * error


def test_one_temperature_is_importance_sampling_from_the_prior():
    x = torch.tensor(0.7)
    (chunk,) = annealed_log_weights(
        far_data, (x, 1.0), num_particles=4000, num_temperatures=1, chunk_size=4000
    )
    assert_evidence(chunk.log_weights, dist.Normal(0.0, math.sqrt(2.0)).log_prob(x))
    assert chunk.acceptance.isnan() and chunk.step_size.shape == (0,)


def test_a_correlated_posterior():
    loading = torch.randn(6, 4)
    x = loading @ torch.randn(4) + 0.3 * torch.randn(6)
    cov = loading @ loading.T + 0.09 * torch.eye(6)
    exact = dist.MultivariateNormal(torch.zeros(6), cov).log_prob(x)
    log_w = weights(
        *(linear_gaussian, x, loading),
        num_particles=1000,
        num_temperatures=60,
        chunk_size=1000,
    )
    assert_evidence(log_w, exact)


@pytest.mark.parametrize("name", CONSTRAINED)
def test_constrained_latents(name):
    model, args, exact = CONSTRAINED[name]
    log_w = weights(
        model, *args, num_particles=500, num_temperatures=20, chunk_size=250, num_leapfrog_steps=4
    )
    assert_evidence(log_w, exact(), 100.0)


def test_every_unit_has_its_own_evidence():
    """Data near and far in one plate, so that no common step or acceptance would do."""
    x = torch.tensor([0.0, 1.0, -6.0, 4.0])
    scale = torch.tensor([1.0, 0.02, 0.5, 0.05])
    chunks = list(
        annealed_log_weights(
            local, (x, scale), num_particles=600, num_temperatures=40, num_leapfrog_steps=5
        )
    )
    log_w = torch.cat([chunk.log_weights for chunk in chunks])
    assert log_w.shape == (600, 4) and list(chunks[0].plates) == ["data"]
    assert_evidence(log_w, dist.Normal(0.0, (1 + scale**2).sqrt()).log_prob(x), 20.0)
    chunk = chunks[0]
    assert chunk.scale == 1.0 and chunk.acceptance.shape == (4,)
    assert chunk.step_size.shape == (39, 4)
    assert ((chunk.acceptance > 0.5) & (chunk.acceptance <= 1.0)).all()


def test_a_subsample_is_scaled_outside_the_weights():
    x = torch.randn(20)
    (chunk,) = annealed_log_weights(
        local, (x, 0.5, 5), num_particles=400, num_temperatures=20, chunk_size=400
    )
    assert chunk.log_weights.shape == (400, 5) and chunk.scale == pytest.approx(20 / 5)
    index = chunk.plates["data"]
    assert index.size == 5
    fixed = torch.tensor([3, 4, 5, 6, 19])
    (chunk,) = annealed_log_weights(
        local, (x, 0.5, None, fixed), num_particles=400, num_temperatures=20, chunk_size=400
    )
    assert_evidence(chunk.log_weights, dist.Normal(0.0, 1.25**0.5).log_prob(x[fixed]), 100.0)


def test_a_likelihood_that_excludes_most_of_the_prior():
    """log p(x | z) = -inf for z < 1: weights of zero, and no NaN."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("window", torch.where(z > 1.0, 0.0, -math.inf))

    log_w = weights(model, num_particles=2000, num_temperatures=5, chunk_size=2000)
    assert not log_w.isnan().any() and (log_w == -math.inf).any()
    assert_evidence(log_w, dist.Normal(0.0, 1.0).cdf(torch.tensor(-1.0)).log())


def test_a_density_that_is_infinite_is_no_place_to_go():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("tilt", torch.where(z < 4.0, 2.0 * z, math.inf))

    log_w = weights(model, num_particles=500, num_temperatures=20, chunk_size=500)
    normal = dist.Normal(0.0, 1.0)  # of the finite part: e^2 Phi(4 - 2)
    assert_evidence(log_w, 2.0 + normal.cdf(torch.tensor(2.0)).log())


def test_divergent_proposals_are_rejected():
    """The density of x overflows where the leapfrog of a badly scaled model goes."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(0.0, (z.exp()).exp()), obs=x)

    x = torch.tensor(0.5)
    grid = torch.linspace(-30.0, 30.0, 200_001)
    log_joint = dist.Normal(0.0, 3.0).log_prob(grid)
    log_joint = log_joint + dist.Normal(0.0, grid.exp().exp(), validate_args=False).log_prob(x)
    exact = torch.trapezoid(log_joint.exp().nan_to_num(0.0), grid).log()
    with pyro.validation_enabled(False):
        log_w = weights(model, x, num_particles=1000, num_temperatures=10, chunk_size=1000)
    assert not log_w.isnan().any()
    assert_evidence(log_w, exact)


def test_proposals_whose_covariance_is_no_covariance_are_rejected():
    """The posterior of a correlation is near 1, where a Cholesky factorisation fails."""

    def model(x):
        rho = pyro.sample("rho", dist.Normal(0.0, 0.2))
        cov = torch.eye(2) + rho[..., None, None] * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), cov), obs=x)

    x = torch.tensor([6.0, 5.5])
    rho = torch.linspace(-1.0, 1.0, 200_001)[1:-1]
    square = ((x**2).sum() - 2 * rho * x.prod()) / (1 - rho**2)
    log_lik = -0.5 * (square + (1 - rho**2).log()) - math.log(2 * math.pi)
    exact = torch.trapezoid((log_lik + dist.Normal(0.0, 0.2).log_prob(rho)).exp(), rho).log()
    options = {"num_temperatures": 25, "num_leapfrog_steps": 4, "chunk_size": 500}
    assert_evidence(weights(model, x, num_particles=500, **options), exact, 100.0)


# --- unbiased for any number of temperatures ---------------------------------------------------


def mean_weight_in_standard_errors(model, args, exact):
    """Few temperatures and steps, so that transitions are far from exact draws."""
    log_w = weights(
        model,
        *args,
        num_particles=20_000,
        num_temperatures=3,
        chunk_size=20_000,
        num_leapfrog_steps=2,
    )
    w = (log_w - exact).exp()
    return ((w.mean() - 1.0) / (w.std() / len(w) ** 0.5)).item()


@pytest.mark.parametrize("name", CONSTRAINED)
def test_the_mean_weight_is_the_evidence(name, monkeypatch):
    model, args, exact = CONSTRAINED[name]
    assert abs(mean_weight_in_standard_errors(model, args, exact())) < 4
    monkeypatch.setattr(unconstrained, "sum_rightmost", lambda x, n: 0.0)  # no Jacobian
    assert abs(mean_weight_in_standard_errors(model, args, exact())) > 4


def test_every_unit_accepts_by_itself():
    """Were the units to accept together, the mean weight of each would be wrong."""
    x, scale = torch.tensor([0.0, 2.0, -3.0]), torch.tensor([1.0, 0.3, 0.7])
    exact = dist.Normal(0.0, (1 + scale**2).sqrt()).log_prob(x)
    log_w = weights(
        *(local, x, scale),
        num_particles=40_000,
        num_temperatures=6,
        chunk_size=40_000,
        num_leapfrog_steps=1,
    )
    w = (log_w - exact).exp()
    assert ((w.mean(0) - 1.0).abs() < 4 * w.std(0) / len(w) ** 0.5).all()


def test_more_temperatures_mean_less_variance():
    x = torch.tensor(3.0)
    spread = [
        weights(
            far_data,
            *(x, 0.2),
            num_particles=400,
            num_temperatures=t,
            chunk_size=400,
            num_leapfrog_steps=4,
        ).std()
        for t in (4, 16, 64)
    ]
    assert spread[0] > 2 * spread[1] and spread[1] > 1.5 * spread[2]


# --- the machinery -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_model_and_the_seed_decides(dtype):
    x = torch.tensor(1.5, dtype=dtype)

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    runs = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        runs.append(weights(model, x, num_particles=300, num_temperatures=10))
    assert runs[0].dtype == dtype and torch.equal(*runs)
    assert_evidence(runs[0], dist.Normal(0.0, 1.25**0.5).log_prob(x))


def test_sequential_particles_and_a_last_chunk_that_is_smaller():
    x = torch.tensor([1.0, -0.5])
    chunks = list(
        annealed_log_weights(
            local,
            (x, 0.7),
            num_particles=50,
            num_temperatures=5,
            chunk_size=40,
            num_leapfrog_steps=3,
            vectorize_particles=False,
        )
    )
    assert [len(chunk.log_weights) for chunk in chunks] == [40, 10]
    log_w = torch.cat([chunk.log_weights for chunk in chunks])
    assert_evidence(log_w, dist.Normal(0.0, 1.49**0.5).log_prob(x), 20.0)


def test_progress_and_cost_are_as_documented():
    runs, seen = [], []

    def model(x):
        runs.append(1)
        far_data(x, 0.5)

    options = {"num_particles": 8, "chunk_size": 3, "num_leapfrog_steps": 4}
    with pyro.validation_enabled(False):
        chunks = annealed_log_weights(
            model,
            (torch.tensor(1.0),),
            num_temperatures=6,
            progress=lambda done, total: seen.append((done, total)),
            **options,
        )
        assert seen == [(i + 1, 20) for i in range(5)]  # the pilot run is over
        for _ in range(3):
            runs.clear()
            next(chunks)
            assert len(runs) == (4 + 1) * (6 - 1) + 2
    assert seen == [(i + 1, 20) for i in range(20)]


def test_parameters_keep_their_gradients():
    loc = torch.zeros((), requires_grad=True)

    def model(x):
        z = pyro.sample("z", dist.Normal(loc, pyro.param("s", torch.tensor(1.0))))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    loc.grad = torch.tensor(7.0)
    with torch.no_grad():
        log_w = weights(model, torch.tensor(1.0), num_particles=3, num_temperatures=3)
    assert loc.grad == 7.0 and pyro.param("s").unconstrained().grad is None
    assert not log_w.requires_grad


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_particles": 0}, "num_particles"),
        ({"num_temperatures": 0}, "num_temperatures"),
        ({"chunk_size": 1.5}, "chunk_size"),
        ({"num_leapfrog_steps": 0}, "num_leapfrog_steps"),
        ({"target_accept": 1.0}, "target_accept"),
    ],
)
def test_arguments_out_of_range(change, message):
    options = {"num_particles": 10, "num_temperatures": 3} | change
    with pytest.raises(ValueError, match=message):
        annealed_log_weights(far_data, (torch.tensor(1.0), 1.0), **options)
