"""Evidence against closed forms, within calibrated errors; units, scales, smoothing, annealing."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal

from pyro_vi_ext import Evidence, log_evidence

pytestmark = pytest.mark.usefixtures("float64")

SD = 2.0**0.5  # of x under `local`


def local(x, scale=1.0):
    """One latent per datum: log p(x_u) = log N(x_u; 0, 1 + scale^2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def wide(x, scale=1.0):
    """Posterior mean, and 1.3 times the posterior's standard deviation."""
    precision = 1 + 1 / torch.as_tensor(scale) ** 2
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / scale**2 / precision, 1.3 * precision**-0.5))


LOADING = torch.tensor([[1.0, 0.3], [-0.5, 2.0], [0.2, 0.1]], dtype=torch.float64)


def regression(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 3):
        mean = z[..., 0] * LOADING[:, 0] + z[..., 1] * LOADING[:, 1]
        pyro.sample("x", dist.Normal(mean, 0.5), obs=x)


def regression_guide(x):
    cov = torch.linalg.inv(torch.eye(2) + LOADING.T @ LOADING / 0.25)
    loc = cov @ LOADING.T @ x / 0.25
    pyro.sample("z", dist.MultivariateNormal(loc + 0.05, 1.5 * cov))


def distance(estimate, exact):
    """From the exact value, in standard errors."""
    return (estimate.log_evidence - exact) / estimate.standard_error


# --- importance sampling -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "guide, num, vectorized",
    [(regression_guide, 4000, True), (regression_guide, 400, False), (None, 20_000, True)],
    ids=["guide", "one by one", "prior"],
)
def test_linear_gaussian_evidence(guide, num, vectorized):
    x = torch.tensor([0.5, -0.3, 0.4])
    cov = LOADING @ LOADING.T + 0.25 * torch.eye(3)
    exact = dist.MultivariateNormal(torch.zeros(3), cov).log_prob(x)
    options = {"num_particles": num, "chunk_size": 500, "vectorize_particles": vectorized}
    estimate = log_evidence(regression, guide, x, **options)
    assert abs(distance(estimate, exact)) < 4 and estimate.standard_error < 0.1
    assert abs(distance(estimate, exact + 1.0)) > 4
    assert estimate.plates == () and estimate.log_evidence.shape == ()
    assert float(estimate) == estimate.total == estimate.log_evidence.item()
    assert estimate.total_standard_error == estimate.standard_error.item()
    assert estimate.pareto_k < 0.7 and estimate.acceptance is None
    assert (estimate.num_particles, estimate.method) == (num, "importance")


@pytest.mark.parametrize("guide", [wide, None], ids=["guide", "prior"])
def test_standard_errors_are_calibrated(guide):
    """Over 400 units z-scores have mean 0 and variance 1, and an offset of 0.01 nats shows."""
    x = torch.linspace(-2.0, 2.0, 400)
    exact = dist.Normal(0.0, SD).log_prob(x)
    estimate = log_evidence(local, guide, x, num_particles=4000)
    z = distance(estimate, exact)
    assert abs(z.mean()) < 4 / 20 and abs(z.square().mean() - 1) < 4 * (2 / 400) ** 0.5
    total = (estimate.total - exact.sum()) / estimate.total_standard_error
    assert abs(total) < 4
    assert abs(total - 0.01 * 400 / estimate.total_standard_error) > 4


def test_the_exact_posterior_needs_one_draw():
    x = torch.linspace(-2.0, 2.0, 5)

    def posterior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1 / SD))

    estimate = log_evidence(local, posterior, x, num_particles=50)
    exact = dist.Normal(0.0, SD).log_prob(x)
    for value in (estimate.log_evidence, estimate.log_evidence_psis, estimate.elbo):
        torch.testing.assert_close(value, exact)
    torch.testing.assert_close(estimate.ess, torch.full((5,), 50.0))
    assert (estimate.standard_error < 1e-12).all() and (estimate.pareto_k == -math.inf).all()


def test_discrete_latents_need_no_reparameterisation():
    """ESS and ELBO of weights with two values are known."""
    x = torch.tensor([1.0, 0.0, 1.0])

    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Bernoulli(0.1 + 0.8 * z), obs=x)

    estimate = log_evidence(model, None, x, num_particles=10_000)
    assert (distance(estimate, math.log(0.5)).abs() < 4).all()
    w = torch.tensor([0.9, 0.1])
    mean, square = w.mean(), w.square().mean()
    error = 4 * w.log().std(correction=0) / 100
    assert ((estimate.elbo - w.log().mean()).abs() < error).all()
    ess = 10_000 * mean**2 / square
    slope = (2 / mean * 0.5 - 0.8 / square * 0.5).abs()  # of log ESS in the share of draws, / 0.8
    assert ((estimate.ess - ess).abs() < 4 * ess * 0.8 * slope * 0.5 / 100).all()
    assert (estimate.pareto_k == -math.inf).all()


def test_a_semi_implicit_guide():
    def guide(x):
        with pyro.plate("data", len(x)):
            psi = pyro.sample("psi", dist.Normal(x / 2, 0.6), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(psi, 0.7))

    x = torch.linspace(-2.0, 2.0, 100)
    estimate = log_evidence(local, guide, x, num_particles=2000, num_mixing_particles=4)
    z = distance(estimate, dist.Normal(0.0, SD).log_prob(x))
    assert abs(z.mean()) < 0.4 and abs(z.square().mean() - 1) < 4 * (2 / 100) ** 0.5


def test_an_autoguide_is_one_unit():
    x = torch.tensor([0.5, -0.3, 0.4])
    auto = AutoMultivariateNormal(local, init_scale=0.8)
    estimate = log_evidence(local, auto, x, num_particles=2000)
    assert estimate.plates == () and not estimate.log_evidence.requires_grad
    assert abs(distance(estimate, dist.Normal(0.0, SD).log_prob(x).sum())) < 4


# --- chunks ------------------------------------------------------------------------------------


def test_chunks_do_not_matter():
    """One particle after another draws the same numbers, whatever the chunks."""
    x = torch.tensor([0.5, -1.0])
    results = []
    for chunk_size in (60, 25, 1):
        pyro.set_rng_seed(1)
        options = {"num_particles": 60, "chunk_size": chunk_size, "vectorize_particles": False}
        results.append(log_evidence(local, wide, x, **options))
    whole, *others = results
    fields = ("log_evidence", "standard_error", "log_evidence_psis", "elbo", "ess", "pareto_k")
    for other in others:
        for field in fields:
            torch.testing.assert_close(getattr(other, field), getattr(whole, field))


def test_no_run_is_larger_than_a_chunk():
    sizes = []

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        sizes.append(z.numel())
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pyro.validation_enabled(False):
        log_evidence(model, None, torch.tensor(1.0), num_particles=1000, chunk_size=64)
    assert max(sizes) <= 64 and sizes.count(1) <= 4  # setting up


# --- units, scales, masks ----------------------------------------------------------------------


def test_a_subsample_is_scaled_outside_the_logarithm():
    x = torch.randn(20)
    indices = []

    def model(x):
        with pyro.plate("data", 20, subsample_size=5) as index:
            indices.append(index)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    estimate = log_evidence(model, None, x, num_particles=2000)
    exact = dist.Normal(0.0, SD).log_prob(x[indices[-1]])
    assert (distance(estimate, exact).abs() < 4).all() and estimate.scale == 4.0
    assert estimate.total == pytest.approx(4 * estimate.log_evidence.sum().item())
    error = 4 * estimate.standard_error.square().sum().sqrt().item()
    assert estimate.total_standard_error == pytest.approx(error)
    assert abs(estimate.total - 4 * exact.sum()) < 4 * error


def test_scales_of_units_are_weights_of_the_total():
    x, scale = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 3.0, 0.5])
    pyro.set_rng_seed(1)
    plain = log_evidence(local, None, x, num_particles=500)
    pyro.set_rng_seed(1)
    scaled = log_evidence(poutine.scale(local, scale=scale), None, x, num_particles=500)
    torch.testing.assert_close(scaled.log_evidence, plain.log_evidence)
    assert scaled.total == pytest.approx((plain.log_evidence * scale).sum().item())
    error = (plain.standard_error * scale).square().sum().sqrt().item()
    assert scaled.total_standard_error == pytest.approx(error)


def test_two_plates_give_units_in_two_dimensions():
    x = torch.randn(2, 1, 3)

    def model(x, scale):
        rows = pyro.plate("rows", 2, dim=-3)
        with rows, pyro.plate("columns", 3, dim=-1), poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    scale = torch.tensor([1.0, 2.0]).reshape(2, 1, 1)
    estimate = log_evidence(model, None, x, scale, num_particles=2000)
    assert estimate.plates == ("rows", "columns") and estimate.log_evidence.shape == (2, 3)
    exact = dist.Normal(0.0, SD).log_prob(x[:, 0])
    assert (distance(estimate, exact).abs() < 4).all()
    assert abs(estimate.total - (exact * scale[:, 0]).sum()) < 4 * estimate.total_standard_error
    assert "units=2 'rows' x 3 'columns'" in repr(estimate)


def test_a_unit_is_what_all_sites_have_in_common():
    """Three repeated measurements of each latent: x_u is a column, its covariance I + 1 1'."""
    x = torch.randn(3, 4)

    def model(x):
        with pyro.plate("data", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("repeats", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    estimate = log_evidence(model, None, x, num_particles=5000)
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1.0).log_prob(x.T)
    assert estimate.plates == ("data",) and (distance(estimate, exact).abs() < 4).all()


def test_masked_data_are_no_evidence():
    x = torch.tensor([0.5, math.nan, 2.0])
    seen = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.where(seen, x, 0.0))

    estimate = log_evidence(model, None, x, num_particles=2000)
    exact = torch.where(seen, dist.Normal(0.0, SD).log_prob(x.nan_to_num()), 0.0)
    assert (distance(estimate, exact)[seen].abs() < 4).all()
    assert estimate.log_evidence[1].abs() < 1e-12 and estimate.standard_error[1] == 0.0


# --- smoothing ---------------------------------------------------------------------------------


def test_smoothed_evidence_equals_that_of_arviz():
    psislw = getattr(pytest.importorskip("arviz"), "psislw", None)
    if psislw is None:
        pytest.skip("arviz >= 1 has no psislw")
    x, values = torch.tensor([0.0, 2.0, 5.0]), []

    def narrow(x):
        with pyro.plate("data", 3):
            values.append(pyro.sample("z", dist.Normal(x / 2, 0.4)))

    with pyro.validation_enabled(False):
        estimate = log_evidence(local, narrow, x, num_particles=1000, chunk_size=300)
    z = torch.cat(values[-4:])
    normal = dist.Normal(0.0, 1.0)
    log_w = normal.log_prob(z) + normal.log_prob(x - z) - dist.Normal(x / 2, 0.4).log_prob(z)
    smoothed, k = psislw(log_w.T.numpy().copy(), reff=1.0, normalize=False)
    smoothed = torch.as_tensor(smoothed).T
    smoothed = smoothed + log_w.amin(0) - smoothed.amin(0)  # with the offset it came with
    expected = smoothed.logsumexp(0) - math.log(1000)
    torch.testing.assert_close(estimate.log_evidence_psis, expected, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(estimate.pareto_k, torch.as_tensor(k), rtol=0.0, atol=1e-6)
    plain = log_w.logsumexp(0) - math.log(1000)
    torch.testing.assert_close(estimate.log_evidence, plain)
    assert (plain - expected).abs().max() > 1e-3


# --- annealing ---------------------------------------------------------------------------------


AIS = {"method": "ais", "num_particles": 120, "chunk_size": 100, "num_leapfrog_steps": 5}


def test_annealing_reaches_what_the_prior_cannot():
    x, scale = torch.tensor([0.0, 4.0, -6.0]), 0.05
    exact = dist.Normal(0.0, math.hypot(1.0, scale)).log_prob(x)
    prior = log_evidence(local, None, x, scale, num_particles=1000)
    assert abs(prior.total - exact.sum()) > 100 and (prior.pareto_k > 0.7).any()
    estimate = log_evidence(local, None, x, scale, num_temperatures=60, **AIS)
    assert (distance(estimate, exact).abs() < 4).all() and (estimate.standard_error < 0.5).all()
    assert (estimate.elbo < estimate.log_evidence).all()
    assert estimate.method == "ais" and estimate.plates == ("data",)
    assert estimate.acceptance.shape == (3,)
    assert ((estimate.acceptance > 0.5) & (estimate.acceptance <= 1.0)).all()


def test_annealing_with_constrained_latents_and_a_subsample():
    """Rates of counts, far out in their prior: negative binomial evidence of each datum."""
    counts, indices = torch.tensor([30.0, 60.0, 45.0, 80.0, 20.0]), []

    def model():
        with pyro.plate("data", 5, subsample_size=2) as index:
            indices.append(index)
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            with pyro.plate("repeats", 4, dim=-2):
                pyro.sample("x", dist.Poisson(rate), obs=counts[index])

    estimate = log_evidence(model, None, num_temperatures=60, **AIS)
    x = counts[indices[-1]]
    exact = (2.0 + 4 * x).lgamma() - (2.0 + 4 * x) * math.log(5.0) - 4 * (x + 1).lgamma()
    assert (distance(estimate, exact).abs() < 4).all() and (estimate.standard_error < 0.5).all()
    assert estimate.scale == 2.5
    prior = log_evidence(model, None, num_particles=1000, chunk_size=1000)
    assert abs(prior.total - 2.5 * exact.sum()) > 20
    assert (prior.pareto_k > 0.7).all()


def test_annealing_ignores_the_guide_and_takes_uneven_chunks():
    x = torch.tensor([0.3])
    results = []
    for guide in (None, wide):
        pyro.set_rng_seed(2)
        results.append(log_evidence(local, guide, x, num_temperatures=5, **AIS))
    assert torch.equal(results[0].log_evidence, results[1].log_evidence)
    assert (results[0].acceptance <= 1.0).all() and results[0].num_particles == 120


# --- refusals and words ------------------------------------------------------------------------


def discrete(x):
    z = pyro.sample("label", dist.Bernoulli(0.5))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def global_latent(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as index:
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


@pytest.mark.parametrize(
    "model, guide, options, error, message",
    [
        (local, None, {"num_particles": 1}, ValueError, "num_particles.*>= 2, got 1"),
        (local, None, {"chunk_size": 0}, ValueError, "chunk_size"),
        (local, None, {"num_mixing_particles": -1}, ValueError, "num_mixing_particles"),
        (local, None, {"method": "nuts"}, ValueError, "'importance' or 'ais', got 'nuts'"),
        (local, None, AIS | {"num_temperatures": 0}, ValueError, "num_temperatures"),
        (discrete, None, AIS, NotImplementedError, "'label' .Bernoulli.*discrete"),
        (local, AutoDelta(local), {}, ValueError, "'z' is a point mass"),
        (lambda x: None, None, {}, ValueError, "nothing to score"),
        (global_latent, None, {}, ValueError, "one scale per unit.*'z'.*'x'"),
        (global_latent, None, AIS, ValueError, "one scale per unit.*'z'.*'x'"),
    ],
)
def test_refusals(model, guide, options, error, message):
    with pytest.raises(error, match=message):
        log_evidence(model, guide, torch.zeros(3), **options)


@pytest.mark.parametrize("options", [{}, AIS | {"num_temperatures": 3}], ids=["is", "ais"])
def test_data_that_are_no_numbers_are_named(options):
    for validate in (True, False):
        with pyro.validation_enabled(validate), pytest.raises(ValueError, match="site 'x'"):
            log_evidence(local, None, torch.tensor([0.0, math.nan]), **options)


def test_it_describes_itself():
    evidence = Evidence(
        log_evidence=torch.tensor([-1.0, -2.0]),
        standard_error=torch.tensor([0.3, 0.4]),
        log_evidence_psis=torch.zeros(2),
        elbo=torch.zeros(2),
        ess=torch.tensor([50.0, 1.5]),
        pareto_k=torch.tensor([0.1, 0.9]),
        scale=2.0,
        plates=("data",),
        num_particles=100,
        method="importance",
    )
    assert repr(evidence) == (
        "Evidence(total=-6 +- 1 nats, units=2 'data', num_particles=100, method='importance', "
        "ess=1.5 to 50, pareto_k > 0.7 in 1 of 2)"
    )
