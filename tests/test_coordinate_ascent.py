"""CAVI as an object: runs, starts, other data, stopping, masks, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

from pyro_vi_ext.cavi import CAVI, NotConjugateError
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


def test_masked_latents_are_refused():
    """They have no density where they are masked, and what depends on them would go unsaid."""

    def masked(x):
        with handlers.mask(mask=False):
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def missing(x):
        with numpyro.plate("data", 3):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            seen = np.array([True, True, False])
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x, obs_mask=seen)

    with pytest.raises(NotConjugateError, match="Latent site 'w' is masked"):
        CAVI(masked, 2.0)
    with pytest.raises(NotConjugateError, match="Latent site 'x_unobserved' is masked"):
        CAVI(missing, np.array([1.0, -2.0, 0.0]))


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
