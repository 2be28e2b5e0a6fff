"""Arrays of draws have the plates and events of their sites, and NaN where a site is masked."""

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from .exporting import (
    OBSERVED,
    N,
    X,
    assert_constant,
    export,
    stats,
    tensor,
)

pytestmark = pytest.mark.usefixtures("float64")


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


def test_batch_dimension_that_is_no_plate():
    def model(x):
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))

    def guide(x):
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0))

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match=r"'w' has batch shape \(3,\).*to_event"):
            export(model, guide, X, vectorize_particles=False)


# --- masks -----------------------------------------------------------------------------------


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
