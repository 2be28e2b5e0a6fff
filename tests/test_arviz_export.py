"""from_pyro_svi: exact posteriors, hand-computed densities, walks over plates, both ArviZ lines."""

import importlib.metadata
import math
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)

from pyro_vi_ext import SemiImplicitELBO, from_pyro_svi
from pyro_vi_ext.guides import AutoSemiImplicit

X = torch.tensor([0.3, -1.2, 0.8, 1.9, -0.4, 0.1, 2.2, -0.7, 0.5, -1.6], dtype=torch.float64)
N = len(X)


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


def export(*args, **kwargs):
    kwargs.setdefault("format", "datatree")
    kwargs.setdefault("seed", 1)
    kwargs.setdefault("num_draws", 50)
    return from_pyro_svi(*args, **kwargs)


def tensor(data, group, name):
    """A variable without its chain, as a tensor."""
    values = data[group][name]
    return torch.as_tensor(values.values[0] if "chain" in values.dims else values.values)


def stats(data, name):
    return tensor(data, "sample_stats", name)


def assert_constant(data, value, tolerance=1e-10):
    """Every log-weight is the log evidence."""
    log_weight = stats(data, "log_weight")
    assert (log_weight - value).abs().max() < tolerance, (log_weight[:3], value)


# --- pairs with exact posteriors -------------------------------------------------------------


def hierarchy(x, batch=None):
    """mu global, z local: x_i ~ N(z_i, 1/2), z_i ~ N(mu, 1), mu ~ N(0, 1)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.deterministic("shifted", z + 1)
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])


def hierarchy_posterior(x, batch=None):
    precision = 1 + len(x) / 1.25
    mu = pyro.sample("mu", dist.Normal(x.sum() / 1.25 / precision, precision**-0.5))
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        pyro.sample("z", dist.Normal((mu + 4 * x[index]) / 5, 5**-0.5))


def hierarchy_evidence(x):
    cov = 1.25 * torch.eye(len(x)) + 1.0
    return dist.MultivariateNormal(torch.zeros(len(x)), cov).log_prob(x)


def hand_computed(data, x):
    """log p and log q of the hierarchy, from the exported draws alone."""
    mu, z = tensor(data, "posterior", "mu"), tensor(data, "posterior", "z")
    log_lik = dist.Normal(z, 0.5).log_prob(x)
    log_p = dist.Normal(0.0, 1.0).log_prob(mu) + log_lik.sum(1)
    log_p = log_p + dist.Normal(mu[:, None], 1.0).log_prob(z).sum(1)
    precision = 1 + len(x) / 1.25
    log_q = dist.Normal(x.sum() / 1.25 / precision, precision**-0.5).log_prob(mu)
    log_q = log_q + dist.Normal((mu[:, None] + 4 * x) / 5, 5**-0.5).log_prob(z).sum(1)
    return log_lik, log_p, log_q


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


# --- masks -----------------------------------------------------------------------------------

OBSERVED = torch.arange(N) % 3 != 1


def imputing(x, batch=None):
    with pyro.plate("data", len(x), subsample_size=batch) as index:
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[index], obs_mask=OBSERVED[index])


@pytest.mark.parametrize("batch", [None, 4])
def test_obs_mask_with_auto_normal(batch):
    guide = AutoNormal(
        imputing, init_loc_fn=lambda site: torch.zeros(site["fn"].shape()), init_scale=1.0
    )
    guide(X, batch)
    data = export(imputing, guide, X, batch)
    log_prob = dist.Normal(0.0, 1.0).log_prob(X)
    assert_constant(data, log_prob[OBSERVED].sum())
    assert set(data["posterior"].data_vars) == {"x_unobserved", "x"}
    for group in ("log_likelihood", "observed_data", "posterior_predictive"):
        assert set(data[group].data_vars) == {"x_observed"}
    log_lik = tensor(data, "log_likelihood", "x_observed")
    assert torch.equal(torch.isnan(log_lik), (~OBSERVED).expand(50, N))
    torch.testing.assert_close(log_lik[:, OBSERVED], log_prob[OBSERVED].expand(50, -1))
    observed = tensor(data, "observed_data", "x_observed")
    assert torch.equal(torch.isnan(observed), ~OBSERVED)
    assert torch.equal(observed[OBSERVED], X[OBSERVED])
    completed = tensor(data, "posterior", "x")
    assert torch.equal(completed[:, OBSERVED], X[OBSERVED].expand(50, -1))
    imputed = tensor(data, "posterior", "x_unobserved")
    assert torch.equal(completed[:, ~OBSERVED], imputed[:, ~OBSERVED])
    assert not torch.isnan(tensor(data, "posterior_predictive", "x_observed")).any()


@pytest.mark.parametrize("batch", [None, 4])
def test_masked_plate(batch):
    """The model's mask hides latents and data; the guide's density is hidden with them."""

    def model(x):
        with pyro.plate("data", N, subsample_size=batch) as index:
            with poutine.mask(mask=OBSERVED[index]):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])

    def guide(x):
        with pyro.plate("data", N, subsample_size=batch) as index:
            pyro.sample("z", dist.Normal(0.8 * x[index], 0.2**0.5))

    x = torch.where(OBSERVED, X, 100.0)
    data = export(model, guide, x)
    assert_constant(data, dist.Normal(0.0, 1.25**0.5).log_prob(X[OBSERVED]).sum())
    assert torch.equal(torch.isnan(tensor(data, "log_likelihood", "x")[0]), ~OBSERVED)


def test_integer_data_with_a_mask():
    counts = torch.tensor([1, 0, 3, 2])
    keep = torch.tensor([True, False, True, True])

    def model():
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Poisson(rate).mask(keep), obs=counts)

    def guide():
        pyro.sample("rate", dist.Gamma(8.0, 4.0))

    data = export(model, guide)
    np.testing.assert_array_equal(data["observed_data"]["x"].values, [1, np.nan, 3, 2])


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


@pytest.mark.parametrize("batch", [3, 4])
def test_auto_normal_with_subsampled_latents(batch):
    """AutoNormal makes its plates by itself; each of its N locations meets its own datum."""
    guide = AutoNormal(hierarchy, init_scale=0.3)
    guide(X, batch)
    with torch.no_grad():
        guide.locs.z_unconstrained.copy_(0.8 * X)
    data = export(hierarchy, guide, X, batch)
    mu, z = tensor(data, "posterior", "mu"), tensor(data, "posterior", "z")
    assert set(data["posterior"].data_vars) == {"mu", "z", "twice", "shifted"}
    log_q = dist.Normal(guide.locs.mu, 0.3).log_prob(mu)
    log_q = log_q + dist.Normal(0.8 * X, 0.3).log_prob(z).sum(1)
    torch.testing.assert_close(stats(data, "log_q"), log_q.detach())
    torch.testing.assert_close(stats(data, "log_p"), hand_computed(data, X)[1])


@pytest.mark.parametrize("auto", [AutoNormalMessenger, AutoDelta])
def test_other_guides_that_follow_the_indices(auto):
    guide = auto(hierarchy)
    guide(X, 4)
    data = export(hierarchy, guide, X, 4)
    torch.testing.assert_close(stats(data, "log_p"), hand_computed(data, X)[1])
    z = tensor(data, "posterior", "z")
    assert z.shape == (50, N)


@pytest.mark.parametrize("auto", [AutoMultivariateNormal, AutoLaplaceApproximation])
def test_joint_latents_of_one_minibatch_are_refused(auto):
    """These guides give every minibatch the coordinates of the first."""
    guide = auto(hierarchy)
    guide(X, 3)
    with pytest.raises(NotImplementedError, match="'z' is a Delta in the subsampled plate 'data'"):
        export(hierarchy, guide, X, 3)


def test_point_masses_that_follow_the_indices():
    """A Delta may depend on global draws and on the index, or on neither."""

    def guide(x, batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=batch) as index:
            pyro.sample("z", dist.Delta(mu * torch.arange(N)[index]))

    data = export(hierarchy, guide, X, 3)
    mu, z = tensor(data, "posterior", "mu"), tensor(data, "posterior", "z")
    torch.testing.assert_close(z, mu[:, None] * torch.arange(N))

    def constant(x, batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=batch):
            pyro.sample("z", dist.Delta(mu.expand(mu.shape[:-1] + (batch,))))

    data = export(hierarchy, constant, X, 3)
    z = tensor(data, "posterior", "z")
    torch.testing.assert_close(z, tensor(data, "posterior", "mu")[:, None].expand(50, N))


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


# --- names, dimensions, shapes ---------------------------------------------------------------


def test_dims_of_nested_plates_and_events():
    """Plates are ordered by dim, not by nesting; a plate of many sites is one dimension."""
    table = torch.arange(6.0).reshape(3, 2)

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        pyro.deterministic("norm", (w**2).sum(-1))
        pyro.deterministic("squares", w**2)
        columns = pyro.plate("columns", 3, dim=-2)
        with pyro.plate("rows", 2, dim=-1):
            with columns:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("m", dist.Dirichlet(torch.ones(5)))
                pyro.deterministic("pairs", torch.stack([z, -z], -1))
                pyro.sample("x", dist.Normal(z, 1.0), obs=table)
        with columns:
            pyro.sample("c", dist.Normal(0.0, 1.0))
        pyro.sample("single", dist.Normal(torch.zeros(1), 1.0))
        pyro.sample("y", dist.MultivariateNormal(w, torch.eye(4)), obs=torch.arange(4.0))

    def guide():
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        with pyro.plate("columns", 3, dim=-2):
            pyro.sample("c", dist.Delta(torch.tensor([[7.0], [8.0], [9.0]])))
            with pyro.plate("rows", 2, dim=-1):
                pyro.sample("z", dist.Delta(table))
                pyro.sample("m", dist.Dirichlet(torch.ones(5)))
        pyro.sample("single", dist.Normal(torch.zeros(1), 1.0))

    for vectorized in (True, False):
        data = export(
            model,
            guide,
            num_draws=6,
            vectorize_particles=vectorized,
            coords={"rows": ["top", "bottom"], "axis": list("abcd")},
            dims={"w": ["axis"], "m": ["columns", "rows", "part"]},
        )
        lead = ("chain", "draw")
        dims = {name: v.dims for name, v in data["posterior"].data_vars.items()}
        assert dims == {
            "w": (*lead, "axis"),
            "norm": lead,
            "squares": (*lead, "squares_dim_0"),
            "z": (*lead, "columns", "rows"),
            "m": (*lead, "columns", "rows", "part"),
            "pairs": (*lead, "columns", "rows", "pairs_dim_2"),
            "c": (*lead, "columns"),
            "single": lead,
        }
        np.testing.assert_array_equal(data["posterior"]["z"].values, table.expand(1, 6, 3, 2))
        np.testing.assert_array_equal(data["posterior"]["c"].values[0, 0], [7.0, 8.0, 9.0])
        w = tensor(data, "posterior", "w")
        torch.testing.assert_close(tensor(data, "posterior", "norm"), (w**2).sum(-1))
        torch.testing.assert_close(tensor(data, "posterior", "squares"), w**2)
        assert data["log_likelihood"]["x"].dims == (*lead, "columns", "rows")
        assert data["log_likelihood"]["y"].dims == lead
        assert data["posterior_predictive"]["y"].dims == (*lead, "y_dim_0")
        assert data["observed_data"]["y"].dims == ("y_dim_0",)
        assert data["observed_data"]["x"].dims == ("columns", "rows")
        np.testing.assert_array_equal(data["observed_data"]["x"].values, table)
        assert list(data["posterior"]["rows"].values) == ["top", "bottom"]
        assert list(data["posterior"]["axis"].values) == list("abcd")
        torch.testing.assert_close(
            tensor(data, "log_likelihood", "y"),
            dist.MultivariateNormal(w, torch.eye(4)).log_prob(torch.arange(4.0)),
        )


@pytest.mark.parametrize("subsampled", ["inner", "outer"])
def test_walk_over_one_of_two_nested_plates(subsampled):
    """Densities and predictions of a 4 x 6 table with either plate subsampled."""
    table = torch.arange(24.0).reshape(6, 4) / 10
    sizes = {"rows": 3 if subsampled == "inner" else None}
    sizes["columns"] = 4 if subsampled == "outer" else None

    def plates():
        rows = pyro.plate("rows", 4, subsample_size=sizes["rows"], dim=-1)
        columns = pyro.plate("columns", 6, subsample_size=sizes["columns"], dim=-2)
        return rows, columns

    def model():
        rows, columns = plates()
        with rows as i:
            r = pyro.sample("r", dist.Normal(0.0, 1.0))
            with columns as j:
                z = pyro.sample("z", dist.Normal(r, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=table[j][:, i])

    def guide():
        rows, columns = plates()
        with rows as i:
            pyro.sample("r", dist.Normal(0.3 * i, 1.0))
            with columns as j:
                pyro.sample("z", dist.Normal(table[j][:, i], 0.5))

    data = export(model, guide)
    r, z = tensor(data, "posterior", "r"), tensor(data, "posterior", "z")
    assert r.shape == (50, 4) and z.shape == (50, 6, 4)
    log_lik = dist.Normal(z, 1.0).log_prob(table)
    torch.testing.assert_close(tensor(data, "log_likelihood", "x"), log_lik)
    log_p = dist.Normal(0.0, 1.0).log_prob(r).sum(-1) + log_lik.sum((1, 2))
    log_p = log_p + dist.Normal(r[:, None], 1.0).log_prob(z).sum((1, 2))
    torch.testing.assert_close(stats(data, "log_p"), log_p)
    log_q = dist.Normal(0.3 * torch.arange(4), 1.0).log_prob(r).sum(-1)
    log_q = log_q + dist.Normal(table, 0.5).log_prob(z).sum((1, 2))
    torch.testing.assert_close(stats(data, "log_q"), log_q)
    np.testing.assert_array_equal(data["observed_data"]["x"].values, table)


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


def test_soft_constraints_inside_a_walked_plate():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("soft", dist.Normal(0.0, 1.0), obs=z)
            pyro.sample("soft too", dist.Normal(0.0, 1.0), obs=mu)
            pyro.factor("tilt", -z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=4):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    data = export(model, guide, X)
    assert set(data["observed_data"].data_vars) == {"x"}
    z = tensor(data, "posterior", "z")
    normal = dist.Normal(0.0, 1.0)
    log_p = (2 * normal.log_prob(z) - z + normal.log_prob(X - z)).sum(1)
    log_p = log_p + (N + 1) * normal.log_prob(tensor(data, "posterior", "mu"))
    torch.testing.assert_close(stats(data, "log_p"), log_p)


def test_log_likelihood_alone_has_the_names_of_the_data():
    dims = {"x": ["leaf"]}
    data = export(hierarchy, hierarchy_posterior, X, posterior_predictive=False, dims=dims)
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "leaf")
    assert data["observed_data"]["x"].dims == ("leaf",)
    assert "posterior_predictive" not in data.children


def test_pyro_subsample_and_switched_off_groups():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=4):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=pyro.subsample(x, event_dim=0))

    def guide(x):
        pyro.sample("mu", dist.Normal(X.sum() / (N + 1), (N + 1) ** -0.5))

    cov = torch.eye(N) + 1.0
    evidence = dist.MultivariateNormal(torch.zeros(N), cov).log_prob(X)
    data = export(model, guide, X, posterior_predictive=False, log_likelihood=False)
    assert_constant(data, evidence)
    assert set(data.children) == {"posterior", "sample_stats", "observed_data"}


def test_seed_and_random_state():
    first = export(hierarchy, hierarchy_posterior, X, seed=3)
    state = torch.get_rng_state()
    again = export(hierarchy, hierarchy_posterior, X, seed=3)
    other = export(hierarchy, hierarchy_posterior, X, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    for group in ("posterior", "posterior_predictive", "sample_stats"):
        assert first[group].to_dataset().identical(again[group].to_dataset()) or all(
            (first[group][name] == again[group][name]).all() for name in first[group].data_vars
        )
    assert not (first["posterior"]["z"] == other["posterior"]["z"]).any()


# --- both lines of ArviZ ---------------------------------------------------------------------


def arviz_0():
    """arviz 0.x with a drawing backend that needs no screen."""
    pytest.importorskip("matplotlib").use("Agg")
    arviz = pytest.importorskip("arviz")
    if not arviz.__version__.startswith("0."):
        pytest.skip("arviz >= 1")
    return arviz


FIT = {"full": None, "walked": 4}


@pytest.mark.parametrize("batch", FIT.values(), ids=FIT)
@pytest.mark.filterwarnings("ignore")
def test_inference_data_runs_through_arviz_0(batch, tmp_path):
    az = arviz_0()
    data = from_pyro_svi(hierarchy, hierarchy_posterior, X, batch, num_draws=200, seed=0)
    assert isinstance(data, az.InferenceData)
    assert data.posterior["z"].dims == ("chain", "draw", "data")
    assert data.attrs["inference_library"] == "pyro"
    assert data.posterior.attrs["inference_method"] == "vi"
    summary = az.summary(data, kind="stats")
    assert {"mu", "z[0]", "z[9]", "twice"} <= set(summary.index)
    assert len(az.summary(data)) == len(summary)
    az.plot_pair(data, var_names=["mu", "z"], coords={"data": [0, 1]})
    az.plot_ppc(data, num_pp_samples=20)
    loo = az.loo(data, pointwise=True)
    assert np.isfinite(loo.elpd_loo) and loo.loo_i.dims == ("data",)
    assert np.isfinite(az.waic(data).elpd_waic)
    data.to_netcdf(str(tmp_path / "fit.nc"))
    back = az.from_netcdf(str(tmp_path / "fit.nc"))
    for group in data.groups():
        assert back[group].equals(data[group])
        assert back[group].attrs == data[group].attrs


@pytest.mark.parametrize("batch", FIT.values(), ids=FIT)
@pytest.mark.filterwarnings("ignore")
def test_data_tree_runs_through_arviz_1(batch, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    arviz_stats = pytest.importorskip("arviz_stats")
    arviz_plots = pytest.importorskip("arviz_plots")
    xarray = pytest.importorskip("xarray")
    data = export(hierarchy, hierarchy_posterior, X, batch, num_draws=200)
    assert isinstance(data, xarray.DataTree)
    summary = arviz_stats.summary(data, kind="stats")
    assert {"mu", "z[0]", "z[9]", "twice"} <= set(summary.index)
    assert len(arviz_stats.summary(data)) == len(summary)
    assert np.isfinite(arviz_stats.loo(data).elpd)
    log_p, log_q = data["sample_stats"]["log_p"], data["sample_stats"]["log_q"]
    corrected = arviz_stats.loo_approximate_posterior(data, log_p, log_q)
    assert np.isfinite(corrected.elpd)
    arviz_plots.plot_pair(data, var_names=["mu", "twice"], backend="matplotlib")
    arviz_plots.plot_ppc_dist(data, num_samples=20, backend="matplotlib")
    data.to_netcdf(tmp_path / "fit.nc")
    back = xarray.open_datatree(tmp_path / "fit.nc").load()
    for group in data.children:
        assert back[group].to_dataset().equals(data[group].to_dataset())
    back.close()


@pytest.mark.filterwarnings("ignore")
def test_masked_data_in_arviz():
    """plot_ppc, loo and summary run; loo of the observed entries equals that of the data kept."""
    az = arviz_0()
    arviz_stats = pytest.importorskip("arviz_stats")

    def model(x, keep):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=keep)

    def guide(x, keep):
        pyro.sample("mu", dist.Normal(0.1, 0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("x_unobserved", dist.Normal(0.0, 1.0))

    def kept_only(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def kept_guide(x):
        pyro.sample("mu", dist.Normal(0.1, 0.3))

    indices = OBSERVED.nonzero()[:, 0].numpy()
    masked = {"num_draws": 200, "format": "inferencedata"}
    data = export(model, guide, X, OBSERVED, **masked)
    kept = export(kept_only, kept_guide, X[OBSERVED], **masked)
    assert (data.posterior["mu"].values == kept.posterior["mu"].values).all()
    az.plot_ppc(data, num_pp_samples=10)
    az.plot_pair(data, var_names=["mu", "x"], coords={"data": [1]})
    az.summary(data, kind="stats")
    assert np.isnan(az.loo(data).elpd_loo)
    expected = az.loo(kept).elpd_loo
    assert abs(az.loo(data.isel(data=indices)).elpd_loo - expected) < 1e-10
    tree = export(model, guide, X, OBSERVED, num_draws=200)
    assert np.isnan(arviz_stats.loo(tree).elpd)
    expected = arviz_stats.loo(export(kept_only, kept_guide, X[OBSERVED], num_draws=200)).elpd
    assert abs(arviz_stats.loo(tree.isel(data=indices)).elpd - expected) < 1e-10


def test_auto_format_follows_what_is_installed(monkeypatch):
    real = importlib.metadata.version

    def installed(**versions):
        def version(name):
            if not name.startswith("arviz"):
                return real(name)
            if versions.get(name.replace("-", "_")) is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name.replace("-", "_")]

        monkeypatch.setattr(importlib.metadata, "version", version)

    def run(format="auto"):
        return from_pyro_svi(hierarchy, hierarchy_posterior, X, num_draws=2, format=format)

    installed(arviz_base="0.8.2")
    assert type(run()).__name__ == "DataTree"
    installed(arviz="1.3.0")
    assert type(run()).__name__ == "DataTree"
    with pytest.raises(ImportError, match="arviz < 1, but arviz 1.3.0 is installed"):
        run("inferencedata")
    installed()
    for format in ("auto", "datatree", "inferencedata"):
        with pytest.raises(ImportError, match=r"pip install pyro_vi_ext\[arviz\]"):
            run(format)
    installed(arviz="0.23.4")
    with pytest.raises(ImportError, match="arviz-base"):
        run("datatree")


def test_import_is_lazy():
    code = (
        "import sys, pyro_vi_ext, pyro_vi_ext.arviz_export\n"
        "loaded = {'arviz', 'arviz_base', 'xarray', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- errors ----------------------------------------------------------------------------------


def minibatch_argument(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 100, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def explicit_subsample(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N, subsample=torch.tensor([3, 1, 2])) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])


def two_plates(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N, subsample_size=3) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])
    with pyro.plate("more", N, subsample_size=4) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=x[index])


def sequential_plate(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", N, subsample_size=3):
        pyro.sample(f"x_{i}", dist.Normal(mu, 1.0), obs=x[i])


def summed_over_the_minibatch(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N, subsample_size=3) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])
    pyro.factor("penalty", x[index].sum() * torch.ones(()))


def deterministic_of_the_minibatch(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N, subsample_size=3) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])
    pyro.deterministic("mean", x[index].mean())


def mixed_draws(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N):
        pyro.sample("x", dist.Normal(mu.sum(), 1.0), obs=x)


def mixed_deterministic(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("total", mu.sum())


def no_latent(x):
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[0])


def clashing_plate(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("draw", N):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def plain(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def plain_guide(x):
    pyro.sample("mu", dist.Normal(0.0, 1.0))


def no_guide(x):
    pass


MODELS = [
    (minibatch_argument, ValueError, r"'x'.*'data' \(10 of 100\).*obs=data\[ind\]"),
    (explicit_subsample, ValueError, r"'data' fixes its subsample \(3 of 10.*subsample_size"),
    (two_plates, NotImplementedError, "'data', 'more'"),
    (sequential_plate, NotImplementedError, "'x_.' is in the sequential plate 'data'"),
    (summed_over_the_minibatch, ValueError, "'penalty'.*'data'.*changes with the minibatch"),
    (deterministic_of_the_minibatch, ValueError, "'mean'.*'data'.*changes with the minibatch"),
    (mixed_draws, ValueError, "'x' of the model mixes draws.*vectorize_particles=False"),
    (mixed_deterministic, ValueError, "'total' of the model mixes draws"),
    (clashing_plate, ValueError, "plate called 'draw' clashes"),
]


@pytest.mark.parametrize(
    "model, error, message", MODELS, ids=lambda v: getattr(v, "__name__", None)
)
def test_models_that_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        export(model, plain_guide, X)


def test_model_without_latents():
    with pytest.raises(ValueError, match="no latent site"):
        export(no_latent, no_guide, X)


def test_one_by_one_takes_models_that_mix_draws():
    data = export(mixed_deterministic, plain_guide, X, vectorize_particles=False)
    assert (data["posterior"]["total"] == data["posterior"]["mu"]).all()


def test_model_that_cannot_be_vectorised_at_all():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("x", dist.Normal(torch.ones(2, 3) @ w, 1.0).to_event(1), obs=x[:2])

    def guide(x):
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    with pytest.raises(ValueError, match="vectorize_particles=False"):
        export(model, guide, X)
    data = export(model, guide, X, vectorize_particles=False, num_draws=5)
    w = tensor(data, "posterior", "w")
    expected = dist.Normal(w.sum(-1, keepdim=True), 1.0).log_prob(X[:2]).sum(-1)
    torch.testing.assert_close(tensor(data, "log_likelihood", "x"), expected)


def test_global_guide_that_depends_on_the_minibatch():
    def guide(x, batch):
        with pyro.plate("data", N, subsample_size=batch) as index:
            pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("mu", dist.Normal(x[index].mean(), 1.0))

    with pytest.raises(ValueError, match="'mu' of the guide.*changes with the minibatch"):
        export(hierarchy, guide, X, 3)


def test_global_noise_hidden_in_a_delta():
    """A draw made outside of pyro.sample cannot be repeated in the next minibatch."""

    def guide(x, batch):
        pyro.sample("mu", dist.Delta(torch.randn(())))
        with pyro.plate("data", N, subsample_size=batch):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'mu'.*changes with the minibatch"):
        export(hierarchy, guide, X, 3, vectorize_particles=False)


def test_local_latent_outside_its_plate_in_the_guide():
    def guide(x, batch):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="'z'.*'data' in the model but not in the guide"):
            export(hierarchy, guide, X, 3, vectorize_particles=False)


def test_batch_dimension_that_is_no_plate():
    def model(x):
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))

    def guide(x):
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match=r"'w' has batch shape \(3,\).*to_event"):
            export(model, guide, X, vectorize_particles=False)


@pytest.mark.parametrize("validate", [True, False])
def test_nan_is_named(validate):
    def guide(x):
        pyro.sample("mu", dist.Normal(torch.tensor(math.nan), 1.0))

    x = X.clone()
    x[2] = math.nan
    with pyro.validation_enabled(validate):
        with pytest.raises(ValueError, match="'mu' is NaN"):
            export(plain, guide, X)
        with pytest.raises(ValueError, match="'x'"):
            export(plain, plain_guide, x)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_draws": 0}, "num_draws must be an integer >= 1, got 0"),
        ({"num_draws": 2.5}, "num_draws"),
        ({"num_mixing_particles": -1}, "num_mixing_particles must be an integer >= 0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"format": "netcdf"}, "'netcdf'"),
        ({"coords": {"dta": range(N)}}, "'dta', which is no dimension"),
        ({"coords": {"data": range(3)}}, "'data' has 3 values.*size 10"),
        ({"dims": {"nu": ["a"]}}, "'nu', which is no variable"),
        ({"dims": {"mu": ["a"]}}, "dims of 'mu' has 1 names"),
        ({"dims": {"x": ["mu"]}}, "'mu' is both a dimension and a variable"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        export(plain, plain_guide, X, **kwargs)
