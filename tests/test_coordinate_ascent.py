"""CAVI as an object: runs, starts, other data, stopping, masks, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

from pyro_vi_ext.cavi import CAVI, NotConjugateError, StochasticCAVI
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64


@pytest.fixture(autouse=True)
def doubles():
    with enable_x64(True):
        yield


def gaussian(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = numpyro.sample("tau", dist.Gamma(1.0, 1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(mu, 1 / jnp.sqrt(tau)), obs=x)


def mixture(x, num_components=3):
    pi = numpyro.sample("pi", dist.Dirichlet(jnp.ones(num_components)))
    with numpyro.plate("components", num_components):
        mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(pi))
        numpyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def by_hand(x, e_tau):
    """Mean and variance of mu, then shape and rate of tau, of `gaussian` from a given E[tau]."""
    v = 1 / (0.01 + len(x) * e_tau)
    m = v * e_tau * x.sum()
    return m, v, 1 + len(x) / 2, 1 + 0.5 * (((x - m) ** 2).sum() + len(x) * v)


DATA = np.array([1.0, 2.0, 3.0, 4.5, -0.5])


def test_a_sweep_is_the_textbooks():
    cavi = CAVI(gaussian, DATA)
    first = cavi.run(1, rng_key=jax.random.PRNGKey(3))
    second = cavi.run(1, state=first.state)
    m, v, a, b = by_hand(DATA, float(first.state["tau"]["pow1"]))
    q = second.posterior
    assert float(q["mu"].loc) == pytest.approx(m, rel=1e-12)
    assert float(q["mu"].scale) ** 2 == pytest.approx(v, rel=1e-12)
    assert float(q["tau"].concentration) == pytest.approx(a, rel=1e-12)
    assert float(q["tau"].rate) == pytest.approx(b, rel=1e-12)


def test_going_on_from_a_state_is_one_longer_run():
    cavi = CAVI(gaussian, DATA)
    whole = cavi.run(12, tol=0.0)
    part = cavi.run(5, tol=0.0)
    rest = cavi.run(7, tol=0.0, state=part.state)
    np.testing.assert_allclose(np.concatenate([part.losses, rest.losses]), whole.losses, rtol=1e-12)


def test_losses_are_one_per_sweep_and_never_rise():
    result = CAVI(gaussian, DATA).run(37, tol=0.0)
    assert result.losses.shape == (37,) and result.bound == -result.losses[-1]
    assert np.diff(result.losses).max() <= 1e-12
    assert "37 sweeps; mu: Normal, tau: Gamma" in repr(result)


def test_tol_is_an_absolute_change_and_zero_never_stops():
    cavi = CAVI(gaussian, DATA)
    assert len(cavi.run(500, tol=0.0).losses) == 500
    losses = cavi.run(500, tol=1e-3).losses
    assert len(losses) < 50 and (-np.diff(losses)).min() < 1e-3


def test_the_best_start_is_returned_and_a_key_makes_a_run():
    x = np.concatenate([np.random.default_rng(0).normal(c, 0.3, 30) for c in (-4.0, 0.0, 5.0)])
    cavi = CAVI(mixture, x)
    result = cavi.run(60, num_restarts=5, rng_key=jax.random.PRNGKey(1))
    assert result.bounds.shape == (5,) and result.bound == result.bounds.max()
    again = cavi.run(60, num_restarts=5, rng_key=jax.random.PRNGKey(1))
    assert np.array_equal(again.losses, result.losses)
    r = np.asarray(result.state["z"]["onehot"])
    assert len(set(zip(r.argmax(1), np.repeat([0, 1, 2], 30), strict=True))) == 3  # the clusters
    means = cavi.run(1, state=result.state).posterior["mu"].mean
    np.testing.assert_allclose(means, x @ r / (0.01 + r.sum(0)), rtol=1e-12)


def test_other_data_of_the_same_shape_compile_nothing_new():
    cavi = CAVI(gaussian, DATA)
    cavi.run(1)
    compiled = cavi._first._cache_size()
    found = cavi.update(2 * DATA).run(30)
    assert cavi._first._cache_size() == compiled
    expected = CAVI(gaussian, 2 * DATA).run(30)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)
    longer = np.append(DATA, 7.0)
    expected = CAVI(gaussian, longer).run(30)
    np.testing.assert_allclose(cavi.update(longer).run(30).losses, expected.losses, rtol=1e-12)


SEEN = np.array([True, True, False, True, False])


def local(y, mask=None, size=5):
    """A Gaussian and a Gamma latent for each datum; rows may be hidden."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    mask = True if mask is None else mask
    with numpyro.plate("data", size):
        w = numpyro.sample("w", dist.Normal(mu, 0.7).mask(mask))
        u = numpyro.sample("u", dist.Gamma(3.0, 2.0).mask(mask))
        numpyro.sample("y", dist.Normal(w, 1 / jnp.sqrt(u)).mask(mask), obs=y)


def test_hidden_latents_are_as_left_out():
    """They have the bound of the model without them, and their prior."""
    hidden = CAVI(local, DATA, SEEN).run(400, tol=0)
    rest = CAVI(local, DATA[SEEN], None, 3).run(400, tol=0)
    assert hidden.bound == pytest.approx(rest.bound, rel=1e-12)
    q, other = hidden.posterior, rest.posterior
    assert float(q["mu"].loc) == pytest.approx(float(other["mu"].loc), rel=1e-12)
    np.testing.assert_allclose(q["w"].loc[SEEN], other["w"].loc, rtol=1e-10)
    np.testing.assert_allclose(q["u"].rate[SEEN], other["u"].rate, rtol=1e-10)
    np.testing.assert_allclose(q["w"].loc[~SEEN], q["mu"].loc, rtol=1e-12)
    np.testing.assert_allclose(q["w"].scale[~SEEN], 0.7, rtol=1e-12)
    np.testing.assert_allclose(q["u"].concentration[~SEEN], 3.0)
    np.testing.assert_allclose(q["u"].rate[~SEEN], 2.0)
    # The mask is data.
    cavi = CAVI(local, DATA, ~SEEN).update(DATA, SEEN)
    assert cavi.run(400, tol=0).bound == pytest.approx(rest.bound, rel=1e-12)


@pytest.mark.slow
def test_minibatches_of_hidden_latents():
    stochastic = StochasticCAVI(CAVI(local, DATA, SEEN), "data", 2, num_local_steps=100)
    result = stochastic.run(3)
    moments = {n: f.moments(result.params[n]) for n, f in result.factors.items()}
    every = result.local(np.arange(5))
    moments.update({n: f.moments(every.params[n]) for n, f in every.factors.items()})
    plan = stochastic.cavi.plan
    bound = plan.expected_log_joint(plan.arrays, moments)
    bound = bound + plan.entropy(plan.arrays, {**result.params, **every.params})
    assert result.bound == pytest.approx(float(bound), rel=1e-10)
    np.testing.assert_allclose(every.posterior["u"].concentration[~SEEN], 3.0)


def test_missing_observations_are_imputed():
    """obs_mask: mean field of what is missing and of mu, in closed form."""

    def model(x):
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        with numpyro.plate("data", 5):
            numpyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=SEEN)

    result = CAVI(model, np.where(SEEN, DATA, 99.0)).run(400, tol=0)
    precision = 1 / 4 + 5
    mean = DATA[SEEN].sum() / (precision - 2)  # (sum + 2 mean) / precision = mean
    q = result.posterior
    assert float(q["mu"].loc) == pytest.approx(mean, rel=1e-12)
    assert float(q["mu"].scale) == pytest.approx(precision**-0.5, rel=1e-12)
    np.testing.assert_allclose(q["x_unobserved"].loc, mean, rtol=1e-12)
    # E log p(mu) + E log p(x | mu) + entropies of mu and of the two that are missing
    square = mean**2 + 1 / precision
    want = -0.5 * np.log(2 * np.pi * 4) - square / 8
    want += -2.5 * np.log(2 * np.pi) - 0.5 * ((DATA[SEEN] - mean) ** 2 + 1 / precision).sum()
    want += -0.5 * 2 * (1 + 1 / precision)
    want += 0.5 * np.log(2 * np.pi * np.e / precision) + np.log(2 * np.pi * np.e)
    assert result.bound == pytest.approx(want, rel=1e-12)


@pytest.mark.slow
def test_missing_covariates_are_imputed():
    """Joint rows, some hidden: the bound against draws of what is not."""
    rng = np.random.default_rng(4)
    covariates = rng.normal(size=(5, 2))

    def model(y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("data", 5):
            normal = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
            x = numpyro.sample("x", normal, obs=covariates, obs_mask=SEEN)
            numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    result = CAVI(model, DATA).run(100, tol=0)
    assert (np.diff(result.losses) < 1e-9).all()
    draws = result.sample(jax.random.PRNGKey(0), (20_000,))
    log_p = jax.vmap(lambda values: log_density(model, (DATA,), {}, values)[0])(draws)
    log_w = result.log_density({"w": draws["w"]})
    log_x = result.posterior["x_unobserved"].log_prob(draws["x_unobserved"])
    weights = np.asarray(log_p - log_w - log_x[:, ~SEEN].sum(1))
    error = weights.std() / len(weights) ** 0.5
    assert abs(weights.mean() - result.bound) < 4 * error
    assert 4 * error < 0.1  # an entropy of a hidden row is 2.8 nats


def test_hidden_values_that_others_use_are_refused():
    def masked(x):
        with handlers.mask(mask=False):
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def joint(x):
        with numpyro.plate("columns", 3):
            w = numpyro.sample("w", dist.Normal(0.0, 1.0).mask(np.array([True, False, True])))
        numpyro.sample("x", dist.Normal(w.sum(), 1.0), obs=x)

    for model in (masked, joint):
        with pytest.raises(NotConjugateError, match="'w' is masked, and other sites use"):
            CAVI(model, 2.0)

    def block(x):
        tau = numpyro.sample("tau", dist.Gamma(1.0, 1.0))
        with numpyro.plate("data", 5):
            w = numpyro.sample("w", dist.Normal(0.0, 1 / jnp.sqrt(tau)).mask(SEEN))
            numpyro.sample("x", dist.Normal(w, 1 / jnp.sqrt(tau)).mask(SEEN), obs=x)

    with pytest.raises(NotConjugateError, match="'w' is masked: leave it out of block"):
        CAVI(block, DATA, blocks=[("tau", "w")])


def test_either_kind_of_key_gives_the_same_draws():
    cavi = CAVI(gaussian, DATA)
    old = cavi.run(2, rng_key=jax.random.PRNGKey(5))
    new = cavi.run(2, rng_key=jax.random.key(5))
    np.testing.assert_array_equal(old.losses, new.losses)


def test_masked_observations_count_for_nothing():
    mask = np.array([True, False, True, False])

    def model(x):
        mu = numpyro.sample("mu", dist.Normal(1.0, 2.0))
        with numpyro.plate("data", 4), handlers.mask(mask=mask):
            numpyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    q = CAVI(model, np.array([0.5, np.nan, -1.0, 100.0])).run(3).posterior["mu"]
    assert float(q.scale) == pytest.approx((1 / 4 + 2) ** -0.5)
    assert float(q.loc) == pytest.approx((1 / 4 - 0.5) / (1 / 4 + 2))


def test_a_subsampled_plate_has_its_scale():
    """One subsample, each datum of it counting N/B times."""

    def model(x):
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        with numpyro.plate("data", len(x), subsample_size=4) as index:
            numpyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])

    x = np.arange(12.0)
    result = CAVI(model, x).run(3)
    q = result.posterior["mu"]
    precision = 1 / 4 + 12
    assert float(q.scale) == pytest.approx(precision**-0.5)
    total = 3 * x[np.asarray(handlers_index(model, x))].sum()
    assert float(q.loc) == pytest.approx(total / precision)


def handlers_index(model, x):
    """The subsample that a trace under the derivation's key draws."""
    return handlers.trace(handlers.seed(model, jax.random.PRNGKey(0))).get_trace(x)["data"]["value"]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 1.5}, "num_steps"),
        ({"num_restarts": 0}, "num_restarts"),
        ({"tol": -1.0}, "tol"),
    ],
)
def test_arguments_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        CAVI(gaussian, DATA).run(**options)


def test_data_that_are_not_numbers_name_a_site():
    with pytest.raises((ValueError, NotConjugateError), match="infinite or NaN"):
        CAVI(gaussian, np.array([1.0, np.nan])).run(3)


def test_a_derivation_that_is_wrong_is_noticed(monkeypatch):
    """The check at construction: plant an error in a rule."""
    from pyro_vi_ext.cavi import densities

    rule = densities.DENSITIES["Gamma"]
    wrong = densities.Density(rule.names, lambda a, x, p: rule.log_density(a, x, p).scaled(1.01))
    monkeypatch.setitem(densities.DENSITIES, "Gamma", wrong)
    with pytest.raises(NotConjugateError, match="derivation is wrong"):
        CAVI(gaussian, DATA)


def test_a_model_without_latents_is_refused():
    def model(x):
        numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(NotConjugateError, match="no latent"):
        CAVI(model, 1.0)


def test_single_precision_works():
    with enable_x64(False):
        result = CAVI(gaussian, DATA.astype(np.float32)).run(30)
    doubles = CAVI(gaussian, DATA).run(30)
    assert result.bound == pytest.approx(doubles.bound, rel=1e-5)
