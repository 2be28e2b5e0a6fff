"""From terms to the expected log joint: linear in each site's moments, and the conjugacy test."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pyro_vi_ext.cavi import CAVI, NotConjugateError
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64


@pytest.fixture(autouse=True)
def doubles():
    with enable_x64(True):
        yield


def regression(x, y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    tau = numpyro.sample("tau", dist.Gamma(2.0, 1.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x @ w, tau**-0.5), obs=y)


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(6, 2)), rng.normal(size=6)


def random_moments(cavi, seed):
    rng = np.random.default_rng(seed)
    state = cavi.run(1).state
    return jax.tree.map(lambda v: jnp.asarray(rng.normal(size=np.shape(v))), state)


def test_f_is_linear_in_the_moments_of_each_site():
    """<dF/dm, m> is the part of F that has the site; the rest does not change with it."""
    cavi = CAVI(regression, *data())
    plan, moments = cavi.plan, random_moments(cavi, 1)
    for site in plan.factors:
        eta = plan.natural_parameters(plan.arrays, moments, site)
        inner = sum(jnp.vdot(eta[key], moments[site][key]) for key in eta)
        part = plan.expected_log_joint(plan.arrays, moments, of=site)
        rest = plan.expected_log_joint(plan.arrays, moments, without=site)
        whole = plan.expected_log_joint(plan.arrays, moments)
        assert float(inner) == pytest.approx(float(part), rel=1e-12)
        assert float(part + rest) == pytest.approx(float(whole), rel=1e-12)


def test_numpy_and_jax_give_the_same_f():
    cavi = CAVI(regression, *data())
    moments = random_moments(cavi, 2)
    arrays = cavi.plan.arrays
    own = cavi.plan.expected_log_joint(arrays, jax.tree.map(np.asarray, moments), xp=np)
    assert float(own) == pytest.approx(float(cavi.plan.expected_log_joint(arrays, moments)))


def test_axes_that_meet_are_joint_and_no_others():
    def model(y, g):
        with numpyro.plate("groups", 3):
            b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        c = numpyro.sample("c", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(b[g, 0] + b[g, 1] + c[g], 1.0), obs=y)

    factors = CAVI(model, data()[1], np.array([0, 1, 2, 0, 1, 2])).plan.factors
    assert factors["b"].axes.joint == (1,)  # two columns of a group meet, groups do not
    assert factors["c"].axes.joint == ()  # the same entry with itself


def test_products_of_three_gaussian_entries_are_refused():
    def model(y):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(a[0] * a[1] * a[2], 1.0), obs=y)

    with pytest.raises(NotConjugateError, match="Site 'y'.*closed-form update"):
        CAVI(model, 1.0)


def test_neighbours_in_a_plate_are_refused():
    """A parallel update of an Ising model is no coordinate ascent."""

    def model():
        with numpyro.plate("sites", 4):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
        s = 2.0 * z - 1.0
        numpyro.factor("bonds", 0.3 * (s[1:] * s[:-1]).sum())

    with pytest.raises(NotConjugateError, match=r"Site 'bonds'.*\[z = k\] x \[z = k\]"):
        CAVI(model)


def test_the_structure_tells_models_apart_and_not_data():
    x, y = data()
    a, b = CAVI(regression, x, y).plan, CAVI(regression, 2 * x, y + 1).plan
    assert a.structure == b.structure
    # The data enter through their Gram matrix, whose shape does not depend on how many there are.
    assert a.structure == CAVI(regression, x[:4], y[:4]).plan.structure
    wide = np.concatenate([x, x], 1)

    def four(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        tau = numpyro.sample("tau", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(x @ w, tau**-0.5), obs=y)

    assert a.structure != CAVI(four, wide, y).plan.structure
