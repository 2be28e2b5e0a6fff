"""Masks, scales and units: each against a closed form, with stock Pyro's value beside it."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_vi_ext import SemiImplicitELBO
from pyro_vi_ext.objective import Estimate, Objective
from pyro_vi_ext.scoring import log_mean_bound, log_weights, pair_terms, unit_plates

X = torch.tensor([0.5, -1.0, 2.0, 0.25, 1.5, -0.5], dtype=torch.float64)


pytestmark = pytest.mark.usefixtures("float64")


def kl(loc, scale, prior_loc=0.0, prior_scale=1.0):
    q, p = dist.Normal(loc, scale), dist.Normal(prior_loc, prior_scale)
    return torch.distributions.kl_divergence(q, p)


def assert_bound(objective, model, guide, expected, args=(), repeats=300):
    draws = torch.tensor([-objective.loss(model, guide, *args) for _ in range(repeats)])
    error = draws.std().item() / math.sqrt(repeats)
    assert abs(draws.mean().item() - float(expected)) < 4 * error + 1e-12, (draws.mean(), error)


ELBO = SemiImplicitELBO  # without mixing variables it is the ordinary ELBO

# --- masks -------------------------------------------------------------------------------------


def imputing(x):
    """One entry of x is missing: its latent twin is all there is to learn."""
    mask = torch.arange(len(x)) != 2
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.3, 1.0), obs=x, obs_mask=mask)


def test_obs_mask_with_autonormal():
    """The guide samples a value for observed entries too; their density must not count."""
    guide = AutoNormal(imputing, init_scale=0.1)
    guide(X)
    with torch.no_grad():
        guide.locs.x_unobserved.fill_(0.0)
    observed = torch.arange(6) != 2
    log_p = dist.Normal(0.3, 1.0).log_prob(X[observed]).sum()
    expected = (log_p - kl(guide.locs.x_unobserved[2], 0.1, 0.3)).detach()
    assert_bound(ELBO(10), imputing, guide, expected, (X,))
    stock = sum(-Trace_ELBO().loss(imputing, guide, X) for _ in range(200)) / 200
    entropy = dist.Normal(0.0, 0.1).entropy()  # of each of five latents that nobody has
    assert stock == pytest.approx((expected + 5 * entropy).item(), abs=0.5)
    pyro.clear_param_store()
    exact = AutoNormal(imputing, init_scale=1.0)
    exact(X)
    with torch.no_grad():
        exact.locs.x_unobserved.fill_(0.3)
    for kwargs in ({}, {"importance_weighted": True}):
        assert -ELBO(3, **kwargs).loss(imputing, exact, X) == pytest.approx(log_p.item())


def test_obs_mask_with_a_density_that_does_not_factor():
    """AutoMultivariateNormal has one density for all entries: the latent's mask is dropped."""
    guide = AutoMultivariateNormal(imputing, init_scale=0.1)
    guide(X)
    observed = torch.arange(6) != 2
    log_p = dist.Normal(0.3, 1.0).log_prob(X[observed]).sum()
    expected = (log_p - kl(guide.loc, 0.1, 0.3).sum()).detach()
    assert_bound(ELBO(10), imputing, guide, expected, (X,))


def masked(x, mask):
    with pyro.plate("data", len(x)), poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("mask_guide", [False, True])
def test_mask_of_the_model_masks_the_guide(mask_guide):
    mask = X > 0

    def guide(x, mask):
        context = poutine.mask(mask=mask if mask_guide else torch.tensor(True))
        with pyro.plate("data", len(x)), context:
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    expected = dist.Normal(0.0, 2**0.5).log_prob(X[mask]).sum().item()
    assert -ELBO(3).loss(masked, guide, X, mask) == pytest.approx(expected)  # exact posterior


def test_distribution_mask_is_a_mask():
    mask = X > 0

    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(mask))
            pyro.sample("x", dist.Normal(z, 1.0).mask(mask), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    expected = dist.Normal(0.0, 2**0.5).log_prob(X[mask]).sum().item()
    assert -ELBO(3).loss(model, guide, X, mask) == pytest.approx(expected)


def test_mask_inside_an_event_is_refused():
    def model(x):
        pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).mask(X > 0).to_event(1))

    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))

    with pytest.raises(NotImplementedError, match="'z' has a mask inside .to_event"):
        ELBO().loss(model, guide, X)


@pytest.mark.parametrize("mask", [False, X > 0], ids=["all", "some"])
def test_guide_masked_where_the_model_is_not_is_refused(mask):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'z' is masked in the guide where"):
        ELBO().loss(model, guide, X)


def test_mask_with_noise_inside_the_plate():
    """Masked units drop out of the average as well."""
    mask = torch.tensor([True, False, True, True, False, True])

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(x / 2 + 0.4 * psi, 0.6))

    values = []
    for data, m in [(X, mask), (X[mask], torch.ones(4, dtype=torch.bool))]:
        draws = torch.tensor([ELBO(50, 2).loss(masked, guide, data, m) for _ in range(300)])
        values.append((draws.mean(), draws.std() / math.sqrt(300)))
    (a, ea), (b, eb) = values
    assert abs(a - b) < 4 * math.hypot(ea, eb)


# --- scales and units --------------------------------------------------------------------------


def gaussian(x, batch=None):
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def wide(x, batch=None):
    with pyro.plate("data", len(x), subsample_size=batch):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_multi_sample_bound_is_below_the_evidence_under_subsampling():
    """DESIGN section 3: the scale stays outside the exponential. Stock RenyiELBO has it inside."""
    data = torch.linspace(-3, 3, 40)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(data).sum().item()
    ours = SemiImplicitELBO(10, importance_weighted=True)
    means = {}
    for batch in (None, 10, 2):
        draws = torch.tensor([-ours.loss(gaussian, wide, data, batch) for _ in range(500)])
        means[batch] = draws.mean().item(), draws.std().item() / math.sqrt(500)
        assert means[batch][0] < evidence
    for batch in (10, 2):
        gap = abs(means[batch][0] - means[None][0])
        assert gap < 4 * math.hypot(means[batch][1], means[None][1])
    stock = RenyiELBO(alpha=0, num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    draws = [-stock.loss(gaussian, wide, data, 2) for _ in range(500)]
    assert sum(draws) / 500 > evidence + 5


def test_annealing_one_side_is_refused_for_multi_sample_bounds_only():
    def annealed(x, batch=None):
        with poutine.scale(scale=0.5):
            wide(x, batch)

    ELBO(3).loss(gaussian, annealed, X)
    with pytest.raises(ValueError, match="'z' has scale 1 and site 'z' has 0.5"):
        ELBO(3, importance_weighted=True).loss(gaussian, annealed, X)


def test_scale_per_unit_may_differ_between_units():
    weight = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 0.5])
    model, guide = (poutine.scale(fn, scale=weight) for fn in (gaussian, wide))
    model, guide = (lambda x, fn=fn: fn(x) for fn in (model, guide))
    torch.manual_seed(3)
    objective = SemiImplicitELBO(50, importance_weighted=True)
    run = objective._run(gaussian, wide, (X,), {})
    scored = pair_terms(run, run.pairs[0])
    terms = [*scored.model, *scored.guide.values()]
    log_w = log_weights([terms], unit_plates(terms), run)
    expected = (weight * (log_w.logsumexp(0) - math.log(50))).sum()
    torch.manual_seed(3)
    assert -objective.loss(model, guide, X) == pytest.approx(expected.item())


def test_scale_that_varies_inside_a_unit_is_refused():
    weight = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 0.5])

    def model(x):
        pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=weight):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="one scale per unit"):
        ELBO(3, importance_weighted=True).loss(model, guide, X)


class Weights(Objective):
    """Exposes log w[k, u] of the shared core."""

    def estimate(self, run):
        particles = []
        for pair in run.pairs:
            scored = pair_terms(run, pair)
            particles.append([*scored.model, *scored.guide.values()])
        self.plates = unit_plates([t for terms in particles for t in terms])
        self.log_w = log_weights(particles, self.plates, run)
        return Estimate(-log_mean_bound(particles, run))


@pytest.mark.parametrize("vectorize", [True, False])
def test_log_weights_have_one_column_per_unit(vectorize):
    def nested(x):
        with pyro.plate("units", 6, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("repeats", 3, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(3, 6))

    def posterior(x):
        with pyro.plate("units", 6, dim=-1):
            pyro.sample("z", dist.Normal(3 * x / 4, 0.5))

    objective = Weights(5, vectorize_particles=vectorize)
    objective.loss(nested, posterior, X)
    assert list(objective.plates) == ["units"]
    assert objective.log_w.shape == (5, 1, 6)
    # the guide is the exact posterior, so every log-weight is that unit's log p(x)
    covariance = torch.ones(3, 3) + torch.eye(3)
    mvn = dist.MultivariateNormal(torch.zeros(3), covariance)
    expected = mvn.log_prob(X.unsqueeze(-1).expand(6, 3))
    torch.testing.assert_close(objective.log_w.squeeze(1), expected.expand(5, 6))


def test_sequential_plates_count_as_no_plate():
    def model(x):
        for i in pyro.plate("data", 3):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def posterior(x):
        for i in pyro.plate("data", 3):
            pyro.sample(f"z{i}", dist.Normal(x[i] / 2, 0.5**0.5))

    objective = Weights(4)
    objective.loss(model, posterior, X)
    assert objective.plates == {} and objective.log_w.shape == (4,)
    expected = dist.Normal(0.0, 2**0.5).log_prob(X[:3]).sum()
    torch.testing.assert_close(objective.log_w, expected.expand(4))


def test_deterministic_sites_do_not_make_the_model_global():
    def model(x):
        gaussian(x)
        pyro.deterministic("mean", x.mean())

    objective = Weights(4)
    objective.loss(model, lambda x: wide(x), X)
    assert list(objective.plates) == ["data"]


def test_reparameterised_factor_of_the_guide_enters_log_q():
    def model(x):
        pyro.sample("z", dist.LogNormal(0.0, 1.0))

    def guide(x):
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u.exp()))
        pyro.factor("log_det", -u, has_rsample=True)

    assert ELBO(4).loss(model, guide, X) == pytest.approx(0.0, abs=1e-12)
