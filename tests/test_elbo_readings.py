"""The ELBO in its three readings: they agree to rounding, and with closed forms in mean."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from pyro_vi_ext import elbo_terms, guide_report
from pyro_vi_ext.elbo_readings import ElboTerms, Mean

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
Y = torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64)


def model(x=X, y=Y):
    """A global rate, a latent per datum that depends on it, two kinds of data and a factor."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(rate, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        pyro.sample("y", dist.Poisson(rate), obs=y)
    pyro.factor("tilt", -0.1 * rate)


def guide(x=X, y=Y):
    rate = pyro.sample("rate", dist.LogNormal(0.2, 0.3))
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(0.5 * x + 0.5 * rate, 0.6))


def mixing(x=X, y=Y):
    psi = pyro.sample("psi", dist.Normal(0.0, 0.3), infer={"is_auxiliary": True})
    rate = pyro.sample("rate", dist.LogNormal(psi, 0.3))
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(0.5 * x + 0.5 * rate, 0.6))


def within(mean, exact):
    return abs(mean.value - float(exact)) < 4 * mean.standard_error


# --- the readings ------------------------------------------------------------------------------


GUIDES = {
    "by hand": (lambda: guide, {"rate", "z"}),
    "semi-implicit": (lambda: mixing, {"rate", "z"}),
    "AutoNormal": (lambda: AutoNormal(model), {"rate", "z"}),
    "AutoMultivariateNormal": (lambda: AutoMultivariateNormal(model), {"rate, z"}),
    "AutoDelta": (lambda: AutoDelta(model), {"rate", "z"}),
}


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("name", GUIDES)
def test_the_readings_are_one_number(name, vectorized):
    make, latents = GUIDES[name]
    options = {"num_particles": 60, "chunk_size": 25, "num_mixing_particles": 3}
    options["vectorize_particles"] = vectorized
    pyro.set_rng_seed(1)
    pair = poutine.scale(model, scale=3.0), poutine.scale(make(), scale=3.0)
    terms = elbo_terms(*pair, **options)
    assert terms.reconstruction.keys() == {"x", "y", "tilt"} and terms.kl.keys() == latents
    elbo = pytest.approx(terms.elbo.value, rel=1e-12)
    data = sum(map(float, terms.reconstruction.values()))
    assert data - sum(map(float, terms.kl.values())) == elbo
    assert terms.expected_log_joint.value + terms.entropy.value == elbo
    assert terms.num_dims == pytest.approx(18.0)
    assert -terms.bits_per_dim * 18 * math.log(2) == elbo
    if name != "AutoDelta":  # the same draws again, scored by the other path
        pyro.set_rng_seed(1)
        pyro.clear_param_store()
        report = guide_report(model, make(), **options)
        assert 3.0 * report.elbo.item() == elbo
        error = pytest.approx(terms.elbo.standard_error, rel=1e-9)
        assert 3.0 * report.elbo_standard_error.item() == error


def test_each_part_is_an_expectation_with_a_calibrated_error():
    """Closed forms: KL of the latents, expected log-likelihoods; over 60 seeds."""
    m, s, a, b = 0.4, 0.7, 0.3, 0.5  # q(w) = N(m, s^2), q(z | w) = N(a w, b^2)

    def chain():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.5))
        pyro.sample("y", dist.Poisson(w.exp()), obs=torch.tensor(2.0))

    def chain_guide():
        w = pyro.sample("w", dist.Normal(m, s))
        pyro.sample("z", dist.Normal(a * w, b))

    half = 0.5 * math.log(2 * math.pi)
    square = m**2 + s**2  # E w^2
    exact = {
        "w": 0.5 * (square - 1) - math.log(s),
        "z": 0.5 * ((a - 1) ** 2 * square + b**2 - 1) - math.log(b),
        "x": -half - 0.5 * (1.5**2 - 2 * 1.5 * a * m + a**2 * square + b**2),
        "y": 2 * m - math.exp(m + s**2 / 2) - math.log(2.0),
        "entropy": 1 + 2 * half + math.log(s) + math.log(b),
    }
    exact["elbo"] = exact["x"] + exact["y"] - exact["w"] - exact["z"]
    scores = []
    for _ in range(60):
        terms = elbo_terms(chain, chain_guide, num_particles=500, chunk_size=500)
        means = {**terms.kl, **terms.reconstruction, "entropy": terms.entropy, "elbo": terms.elbo}
        assert means.keys() == exact.keys()
        scores.append([(means[n].value - exact[n]) / means[n].standard_error for n in exact])
    z = torch.tensor(scores)
    assert (z.mean(0).abs() < 4 / 60**0.5).all()
    assert ((z.square().mean(0) - 1).abs() < 4 * (2 / 60) ** 0.5).all()
    offset = torch.tensor([0.1 / means[n].standard_error for n in exact])
    assert ((z + offset).mean(0).abs() > 4 / 60**0.5).all()


def test_bits_back_of_bernoulli_data_by_hand():
    """The guide of one bit is the posterior, of the other the prior: 1 bit, and 1 bit + KL."""

    def bits():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Bernoulli(0.1 + 0.8 * z), obs=torch.tensor([1.0, 0.0]))

    def coder(probs):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(torch.tensor(probs)))

    terms = elbo_terms(bits, lambda: coder([0.9, 0.5]), num_particles=4000)
    excess = -0.5 * math.log2(4 * 0.1 * 0.9)  # KL(1/2 || 0.1) in bits
    error = terms.elbo.standard_error / (2 * math.log(2))
    assert abs(terms.bits_per_dim - (1 + excess / 2)) < 4 * error
    exact = elbo_terms(bits, lambda: coder([0.9, 0.1]))
    assert exact.bits_per_dim == pytest.approx(1.0) and exact.elbo.standard_error < 1e-12


# --- dimensions, masks, scales -----------------------------------------------------------------


def test_dimensions_are_observed_values():
    def events():
        with pyro.plate("data", 4):
            pyro.sample(
                "pixels", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2), obs=torch.ones(2, 3)
            )
            pyro.sample("label", dist.Categorical(torch.ones(5)), obs=torch.tensor(1))
            with poutine.scale(scale=0.5):
                pyro.sample("weak", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))
        pyro.factor("energy", torch.tensor(1.0))
        pyro.deterministic("nothing", torch.ones(7))

    terms = elbo_terms(events, lambda: None, num_particles=3)
    assert terms.num_dims == 4 * 6 + 4 + 0.5 * 4 and terms.kl == {}
    assert terms.entropy.value == 0.0 and terms.elbo.standard_error == pytest.approx(0.0, abs=1e-9)
    assert terms.elbo.value == pytest.approx(terms.expected_log_joint.value)


def test_masked_sites_count_for_nothing():
    seen, real = torch.tensor([True, False, True]), torch.tensor([True, True, False])

    def masked():
        with pyro.plate("data", 3):
            with poutine.mask(mask=real):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 2.0).mask(seen), obs=X)
            pyro.sample("y", dist.Normal(z, 1.0).mask(False), obs=Y)

    def normals():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(1.0, 0.5))

    terms = elbo_terms(masked, normals, num_particles=2000)
    assert terms.num_dims == 2.0
    exact = dist.Normal(0.0, 2.0).log_prob(X)[seen].sum().item()
    assert terms.reconstruction["x"].value == pytest.approx(exact)
    assert float(terms.reconstruction.get("y", 0.0)) == 0.0
    one = 0.5 * (1.0 + 0.25 - 1.0) - math.log(0.5)
    assert within(terms.kl["z"], 2 * one) and not within(terms.kl["z"], 3 * one)


def test_a_mask_that_depends_on_a_latent_is_counted_on_average():
    """As a stick-breaking sequence that ends; here each value is there half of the time."""

    def ragged():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.mask(mask=z > 0.0):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=X)

    terms = elbo_terms(ragged, poutine.block(ragged, hide=["x"]), num_particles=4000)
    assert abs(terms.num_dims - 1.5) < 4 * 1.5 / 4000**0.5
    exact = 0.5 * dist.Normal(0.0, 1.0).log_prob(X).sum()
    assert within(terms.reconstruction["x"], exact)


def test_a_subsample_beside_a_global_latent():
    """One minibatch, scaled: what Trace_ELBO estimates at the same indices."""
    x, index = torch.randn(12), torch.tensor([1, 4, 7])

    def subsampled():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 12, subsample=index) as i:
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def mean_field():
        pyro.sample("w", dist.Normal(0.3, 0.5))
        with pyro.plate("data", 12, subsample=index):
            pyro.sample("z", dist.Normal(0.5, 0.8))

    terms = elbo_terms(subsampled, mean_field, num_particles=4000, chunk_size=1000)
    half, scale = 0.5 * math.log(2 * math.pi), 12 / 3
    assert terms.num_dims == pytest.approx(12.0)
    assert within(terms.kl["w"], 0.5 * (0.09 + 0.25 - 1) - math.log(0.5))
    log_prior = -half - 0.5 * (0.2**2 + 0.8**2 + 0.5**2)
    assert within(terms.kl["z"], 12 * (-half - 0.5 - math.log(0.8) - log_prior))
    likelihood = -half - 0.5 * ((x[index] - 0.5) ** 2 + 0.8**2)
    assert within(terms.reconstruction["x"], scale * likelihood.sum())
    stock = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
    losses = torch.tensor([stock.loss(subsampled, mean_field) for _ in range(10)])
    error = math.hypot(losses.std() / 10**0.5, terms.elbo.standard_error)
    assert abs(terms.elbo.value + losses.mean()) < 4 * error


# --- guides ------------------------------------------------------------------------------------


def test_a_point_mass_has_no_entropy():
    """As MAP: the bound is the log joint at the point."""
    terms = elbo_terms(
        model,
        AutoDelta(model, init_loc_fn=lambda site: torch.ones(site["fn"].shape())),
        num_particles=2,
    )
    rate, one = torch.tensor(1.0), torch.ones(3)
    prior = dist.Gamma(2.0, 1.0).log_prob(rate), dist.Normal(1.0, 1.0).log_prob(one).sum()
    assert terms.entropy.value == 0.0
    assert [kl.value for kl in terms.kl.values()] == pytest.approx([-p.item() for p in prior])
    data = dist.Normal(one, 0.5).log_prob(X).sum(), dist.Poisson(one).log_prob(Y).sum(), -0.1
    log_joint = float(sum(prior) + sum(data))
    assert terms.elbo.value == pytest.approx(log_joint) and terms.elbo.standard_error < 1e-12


def test_a_joint_density_is_divided_no_further_than_it_can_be():
    """A Gaussian over (rate, z) in unconstrained coordinates, an entry of its own for v."""

    def positive():
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a, 1.0), obs=torch.tensor(1.0))

    scale_tril = torch.tensor([[0.5, 0.0], [0.4, 0.3]])

    def joint():
        normal = dist.MultivariateNormal(torch.tensor([0.3, -0.2]), scale_tril=scale_tril)
        u = pyro.sample("u", normal, infer={"is_auxiliary": True})
        a = u[..., 0]
        pyro.sample("a", dist.Delta(a.exp(), log_density=-a))
        pyro.sample("b", dist.Delta(u[..., 1]))

    terms = elbo_terms(positive, joint, num_particles=4000)
    q = dist.MultivariateNormal(torch.tensor([0.3, -0.2]), scale_tril=scale_tril)
    p = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    exact = torch.distributions.kl_divergence(q, p)  # the same after a change of variables
    assert list(terms.kl) == ["a, b"] and within(terms.kl["a, b"], exact)
    assert within(terms.entropy, q.entropy() + 0.3)


def test_a_semi_implicit_divergence_lies_above_the_exact_one():
    """Here q(z) is normal: K large is as good as exact, K = 1 is not."""

    def normal():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def mixture():
        psi = pyro.sample("psi", dist.Normal(0.5, 0.6), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(psi, 0.8))

    options = {"num_particles": 4000, "num_mixing_particles": 400}
    terms = elbo_terms(normal, mixture, **options)
    exact = 0.5 * (0.25 + 1.0 - 1.0)  # q(z) = N(1/2, 1)
    assert list(terms.kl) == ["z"] and within(terms.kl["z"], exact)
    coarse = elbo_terms(normal, mixture, num_particles=4000, num_mixing_particles=1)
    assert coarse.kl["z"].value > exact + 4 * coarse.kl["z"].standard_error


def test_errors_of_draws_in_groups():
    draws = torch.randn(50, 1).expand(50, 4).flatten()  # four copies of each
    grouped, plain = Mean.of(draws, [4] * 50), Mean.of(draws)
    assert grouped.value == pytest.approx(draws.mean().item())
    assert grouped.standard_error == pytest.approx(draws[::4].std().item() / 50**0.5)
    assert plain.standard_error == pytest.approx(grouped.standard_error / 2, rel=0.02)
    assert float(grouped) == grouped.value


def test_sites_that_come_and_go_are_zero_when_they_are_not_there():
    """KL of a latent that exists three times in ten, and its data, one run after another."""

    def sometimes(observe, probability):
        on = pyro.sample("on", dist.Bernoulli(probability))
        if on:
            loc = 0.0 if observe else 1.0
            a = pyro.sample("a", dist.Normal(loc, 1.0))
            if observe:
                pyro.sample("x", dist.Normal(a, 1.0), obs=torch.tensor(1.0))

    terms = elbo_terms(
        lambda: sometimes(True, 0.5),
        lambda: sometimes(False, 0.3),
        num_particles=2000,
        chunk_size=7,
        vectorize_particles=False,
    )
    kl = torch.distributions.kl_divergence(dist.Bernoulli(0.3), dist.Bernoulli(0.5))
    assert within(terms.kl["on"], kl) and within(terms.kl["a"], 0.3 * 0.5)
    assert within(terms.reconstruction["x"], 0.3 * (-0.5 * math.log(2 * math.pi) - 0.5))
    assert abs(terms.num_dims - 0.3) < 4 * (0.21 / 2000) ** 0.5


# --- refusals and words ------------------------------------------------------------------------


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def amortised(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_that_are_no_numbers_are_named(value, validate):
    with pyro.validation_enabled(validate), pytest.raises(ValueError, match="site 'x'") as raised:
        elbo_terms(local, amortised, torch.tensor([0.0, value]))
    assert "data" in str(raised.value)


def test_a_guide_outside_the_support_is_named():
    def window():
        z = pyro.sample("z", dist.Uniform(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match="'z' in the model"):
        elbo_terms(window, lambda: pyro.sample("z", dist.Normal(0.5, 1.0)))


@pytest.mark.parametrize("name, value", [("num_particles", 1), ("chunk_size", 0)])
def test_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        elbo_terms(local, amortised, X, **{name: value})


def test_nothing_to_score():
    with pytest.raises(ValueError, match="nothing to score"):
        elbo_terms(lambda: None, lambda: None)


def test_without_data_there_are_no_bits_per_dimension():
    prior = elbo_terms(
        lambda: pyro.sample("z", dist.Normal(0.0, 1.0)),
        lambda: pyro.sample("z", dist.Normal(0.0, 1.0)),
    )
    assert math.isnan(prior.bits_per_dim) and prior.elbo.value == 0.0
    assert prior.reconstruction == {} and "nan" in str(prior)


def test_it_is_printed_as_a_sum():
    terms = ElboTerms(
        elbo=Mean(-2.0, 0.1),
        reconstruction={"x": Mean(-1.5, 0.05)},
        kl={"z": Mean(0.5, 0.012)},
        expected_log_joint=Mean(-3.0, 0.2),
        entropy=Mean(1.0, 0.1),
        num_dims=4.0,
    )
    assert repr(terms.elbo) == "-2 +- 0.1"
    assert str(terms).splitlines() == [
        "ELBO                                   -2.0000 +- 0.1 nats",
        "+ reconstruction of x                  -1.5000 +- 0.05 nats",
        "- KL of z                               0.5000 +- 0.012 nats",
        "= expected log joint                   -3.0000 +- 0.2 nats",
        "  + entropy                             1.0000 +- 0.1 nats",
        "bits per dimension                      0.7213",
    ]
