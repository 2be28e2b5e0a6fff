"""Weights by hand at the same draws, in chunks on one subsample; groups; what has no weight."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch.distributions import constraints

from pyro_vi_ext.pareto import WeightSummary
from pyro_vi_ext.proposal import GroupedSummary, Proposal, by_plate

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def proposal(model, guide, *args, **options):
    options = {
        "num_particles": 30,
        "chunk_size": 10,
        "num_mixing_particles": 5,
        "max_plate_nesting": float("inf"),
        "vectorize_particles": True,
    } | options
    return Proposal(model, guide, args, {}, **options)


def run(model, guide, *args, **options):
    """All weights, shape (K, *units)."""
    return torch.cat([c.log_w for c in proposal(model, guide, *args, **options).chunks()])


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        return pyro.sample("z", dist.Normal(x / 2, 1.0))


def recorded(fn):
    """``fn``, which also keeps what it returns."""
    seen = []

    def wrapped(*args):
        seen.append(fn(*args))
        return seen[-1]

    return wrapped, seen


# --- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorized", [True, False])
def test_weights_are_those_of_the_draws(vectorized):
    tapped, seen = recorded(guide)
    with pyro.validation_enabled(False):  # which would run the guide once more
        work = proposal(model, tapped, X, num_particles=25, vectorize_particles=vectorized)
        seen.clear()
        chunks = list(work.chunks())
    assert [len(c.log_w) for c in chunks] == work.sizes == [9, 8, 8]
    assert list(chunks[0].plates) == ["data"] and chunks[0].scale == 1.0
    z = torch.cat([value.reshape(-1, 3) for value in seen])
    normal = dist.Normal(0.0, 1.0)
    expected = normal.log_prob(z) + normal.log_prob(X - z) - normal.log_prob(z - X / 2)
    torch.testing.assert_close(torch.cat([c.log_w for c in chunks]), expected)
    assert len(seen) == (3 if vectorized else 25)


def test_from_the_prior_the_weight_is_the_likelihood():
    values = []

    def tapped(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            values.append(z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("tilt", z / 3)

    work = proposal(tapped, None, X, num_particles=10)
    values.clear()
    (chunk,) = work.chunks()
    expected = dist.Normal(values[0], 1.0).log_prob(X) + values[0] / 3
    torch.testing.assert_close(chunk.log_w, expected)


def test_one_subsample_for_all_chunks_of_model_and_guide():
    indices = []

    def subsampled(x, *, observe):
        with pyro.plate("data", len(x), subsample_size=4) as index:
            indices.append(index)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if observe:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    work = proposal(
        lambda x: subsampled(x, observe=True),
        lambda x: subsampled(x, observe=False),
        torch.arange(50.0),
    )
    indices.clear()
    chunks = list(work.chunks())
    assert len(indices) >= 6 and all(torch.equal(i, indices[0]) for i in indices)
    assert all(c.log_w.shape == (10, 4) and c.scale == 50 / 4 for c in chunks)


def test_weights_have_no_gradient_and_zero_is_a_weight():
    loc = torch.tensor(0.0, requires_grad=True)

    def window():
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.factor("window", torch.where(z > 0.0, 0.0, -math.inf))

    log_w = run(window, None, num_particles=100, chunk_size=100)
    assert not log_w.requires_grad
    assert set(log_w.tolist()) == {0.0, -math.inf}


def test_an_unconstrained_twin_is_a_change_of_variables():
    """log q(z) of AutoNormal: a LogNormal, whatever Delta sites it is made of."""
    x = torch.tensor(3.0)
    values = []

    def positive():
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        values.append(z)
        pyro.sample("x", dist.Poisson(z), obs=x)

    auto = AutoNormal(positive, init_scale=0.4)
    work = proposal(positive, auto, num_particles=10)
    values.clear()
    (chunk,) = work.chunks()
    z, loc = values[0].detach(), auto.locs.z.detach()
    expected = dist.Gamma(2.0, 1.0).log_prob(z) + dist.Poisson(z).log_prob(x)
    torch.testing.assert_close(chunk.log_w, expected - dist.LogNormal(loc, 0.4).log_prob(z))


def test_one_dimension_for_each_plate():
    def frame(dim):
        return pyro.poutine.indep_messenger.CondIndepStackFrame("p", dim, 3, 0)

    tensor = torch.zeros(7, 1, 3, 1)
    assert by_plate(tensor, {"p": frame(-2)}, lead=1).shape == (7, 3)
    assert by_plate(tensor[0], {"p": frame(-2)}).shape == (3,)
    assert by_plate(tensor[:, :, :1], {"p": frame(-2)}, lead=1).shape == (7, 1)
    assert by_plate(torch.zeros(7, 1), {}, lead=1).shape == (7,)


# --- draws that share the mixing draws of their chunk ------------------------------------------


UNITS = 100  # each one a repetition of the experiment


def replicated():
    with pyro.plate("units", UNITS):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(UNITS))


def semi_implicit():
    with pyro.plate("units", UNITS):
        psi = pyro.sample("psi", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(psi, 0.5))


def test_standard_errors_know_that_a_chunk_shares_its_mixing_draws():
    """Over units, z-scores have variance 1 in groups; draw by draw it is 10 or so, and 2."""
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(torch.tensor(1.0))
    work = proposal(
        replicated, semi_implicit, num_particles=40_000, chunk_size=400, num_mixing_particles=2
    )
    grouped, plain = work.summary(), WeightSummary(40_000)
    for chunk in work.chunks():
        grouped.add(chunk.log_w)
        plain.add(chunk.log_w)
    assert torch.equal(grouped.log_mean, plain.log_mean)  # unbiased for any number of extra draws
    assert (grouped.log_mean - exact).mean().abs() < 4 * (grouped.log_mean.std() / UNITS**0.5)
    four = 4 * (2 / UNITS) ** 0.5
    assert abs(((grouped.log_mean - exact) / grouped.log_mean_se).square().mean() - 1) < four
    assert ((plain.log_mean - exact) / plain.log_mean_se).square().mean() > 5
    spread = grouped.mean_log.std()  # its mean is the bound at this number of draws
    assert abs((spread / grouped.mean_log_se).square().mean() - 1) < four
    assert (spread / plain.mean_log_se).square().mean() > 1 + four


def test_chunks_that_share_noise_are_many():
    work = proposal(replicated, semi_implicit, num_particles=400, chunk_size=100)
    assert work.shares_noise and work.sizes == [20] * 20
    work = proposal(replicated, semi_implicit, num_particles=9, chunk_size=100)
    assert work.sizes == [1] * 9
    for other in (
        proposal(replicated, semi_implicit, chunk_size=30, num_mixing_particles=0),
        proposal(replicated, None, chunk_size=30),
    ):
        assert not other.shares_noise and other.sizes == [30]


@pytest.mark.parametrize("auxiliary", [semi_implicit, None])
def test_setting_up_leaves_the_random_state_alone(auxiliary):
    before = torch.get_rng_state()
    proposal(replicated, auxiliary)
    assert torch.equal(torch.get_rng_state(), before)


# --- the tail ----------------------------------------------------------------------------------


def summarize(log_w):
    summary = GroupedSummary(len(log_w))
    summary.add(log_w)
    return summary


def test_a_tail_of_equal_weights_ends_there():
    rounding = 1e-12 * torch.randn(1000)
    two_values = torch.where(torch.rand(1000) < 0.3, 1.0, -1.0)
    heavy = 3 * torch.randn(1000)
    log_w = torch.stack([rounding, two_values, heavy, torch.full((1000,), -math.inf)], -1)
    k = summarize(log_w).pareto_k
    assert k[:2].tolist() == [-math.inf, -math.inf] and k[3] == math.inf
    plain = WeightSummary(1000)
    plain.add(log_w)
    assert k[2] == plain.pareto_k[2] and k[2] > 0.7


def test_too_few_draws_have_no_tail():
    assert summarize(torch.zeros(20)).pareto_k == math.inf
    assert summarize(torch.zeros(25)).pareto_k == -math.inf


# --- refusals ----------------------------------------------------------------------------------


def improper(x):
    z = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()).mask(True))
    pyro.sample("x", dist.Normal(0.0, z), obs=x)


def point(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(x / 2))


def hidden(x):
    with poutine.mask(mask=False):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[0])


def global_latent(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as index:
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


@pytest.mark.parametrize(
    "model, guide, error, message",
    [
        (improper, None, NotImplementedError, "'scale' has an improper prior.*Pass a guide"),
        (model, point, ValueError, "'z' is a point mass .*AutoNormal; elbo_terms"),
        (model, AutoDelta(model), ValueError, "'z' is a point mass .*pyro.condition"),
        (hidden, None, ValueError, "not masked.*obs=data"),
        (lambda x: None, None, ValueError, "nothing to score"),
        (global_latent, None, ValueError, "unlike elbo_terms. needs one scale.*'z'.*'x'"),
    ],
)
def test_refusals_name_the_site(model, guide, error, message):
    with pytest.raises(error, match=message):
        run(model, guide, X)


def test_a_point_mass_of_model_and_guide_is_no_density():
    def both():
        pyro.sample("z", dist.Delta(torch.tensor(2.0)))

    def observing():
        z = pyro.sample("z", dist.Delta(torch.tensor(2.0)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    expected = dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.5)).expand(30)
    torch.testing.assert_close(run(observing, both), expected)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("proposed", [None, guide], ids=["prior", "amortised"])
def test_data_that_are_no_numbers_are_named(value, validate, proposed):
    """Also where the guide has turned them into draws that are none; and where weights are zero."""
    x = torch.where(X == 2.0, value, X)
    with pyro.validation_enabled(validate), pytest.raises(ValueError) as raised:
        run(model, proposed, x)
    assert "site 'x'" in str(raised.value) and "data" in str(raised.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_density_that_is_no_number_is_named(value):
    def tilted(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("energy", torch.where(z > 0, value, 0.0))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match="'energy' in the model"):
        run(tilted, None, X)


@pytest.mark.parametrize("name, value", [("chunk_size", 0), ("num_mixing_particles", -1)])
def test_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        proposal(model, guide, X, **{name: value})
