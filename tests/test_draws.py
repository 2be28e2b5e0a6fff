"""Draws of exact posteriors, and densities against those computed by hand."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger

from pyro_vi_ext import SemiImplicitELBO
from pyro_vi_ext.guides import AutoSemiImplicit

from .exporting import (
    N,
    X,
    assert_constant,
    export,
    hand_computed,
    hierarchy,
    hierarchy_evidence,
    hierarchy_posterior,
    stats,
    tensor,
)

pytestmark = pytest.mark.usefixtures("float64")


WAYS = {
    "one run": {},
    "in batches": {"batch_size": 7},
    "one by one": {"vectorize_particles": False, "num_draws": 8},
}


@pytest.mark.parametrize("batch", [None, 2, 3, 4, 7, 1])
@pytest.mark.parametrize("way", WAYS)
def test_hierarchy_by_hand(batch, way):
    """Draws, densities and data are those of the full model, whatever the minibatch."""
    data = export(hierarchy, hierarchy_posterior, X, batch, **WAYS[way])
    log_lik, log_p, log_q = hand_computed(data, X)
    torch.testing.assert_close(tensor(data, "log_likelihood", "x"), log_lik, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stats(data, "log_p"), log_p, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stats(data, "log_q"), log_q, rtol=1e-10, atol=1e-10)
    assert_constant(data, hierarchy_evidence(X))
    torch.testing.assert_close(tensor(data, "observed_data", "x"), X, rtol=0, atol=0)
    mu, z = tensor(data, "posterior", "mu"), tensor(data, "posterior", "z")
    torch.testing.assert_close(tensor(data, "posterior", "twice"), 2 * mu)
    torch.testing.assert_close(tensor(data, "posterior", "shifted"), z + 1)
    draws = data.posterior.sizes["draw"]
    assert len(torch.unique(mu)) == draws and len(torch.unique(z)) == draws * N
    assert data["posterior"]["z"].dims == ("chain", "draw", "data")


def test_draws_of_a_walk_have_the_posterior():
    data = export(hierarchy, hierarchy_posterior, X, 3, num_draws=4000)
    precision = 1 + N / 1.25
    for name, mean, variance in [
        ("mu", X.sum() / 1.25 / precision, torch.tensor(1 / precision)),
        ("z", (X.sum() / 1.25 / precision + 4 * X) / 5, 0.2 + 1 / precision / 25),
    ]:
        draws = tensor(data, "posterior", name)
        se = (variance / len(draws)) ** 0.5
        assert ((draws.mean(0) - mean).abs() < 4 * se).all()
        assert ((draws.var(0) / variance - 1).abs() < 4 * (2 / len(draws)) ** 0.5).all()


@pytest.mark.parametrize("batch", [None, 3])
def test_posterior_predictive(batch):
    """x_i ~ N(z_i, 1/2) at posterior draws of z: mean and variance within 4 standard errors."""
    data = export(hierarchy, hierarchy_posterior, X, batch, num_draws=4000)
    z = tensor(data, "posterior", "z")
    new = tensor(data, "posterior_predictive", "x")
    assert data["posterior_predictive"]["x"].dims == ("chain", "draw", "data")
    residual = (new - z) / 0.5  # standard normal, and independent of everything else
    assert (residual.mean(0).abs() < 4 / len(new) ** 0.5).all()
    assert ((residual.var(0) - 1).abs() < 4 * (2 / len(new)) ** 0.5).all()
    assert (torch.corrcoef(residual.T) - torch.eye(N)).abs().max() < 5 / len(new) ** 0.5


def test_scales_are_ignored():
    def scaled(fn, scale):
        return poutine.scale(fn, scale)

    data = export(scaled(hierarchy, 0.1), scaled(hierarchy_posterior, 7.0), X, 4)
    assert_constant(data, hierarchy_evidence(X))
    torch.testing.assert_close(
        tensor(data, "log_likelihood", "x"), hand_computed(data, X)[0], rtol=1e-10, atol=1e-10
    )


def test_factors_soft_constraints_and_scopes():
    """A factor and an observed function of latents are in log_p, but are no data."""

    def model(x):
        z = pyro.sample("a/z", dist.Normal(0.0, 1.0))
        pyro.factor("tilt", -(z**2))
        pyro.sample("soft", dist.Normal(0.0, 1.0), obs=z)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[0])

    def guide(x):
        pyro.sample("a/z", dist.Normal(0.0, 1.0))

    for vectorized in (True, False):
        data = export(model, guide, X, vectorize_particles=vectorized)
        assert set(data["posterior"].data_vars) == {"a.z"}
        for group in ("observed_data", "log_likelihood", "posterior_predictive"):
            assert set(data[group].data_vars) == {"x"}
        z = tensor(data, "posterior", "a.z")
        normal = dist.Normal(0.0, 1.0)
        log_p = 2 * normal.log_prob(z) - z**2 + normal.log_prob(X[0] - z)
        torch.testing.assert_close(stats(data, "log_p"), log_p)


def no_latent(x):
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[0])


def no_guide(x):
    pass


def test_model_without_latents():
    with pytest.raises(ValueError, match="no latent site"):
        export(no_latent, no_guide, X)


# --- guides of every kind --------------------------------------------------------------------


def test_sites_without_reparameterisation():
    """Discrete and Gamma posteriors, exact: b ~ Bernoulli, rate ~ Gamma, x ~ Poisson."""

    def model(x):
        with pyro.plate("coins", 3):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(2 * b, 1.0), obs=x[:3])
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("n", dist.Poisson(rate), obs=torch.tensor(4.0))

    def guide(x):
        one = dist.Normal(2.0, 1.0).log_prob(x[:3]) + math.log(0.3)
        zero = dist.Normal(0.0, 1.0).log_prob(x[:3]) + math.log(0.7)
        with pyro.plate("coins", 3):
            pyro.sample("b", dist.Bernoulli(logits=one - zero))
        pyro.sample("rate", dist.Gamma(6.0, 2.0))

    one = dist.Normal(2.0, 1.0).log_prob(X[:3]) + math.log(0.3)
    zero = dist.Normal(0.0, 1.0).log_prob(X[:3]) + math.log(0.7)
    counts = dist.NegativeBinomial(2.0, probs=torch.tensor(0.5)).log_prob(torch.tensor(4.0))
    data = export(model, guide, X)
    assert_constant(data, torch.logaddexp(one, zero).sum() + counts)
    assert data["log_likelihood"]["n"].dims == ("chain", "draw")
    assert data["observed_data"]["n"].dims == ()


def regression(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


AUTO = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoDelta": AutoDelta,
    "AutoNormalMessenger": AutoNormalMessenger,
}


@pytest.mark.parametrize("auto", AUTO)
@pytest.mark.parametrize("vectorized", [True, False])
def test_auto_guides(auto, vectorized):
    """Only the model's latents are exported; log_q is the guide's own density."""
    guide = AUTO[auto](regression)
    guide(X)
    data = export(regression, guide, X, num_draws=20, vectorize_particles=vectorized)
    assert set(data["posterior"].data_vars) == {"loc", "scale"}
    loc, scale = tensor(data, "posterior", "loc"), tensor(data, "posterior", "scale")
    log_p = dist.Normal(0.0, 1.0).log_prob(loc) + dist.LogNormal(0.0, 0.5).log_prob(scale)
    log_p = log_p + dist.Normal(loc[:, None], scale[:, None]).log_prob(X).sum(1)
    torch.testing.assert_close(stats(data, "log_p"), log_p)
    unconstrained = torch.stack([loc, scale.log()], -1)
    if auto == "AutoDelta":
        expected = torch.zeros(20)
    elif auto == "AutoMultivariateNormal":
        tril = guide.scale[..., None] * guide.scale_tril
        q = dist.MultivariateNormal(guide.loc, scale_tril=tril)
        expected = q.log_prob(unconstrained) - scale.log()
    else:
        locs = torch.stack([guide.locs.loc, guide.locs.scale])
        scales = torch.stack([guide.scales.loc, guide.scales.scale])
        expected = dist.Normal(locs, scales).log_prob(unconstrained).sum(-1) - scale.log()
    torch.testing.assert_close(stats(data, "log_q"), expected.detach())


# --- semi-implicit guides --------------------------------------------------------------------


def log_h_se(z, psi_loc, num_extra):
    """Standard deviation of log h_K(z), psi ~ N(psi_loc, 1/2), z | psi ~ N(psi, 1/2)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    psi = psi_loc[..., None] + 0.5 * torch.as_tensor(nodes)
    density = dist.Normal(psi, 0.5).log_prob(z[..., None]).exp()
    weights = torch.as_tensor(weights / weights.sum())
    mean = (density * weights).sum(-1)
    variance = (density**2 * weights).sum(-1) - mean**2
    return mean.log(), (variance / mean**2 / num_extra) ** 0.5


def si_model(x, batch=None, local=True):
    if not local:
        pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        z = pyro.sample("z" if local else "v", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def si_guide(x, batch=None, local=True):
    noise = {"is_auxiliary": True}
    if not local:
        psi = pyro.sample("psi", dist.Normal(1.0, 0.5), infer=noise)
        pyro.sample("z", dist.Normal(psi, 0.5))
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        if local:
            psi = pyro.sample("psi", dist.Normal(x[index], 0.5), infer=noise)
            pyro.sample("z", dist.Normal(psi, 0.5))
        else:
            pyro.sample("v", dist.Normal(0.5 * x[index], 1.0))


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("vectorized", [True, False])
def test_log_q_of_a_semi_implicit_guide(local, batch, vectorized):
    """log h_K is within 5 standard errors of the log of the integral, draw by draw."""
    num_extra, num_draws = (20_000, 30) if vectorized else (200, 2)
    data = export(
        si_model,
        si_guide,
        X,
        batch,
        local,
        num_draws=num_draws,
        num_mixing_particles=num_extra,
        vectorize_particles=vectorized,
    )
    assert set(data["posterior"].data_vars) == ({"z"} if local else {"z", "v"})
    assert data.attrs["num_mixing_particles"] == num_extra
    z = tensor(data, "posterior", "z")
    log_q, se = log_h_se(z, X if local else torch.tensor(1.0), num_extra)
    if local:
        log_q, se = log_q.sum(1), (se**2).sum(1) ** 0.5
    else:
        v = tensor(data, "posterior", "v")
        log_q = log_q + dist.Normal(0.5 * X, 1.0).log_prob(v).sum(1)
    assert ((stats(data, "log_q") - log_q).abs() < 5 * se).all()
    if vectorized:
        assert se.max() < 0.1


def test_degenerate_mixing_is_the_own_conditional():
    """K = 0 leaves the own psi alone: not the marginal."""
    data = export(si_model, si_guide, X, None, False, num_mixing_particles=0)
    z, v = tensor(data, "posterior", "z"), tensor(data, "posterior", "v")
    marginal, _ = log_h_se(z, torch.tensor(1.0), 1)
    own = stats(data, "log_q") - dist.Normal(0.5 * X, 1.0).log_prob(v).sum(1)
    assert own.std() > 0.1 and (own - marginal).abs().max() > 0.1


@pytest.mark.parametrize("vectorized", [True, False])
def test_own_psi_is_part_of_the_average(vectorized):
    """psi = +-20 and z ~ N(psi, 1): at K = 1 h is q(z | own psi), or half of it."""

    def model():
        pyro.sample("z", dist.Normal(0.0, 10.0))

    def guide():
        sign = pyro.sample("sign", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(40 * sign - 20, 1.0))

    data = export(
        model, guide, num_mixing_particles=1, batch_size=5, vectorize_particles=vectorized
    )
    z = tensor(data, "posterior", "z")
    loss = dist.Normal(20 * z.sign(), 1.0).log_prob(z) - stats(data, "log_q")
    halved = loss > 0.3
    torch.testing.assert_close(loss, math.log(2) * halved)
    assert 0 < halved.sum() < len(z)


def test_a_global_average_is_formed_once():
    """Three minibatches, one run of the guide on the extra psi, whatever its poutine.scale."""
    large = []

    def guide(x, batch, local):
        psi = pyro.sample("psi", dist.Normal(1.0, 0.5), infer={"is_auxiliary": True})
        large.append(psi.numel() >= 500)
        pyro.sample("z", dist.Normal(psi, 0.5))
        with poutine.scale(scale=3.0):
            pyro.sample("also", dist.Normal(psi, 0.5))
        with pyro.plate("data", N, subsample_size=batch) as index:
            pyro.sample("v", dist.Normal(0.5 * x[index], 1.0))

    def model(x, batch, local):
        pyro.sample("also", dist.Normal(0.0, 1.0))
        si_model(x, batch, local)

    data = export(model, guide, X, 4, False, num_draws=20, num_mixing_particles=500)
    assert sum(large) == 1
    assert set(data["posterior"].data_vars) == {"z", "also", "v"}


def test_auto_semi_implicit():
    """log_q is that of the SIVI bound: E log_weight is minus the loss of SemiImplicitELBO."""
    guide = AutoSemiImplicit(regression)
    guide(X)
    sizes = {"num_draws": 2000, "num_mixing_particles": 100}
    exports = [export(regression, guide, X, seed=seed, **sizes) for seed in range(10)]
    assert set(exports[0]["posterior"].data_vars) == {"loc", "scale"}
    objective = SemiImplicitELBO(num_particles=2000, num_mixing_particles=100)
    bounds = torch.tensor([-objective.loss(regression, guide, X) for _ in range(10)])
    means = torch.stack([stats(data, "log_weight").mean() for data in exports])
    assert abs(bounds.mean() - means.mean()) < 4 * ((bounds.var() + means.var()) / 10) ** 0.5
