"""Stochastic coordinate ascent: the natural-gradient steps of the paper, written by hand."""

import numpy as np
import pytest
from scipy.special import digamma, softmax

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
import numpyro.distributions as dist  # noqa: E402

from pyro_vi_ext.cavi import CAVI, StochasticCAVI  # noqa: E402
from pyro_vi_ext.cavi.starts import first_moments  # noqa: E402
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64  # noqa: E402

KEY = 3
NUM, SIZE = 60, 12


@pytest.fixture(scope="module", autouse=True)
def doubles():
    with enable_x64(True), dist.distribution.validation_enabled(False):
        yield


def mixture(x):
    pi = numpyro.sample("pi", dist.Dirichlet(jnp.array([1.0, 2.0])))
    with numpyro.plate("components", 2):
        mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
        tau = numpyro.sample("tau", dist.Gamma(2.0, 1.5))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(pi))
        numpyro.sample("x", dist.Normal(mu[z], 1 / jnp.sqrt(tau[z])), obs=x)


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    return rng.normal(size=NUM) + 4.0 * (rng.random(NUM) < 0.4)


@pytest.fixture(scope="module")
def cavi(x):
    return CAVI(mixture, x)


def by_hand(x, state, num_steps, delay, rate, batches):
    """Hoffman et al. 2013, figure 4, for this mixture: natural parameters after some steps."""
    eta = {n: {k: np.array(v) for k, v in own.items()} for n, own in state["eta"].items()}
    scale = NUM / SIZE
    for step in range(num_steps):
        own = x[batches[step]]
        a = eta["pi"]["log"] + 1
        variance = -0.5 / eta["mu"]["xx"]
        mean = eta["mu"]["x"] * variance
        shape, rates = eta["tau"]["log"] + 1, -eta["tau"]["pow1"]

        def logits(mean, variance, shape, rates, a, own=own):
            square = (own[:, None] - mean) ** 2 + variance
            log_tau = digamma(shape) - np.log(rates)
            return digamma(a) + 0.5 * log_tau - 0.5 * shape / rates * square

        r = scale * softmax(logits(mean, variance, shape, rates, a), 1)
        best = {"pi": {"log": np.array([1.0, 2.0]) - 1 + r.sum(0)}}
        rho = (step + 1 + delay) ** -rate

        def moved(name, key, value, rho=rho):
            eta[name][key] = (1 - rho) * eta[name][key] + rho * value

        moved("pi", "log", best["pi"]["log"])
        tau = shape / rates
        moved("mu", "x", tau * (r * own[:, None]).sum(0))
        moved("mu", "xx", -0.5 / 9 - 0.5 * tau * r.sum(0))
        variance = -0.5 / eta["mu"]["xx"]
        mean = eta["mu"]["x"] * variance
        square = (own[:, None] - mean) ** 2 + variance
        moved("tau", "log", 1.0 + 0.5 * r.sum(0))
        moved("tau", "pow1", -1.5 - 0.5 * (r * square).sum(0))
    return eta


@pytest.mark.parametrize(("delay", "rate"), [(1.0, 0.7), (10.0, 1.0)])
def test_steps_are_those_of_the_paper(cavi, x, delay, rate):
    stochastic = StochasticCAVI(cavi, "data", SIZE, delay=delay, forgetting_rate=rate)
    start = stochastic._start(jax.random.PRNGKey(KEY))
    batches = [np.random.default_rng([*start["seed"], 0]).permutation(NUM)[i * SIZE :][:SIZE]
               for i in range(4)]  # fmt: skip
    found = stochastic.run(4, state=start).state["eta"]
    want = by_hand(x, start, 4, delay, rate, batches)
    for name, own in want.items():
        for key, value in own.items():
            np.testing.assert_allclose(found[name][key], value, rtol=1e-11, err_msg=name)


def test_minibatches_of_all_rows_are_coordinate_ascent(cavi):
    """With a first step size of 1: the bounds of sweeps 1 and 2 from the same start."""
    stochastic = StochasticCAVI(cavi, "data", NUM, delay=0.0)
    start = first_moments(cavi._draws, cavi.plan, jax.random.PRNGKey(KEY), 0)
    eta, _ = stochastic._best(cavi.plan.arrays, start)
    state = {**stochastic._start(jax.random.PRNGKey(KEY)), "eta": eta}
    result, full = stochastic.run(1, state=state), cavi.run(2, tol=0, state=start)
    np.testing.assert_allclose(result.losses[0], full.losses[0], rtol=1e-12)
    np.testing.assert_allclose(result.bound, full.bound, rtol=1e-12)


@pytest.mark.parametrize("size", [NUM, 7])
def test_the_bound_is_that_of_all_rows(cavi, size):
    """Whether or not the minibatches share them equally."""
    result = StochasticCAVI(cavi, "data", size).run(5, jax.random.PRNGKey(KEY))
    params = {**result.params, "z": result.local(np.arange(NUM)).params["z"]}
    factors = cavi.plan.factors
    moments = {name: f.moments(params[name]) for name, f in factors.items()}
    want = cavi.plan.expected_log_joint(cavi.plan.arrays, moments)
    want = want + sum(f.entropy(params[name]) for name, f in factors.items())
    assert result.bound == pytest.approx(float(want), rel=1e-12)
    assert result.local([3, 50]).posterior["z"].probs.shape == (2, 2)
    np.testing.assert_allclose(
        result.local([50, 3]).posterior["z"].probs, np.exp(params["z"]["logits"])[[50, 3]]
    )


def test_it_comes_close_to_the_optimum(cavi):
    optimum = cavi.run(300, tol=1e-10).bound
    result = StochasticCAVI(cavi, "data", SIZE, forgetting_rate=1.0).run(2000)
    assert optimum - 0.01 < result.bound < optimum + 1e-9
    early = StochasticCAVI(cavi, "data", SIZE, forgetting_rate=1.0).run(10)
    assert early.bound < result.bound


def test_runs_go_on_as_if_they_had_not_stopped(cavi):
    stochastic = StochasticCAVI(cavi, "data", 7)  # minibatches that cross epochs
    whole = stochastic.run(25, jax.random.PRNGKey(KEY))
    part = stochastic.run(11, jax.random.PRNGKey(KEY))
    rest = stochastic.run(14, state=part.state)
    np.testing.assert_array_equal(whole.losses, np.concatenate([part.losses, rest.losses]))
    assert rest.bound == whole.bound
    assert rest.state["step"] == 25


def test_other_data_of_the_model_change_nothing(x):
    """A run is of the data that there were, also of as many others."""
    cavi = CAVI(mixture, x)
    stochastic = StochasticCAVI(cavi, "data", SIZE)
    before = stochastic.run(3)
    cavi.update(np.concatenate([x, 5.0 + x]))
    after = stochastic.run(3)
    np.testing.assert_array_equal(before.losses, after.losses)
    assert before.bound == after.bound
    for result in (before, after):
        np.testing.assert_array_equal(
            result.local([1, 7]).params["z"]["logits"], before.local([1, 7]).params["z"]["logits"]
        )
    renewed = StochasticCAVI(cavi, "data", SIZE)
    assert renewed.rows.num_rows == 2 * NUM


def test_all_rows_are_used_in_each_epoch():
    from pyro_vi_ext.cavi.stochastic import _Batches

    batches = _Batches(10, 4, [0, 7])
    rows = np.concatenate([batches[i] for i in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    np.testing.assert_array_equal(_Batches(10, 4, [0, 7])[3], batches[3])  # out of order


def student(x):
    """Two sites in the plate: labels and scales."""
    with numpyro.plate("components", 2):
        mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(jnp.array([0.5, 0.5])))
        u = numpyro.sample("u", dist.Gamma(2.0, 2.0))
        numpyro.sample("x", dist.Normal(mu[z], 1 / jnp.sqrt(u)), obs=x)


@pytest.mark.slow
def test_several_sites_in_the_plate(x):
    cavi = CAVI(student, x)
    stochastic = StochasticCAVI(cavi, "data", SIZE, forgetting_rate=1.0, num_local_steps=50)
    optimum = cavi.run(500, tol=1e-11).bound
    result = stochastic.run(3000)
    assert optimum - 0.01 < result.bound < optimum + 1e-9
    local = result.local(np.arange(5)).posterior
    assert local["u"].concentration.shape == local["z"].logits.shape[:1] == (5,)
    assert StochasticCAVI(cavi, "data", SIZE).num_local_steps == 10


def test_arguments_are_checked(cavi):
    for rate in (0.5, 1.1, float("nan")):
        with pytest.raises(ValueError, match="forgetting_rate"):
            StochasticCAVI(cavi, "data", 5, forgetting_rate=rate)
    with pytest.raises(ValueError, match="delay"):
        StochasticCAVI(cavi, "data", 5, delay=-1.0)
    with pytest.raises(ValueError, match="batch_size"):
        StochasticCAVI(cavi, "data", 0)
    with pytest.raises(ValueError, match="no plate"):
        StochasticCAVI(cavi, "rows", 5)
    result = StochasticCAVI(cavi, "data", 5).run(1)
    for rows in ([60], [-1], [[0]], [0.5], []):
        with pytest.raises(ValueError, match="rows must be"):
            result.local(rows)


def test_nothing_to_learn_is_refused():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=x)

    with pytest.raises(ValueError, match="All latents are in plate 'data'"):
        StochasticCAVI(CAVI(model, np.zeros(4)), "data", 2)


def test_improper_factors_are_errors():
    def model(x):
        tau = numpyro.sample("tau", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(0.0, 1 / jnp.sqrt(tau)), obs=x)
        numpyro.factor("steep", 10.0 * tau)

    with pytest.raises(ValueError, match="The first minibatch gives no distribution.*'tau'"):
        StochasticCAVI(CAVI(model, np.arange(4.0) / 4), "data", 2).run(1)


def test_minibatches_that_are_too_small_are_errors():
    """Rows whose terms push and pull: the sum over all is a distribution, those of some are not."""

    def model(c):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(c)):
            u = numpyro.sample("u", dist.Gamma(1000.0, 1000.0))
            numpyro.factor("push", c * w**2 * u)

    c = np.where(np.arange(20) % 2 == 0, 5.0, -5.5)
    cavi = CAVI(model, c)
    assert float(cavi.run(50).posterior["w"].scale) == pytest.approx(11**-0.5, rel=0.01)
    raised = set()
    for seed in range(6):
        with pytest.raises(ValueError, match="minibatch") as error:
            StochasticCAVI(cavi, "data", 1).run(20, jax.random.PRNGKey(seed))
        raised.add(str(error.value).split()[0])
    assert raised == {"The", "After"}  # in the first minibatch, and in a later one
