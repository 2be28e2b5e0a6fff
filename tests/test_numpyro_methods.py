"""NumPyro's ways to draws and weights: models whose posterior and evidence are known."""

import math
from functools import partial

import numpy as np
import pytest
import scipy.stats as st

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from numpyro import handlers  # noqa: E402
from numpyro.infer import NUTS, Trace_ELBO  # noqa: E402
from numpyro.infer.autoguide import AutoDelta, AutoNormal  # noqa: E402

from pyro_vi_ext.comparison import compare  # noqa: E402
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64  # noqa: E402
from pyro_vi_ext.numpyro_methods import by_cavi, by_numpyro_svi, by_nuts  # noqa: E402

X = np.array([0.3, 1.9, 2.4, -0.5, 1.1])
LOC, SCALE = float(X.sum()) / 6, 6**-0.5
LOG_EVIDENCE = float(st.multivariate_normal(cov=np.eye(5) + 1).logpdf(X))


@pytest.fixture(scope="module", autouse=True)
def doubles():
    with enable_x64(True), dist.distribution.validation_enabled(False):
        yield


def model(x, scale=1.0):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.deterministic("twice", 2 * z)
    with numpyro.plate("data", len(x)), handlers.scale(scale=scale):
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x, shift=0.0):
    loc = numpyro.param("loc", LOC + SCALE * shift)
    numpyro.sample("z", dist.Normal(loc, SCALE))


def svi(guide, *, of=model, num_steps=1):
    adam = numpyro.optim.Adam(1e-12)
    return by_numpyro_svi(of, guide, adam, Trace_ELBO(), X, num_steps=num_steps)


@pytest.fixture(scope="module")
def comparison():
    return compare(
        {
            "CAVI": by_cavi(model, X),
            "NUTS": by_nuts(NUTS(model), X, num_chains=2, num_warmup=200, num_samples=1500),
            "SVI": svi(guide),
            "shifted": svi(partial(guide, shift=0.5)),
        },
        reference="NUTS",
        log_evidence=LOG_EVIDENCE,
        progress=False,
    )


@pytest.mark.parametrize("method", ["CAVI", "SVI"])
def test_exact_methods_have_the_evidence_and_no_error(comparison, method):
    row, outcome = comparison[method], comparison.outcomes[method]
    assert row["bound"] == pytest.approx(LOG_EVIDENCE, abs=1e-9)
    assert np.allclose(outcome.log_p - outcome.log_q, LOG_EVIDENCE, atol=1e-8, rtol=0)
    assert row["gap"] == pytest.approx(0.0, abs=1e-9) and row["pareto_k"] == -math.inf
    assert row["rms_error"] < 4 * row["noise"] < 0.25
    assert abs(row["sd_ratio"] - 1) < 4 * (1 / 4000 + 1 / 2000) ** 0.5
    z = outcome.draws["z"]
    assert z.shape == (1, 2000) and st.kstest(z[0], st.norm(LOC, SCALE).cdf).pvalue > 1e-3
    assert np.array_equal(outcome.draws["twice"], 2 * z)
    assert row["seconds"] > 0


def test_a_shifted_guide_is_off_by_its_shift(comparison):
    """The errors, and the gap, which is the KL 0.5^2 / 2."""
    row = comparison["shifted"]
    assert abs(row["rms_error"] - 0.5) < 4 * row["noise"] < 0.5
    assert abs(row["gap"] - 0.125) < 4 * row["bound_standard_error"]
    assert row["pareto_k"] < 0.7


def test_the_reference_is_reported(comparison):
    draws = comparison.outcomes["NUTS"].draws["z"]
    assert draws.shape == (2, 1500) and comparison.r_hat < 1.01
    assert 3000**-0.5 < comparison.reference_error < 3 * 3000**-0.5
    assert comparison["NUTS"]["bound"] is None and comparison["NUTS"]["pareto_k"] is None
    assert comparison.compared == ["z", "twice"] or comparison.compared == ["twice", "z"]
    assert "r-hat <= 1.00" in str(comparison)


# --- labels --------------------------------------------------------------------------------------


Y = np.random.default_rng(0).normal(size=15) + np.repeat([-1.0, 1.0], [5, 10])


def mixture(y, marginalize=False, scale=1.0):
    labels = dist.Categorical(jnp.array([0.4, 0.6]))
    with numpyro.plate("components", 2):
        mu = numpyro.sample("mu", dist.Normal(0.0, scale))
    with numpyro.plate("data", len(y)):
        if marginalize:
            numpyro.sample("y", dist.MixtureSameFamily(labels, dist.Normal(mu, 1.0)), obs=y)
        else:
            z = numpyro.sample("z", labels)
            numpyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


marginal = partial(mixture, marginalize=True)


def test_labels_added_up_raise_the_bound_of_cavi():
    """By KL(q(z) || p(z | mu, y)) of the same q(mu), the mean difference of the log-weights."""
    full = by_cavi(mixture, Y, num_restarts=1)(4000, 0, False)
    part = by_cavi(mixture, Y, num_restarts=1, marginal=marginal)(4000, 0, False)
    assert set(full.draws) == {"mu", "z"} and set(part.draws) == {"mu"}
    log_w, log_v = full.log_p - full.log_q, part.log_p - part.log_q
    assert abs(log_w.mean() - full.bound) < 4 * log_w.std() / 4000**0.5  # the bound of CAVI
    mu, q = part.draws["mu"][0], full.fitted.posterior["mu"]
    assert np.allclose(part.log_q, st.norm(q.loc, q.scale).logpdf(mu).sum(-1))
    joint = np.log([0.4, 0.6]) + st.norm(mu[:, None], 1).logpdf(Y[:, None])  # (draws, data, 2)
    log_p = st.norm(0, 1).logpdf(mu).sum(-1) + np.logaddexp(*joint.T).T.sum(-1)
    assert np.allclose(part.log_p, log_p)
    probs = np.asarray(full.fitted.posterior["z"].probs)
    log_posterior = joint - np.logaddexp(*joint.T).T[..., None]
    kl = (probs * (np.log(probs) - log_posterior)).sum((1, 2))
    assert part.bound is None and f"is {full.bound:.4f} nats, exactly" in part.notes[0]
    error = (log_v - kl).std() / 4000**0.5
    assert abs((log_v - kl).mean() - full.bound) < 4 * error < kl.mean()


def test_another_model_as_marginal_is_refused():
    for scale in (0.3, 30.0):  # one of them raises the bound
        other = partial(marginal, scale=scale)
        with pytest.raises(ValueError, match="log-density of site 'mu' is .* is another model"):
            by_cavi(mixture, Y, num_restarts=1, marginal=other)(1000, 0, False)

    def shifted(y):
        marginal(y + 3.0)

    with pytest.raises(ValueError, match="marginal: its bound is .* marginal is another model"):
        by_cavi(mixture, Y, num_restarts=1, marginal=shifted)(1000, 0, False)

    def renamed(x):
        numpyro.sample("loc", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="its site 'loc' is no latent of the model"):
        by_cavi(model, X, num_restarts=1, marginal=renamed)(1000, 0, False)


# --- guides and refusals -------------------------------------------------------------------------


def test_autoguides_are_scored_by_their_density():
    """A Gamma prior alone, under AutoNormal, which is LogNormal there."""

    def prior(x):
        numpyro.sample("z", dist.Gamma(2.0, 1.0))

    outcome = svi(AutoNormal(prior, init_scale=0.3), of=prior)(200, 0, False)
    z, params = outcome.draws["z"][0], outcome.fitted.params
    loc, scale = float(params["z_auto_loc"]), float(params["z_auto_scale"])
    assert np.allclose(outcome.log_p, st.gamma(2.0).logpdf(z))
    assert np.allclose(outcome.log_q, st.lognorm(scale, scale=math.exp(loc)).logpdf(z))


def test_a_point_mass_has_neither_bound_nor_weights():
    outcome = svi(AutoDelta(model))(50, 0, False)
    assert outcome.log_p is None and "point mass at site 'z'" in outcome.notes[0]


@pytest.mark.filterwarnings("ignore:Found")  # NumPyro's own warnings of the same
def test_latents_of_one_side_only_are_refused():
    def empty(x):
        numpyro.param("loc", 0.0)

    def more(x):
        guide(x)
        numpyro.sample("noise", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'noise' is a latent of the guide and not of the model"):
        svi(more)(25, 0, False)
    with pytest.raises(ValueError, match="'z' is a latent of the model and not of the guide"):
        svi(empty)(25, 0, False)


def test_noise_of_the_guide_itself_is_refused():
    """log q of noise and latents is not that of the latents: the bound would be too high."""

    def noisy(x):
        numpyro.sample("noise", dist.Normal(0.0, 100.0), infer={"is_auxiliary": True})
        guide(x)

    with pytest.raises(NotImplementedError, match="'noise' of the guide is noise of its own"):
        svi(noisy)(25, 0, False)


def test_scaled_and_subsampled_models_are_refused():
    with pytest.raises(NotImplementedError, match="Site 'x' of the model is scaled or subsampled"):
        svi(guide, of=partial(model, scale=0.5))(25, 0, False)

    def subsampled(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x), subsample_size=2) as index:
            numpyro.sample("x", dist.Normal(z, 1.0), obs=jnp.asarray(x)[index])

    with pytest.raises(NotImplementedError, match="Site 'x' of the model is scaled or subsampled"):
        by_cavi(subsampled, X)(25, 0, False)
