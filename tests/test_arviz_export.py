"""from_pyro_svi: both lines of ArviZ, the names of variables and dimensions, its arguments."""

import importlib.metadata
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vi_ext import from_pyro_svi

from .exporting import (
    OBSERVED,
    N,
    X,
    export,
    hierarchy,
    hierarchy_posterior,
    plain,
    plain_guide,
)

pytestmark = pytest.mark.usefixtures("float64")


def test_log_likelihood_alone_has_the_names_of_the_data():
    dims = {"x": ["leaf"]}
    data = export(hierarchy, hierarchy_posterior, X, posterior_predictive=False, dims=dims)
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "leaf")
    assert data["observed_data"]["x"].dims == ("leaf",)
    assert "posterior_predictive" not in data.children


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


def clashing_plate(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("draw", N):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def test_a_plate_named_as_a_dimension_of_arviz():
    with pytest.raises(ValueError, match="plate called 'draw' clashes"):
        export(clashing_plate, plain_guide, X)


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
