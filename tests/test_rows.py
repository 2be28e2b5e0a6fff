"""The expected log joint of some rows of a plate: unbiased, row by row, and refused where not."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
import numpyro.distributions as dist  # noqa: E402

from pyro_vi_ext.cavi import CAVI, NotConjugateError  # noqa: E402
from pyro_vi_ext.cavi.rows import Rows  # noqa: E402
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def doubles():
    with enable_x64(True), dist.distribution.validation_enabled(False):
        yield


def mixture(x, group):
    """Labels and a local scale in the plate; means by component, offsets by group outside of it."""
    with numpyro.plate("components", 2):
        mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    with numpyro.plate("groups", 3):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        u = numpyro.sample("u", dist.Gamma(2.0, 2.0))
        z = numpyro.sample("z", dist.Categorical(jnp.array([0.3, 0.7])))
        numpyro.sample("x", dist.Normal(mu[z] + a[group], 1 / jnp.sqrt(u)), obs=x)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    x, group = rng.normal(size=12), rng.integers(0, 3, 12)
    cavi = CAVI(mixture, x, group)
    state = cavi.run(1).state
    moments = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=np.shape(v))), state)
    return cavi, moments


def some(moments, rows, own):
    return {n: {k: v[own] if n in rows.local else v for k, v in m.items()}
            for n, m in moments.items()}  # fmt: skip


def test_pieces_of_all_rows_average_to_the_whole(case):
    """F and its derivatives by the statistics outside of the plate are means over the pieces."""
    cavi, moments = case
    plan = cavi.plan
    rows = Rows.of(plan, "data", 4)
    assert rows.local == ("u", "z")
    assert rows.plan.factors["u"].weight == 3.0
    whole = plan.expected_log_joint(plan.arrays, moments)
    values, gradients = [], []
    for own in np.random.default_rng(1).permutation(12).reshape(3, 4):
        arrays, part = rows.arrays(plan.arrays, own), some(moments, rows, own)
        values.append(rows.plan.expected_log_joint(arrays, part))
        gradients.append(rows.plan.natural_parameters(arrays, part, "mu"))
        # A row's own natural parameters are those it has among all, times N / B.
        for name in rows.local:
            eta = rows.plan.natural_parameters(arrays, part, name)
            full = plan.natural_parameters(plan.arrays, moments, name)
            for key, value in eta.items():
                np.testing.assert_allclose(value, 3.0 * full[key][own], rtol=1e-10, atol=1e-12)
    assert len({float(v) for v in values}) == 3  # the pieces do differ
    np.testing.assert_allclose(np.mean(values), whole, rtol=1e-12)
    full = plan.natural_parameters(plan.arrays, moments, "mu")
    for key in full:
        own = np.mean([g[key] for g in gradients], 0)
        np.testing.assert_allclose(own, full[key], rtol=1e-11, atol=1e-12)


def test_values_of_some_rows(case):
    cavi, _ = case
    rows = Rows.of(cavi.plan, "data", 2)
    values = {"u": jnp.arange(12.0), "z": jnp.arange(12), "mu": jnp.arange(2.0)}
    found = rows.values(values, "data", np.array([5, 1]))
    assert {n: v.tolist() for n, v in found.items()} == {"u": [5, 1], "z": [5, 1], "mu": [0, 1]}


def test_blocks_in_a_plate():
    """Normal-Gamma factors for each row, with the plate on the left of another axis."""

    def model(y):
        with numpyro.plate("rows", 6, dim=-2), numpyro.plate("columns", 2, dim=-1):
            tau = numpyro.sample("tau", dist.Gamma(2.0, 1.0))
            mu = numpyro.sample("mu", dist.Normal(0.0, 1 / jnp.sqrt(tau)))
            numpyro.sample("y", dist.Normal(mu, 1 / jnp.sqrt(tau)), obs=y)

    y = np.random.default_rng(2).normal(size=(6, 2))
    cavi = CAVI(model, y, blocks=[("mu", "tau")])
    rows = Rows.of(cavi.plan, "rows", 3)
    own = np.array([4, 0, 5])
    arrays = rows.arrays(cavi.plan.arrays, own)
    factor = rows.plan.factors["mu, tau"]
    full = cavi.plan.factors["mu, tau"]
    moments = {"mu, tau": jax.tree.map(lambda v: v[own], cavi.run(1).state["mu, tau"])}
    q = factor.update(rows.plan.natural_parameters(arrays, moments, "mu, tau"))
    want = cavi.run(1).params["mu, tau"]
    for key in q:
        np.testing.assert_allclose(q[key], want[key][own], rtol=1e-12)
    some_rows = {key: value[own] for key, value in want.items()}
    entropy = sum(float(full.entropy(jax.tree.map(lambda v, i=i: v[i : i + 1], want))) for i in own)
    assert factor.entropy(some_rows).shape == ()
    assert float(factor.entropy(some_rows)) == pytest.approx(2.0 * entropy, rel=1e-12)


def test_plates_and_sizes_are_checked(case):
    cavi, _ = case
    with pytest.raises(ValueError, match="plate='rows' is no plate.*'components', 'groups'"):
        Rows.of(cavi.plan, "rows", 2)
    for size in (0, 13):
        with pytest.raises(ValueError, match=r"1, \.\.\., 12, got"):
            Rows.of(cavi.plan, "data", size)


def test_rows_that_meet_are_refused():
    def chain(x):
        with numpyro.plate("data", 4):
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(w, 1.0), obs=x)
        numpyro.factor("total", w.sum())

    cavi = CAVI(chain, np.zeros(4))
    with pytest.raises(NotConjugateError, match="'total' has elements of 'w' in plate 'data' at"):
        Rows.of(cavi.plan, "data", 2)

    def joint(x):
        with numpyro.plate("data", 4):
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(w.sum(), 1.0), obs=x)

    with pytest.raises(NotConjugateError, match="'w'.*plate 'data'"):
        Rows.of(CAVI(joint, 1.0).plan, "data", 2)


def test_sites_of_that_length_must_be_in_the_plate():
    def outside(x):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        with numpyro.plate("data", 4):
            numpyro.sample("x", dist.Normal(w, 1.0), obs=x)

    with pytest.raises(NotConjugateError, match="'w' has an element for each row of plate 'data'"):
        Rows.of(CAVI(outside, np.zeros(4)).plan, "data", 2)


def test_blocks_across_the_plate_are_refused():
    def model(y):
        tau = numpyro.sample("tau", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", 4):
            mu = numpyro.sample("mu", dist.Normal(0.0, 1 / jnp.sqrt(tau)))
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def shared(y):
        tau = numpyro.sample("tau", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", 4):
            mu = numpyro.sample("mu", dist.Normal(0.0, 1 / jnp.sqrt(tau)))
            numpyro.sample("y", dist.Normal(mu, 1 / jnp.sqrt(tau)), obs=y)

    with pytest.raises(NotConjugateError):  # the likelihood has not the precision of the block
        CAVI(model, np.zeros(4), blocks=[("mu", "tau")])
    cavi = CAVI(shared, np.zeros(4), blocks=[("mu", "tau")])
    with pytest.raises(NotConjugateError, match=r"Block \('mu', 'tau'\).*plate 'data'"):
        Rows.of(cavi.plan, "data", 2)


def test_a_subsample_of_the_model_counts_as_often_in_the_entropy():
    """A plate that draws B of N rows: their factors are those of the rows themselves."""

    def model(x, size):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", size, subsample_size=len(x)):
            w = numpyro.sample("w", dist.Normal(mu, 1.0))
            numpyro.sample("x", dist.Normal(w, 1.0), obs=x)

    x = np.array([0.5, -1.0, 2.0])
    part = CAVI(model, x, 9).run(200, tol=0).posterior
    # As nine rows, three of each.
    whole = CAVI(model, np.tile(x, 3), 9).run(200, tol=0)
    np.testing.assert_allclose(part["w"].loc, whole.posterior["w"].loc[:3], rtol=1e-10)
    np.testing.assert_allclose(part["w"].scale, whole.posterior["w"].scale[:3], rtol=1e-12)
    np.testing.assert_allclose(part["mu"].loc, whole.posterior["mu"].loc, rtol=1e-10)
    np.testing.assert_allclose(CAVI(model, x, 9).run(200, tol=0).bound, whole.bound, rtol=1e-12)
