"""Pyro's way to draws and weights: a conjugate model whose posterior and evidence are known."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal

from pyro_vi_ext import SemiImplicitELBO, TraceSTL_ELBO
from pyro_vi_ext.comparison import compare
from pyro_vi_ext.guides import AutoSemiImplicit
from pyro_vi_ext.inference_methods import by_pyro_svi

pytestmark = pytest.mark.usefixtures("float64")

X = torch.tensor([0.3, 1.9, 2.4, -0.5, 1.1], dtype=torch.float64)
LOC, SCALE = float(X.sum()) / 6, 6**-0.5
LOG_EVIDENCE = float(st.multivariate_normal(cov=np.eye(5) + 1).logpdf(X.numpy()))


def model(x, scale=1.0):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * z)
    with pyro.plate("data", len(x)), poutine.scale(scale=scale):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x, scale=1.0):
    loc = pyro.param("loc", torch.tensor(LOC))
    pyro.sample("z", dist.Normal(loc, SCALE))


def by(guide=guide, objective=None, *, of=model, num_steps=1, lr=1e-12, **options):
    adam = pyro.optim.Adam({"lr": lr})
    return by_pyro_svi(
        of, guide, adam, objective or Trace_ELBO(), X, num_steps=num_steps, **options
    )


def test_the_exact_posterior_has_the_evidence_in_every_weight():
    outcome = by()(num_draws=1000, seed=0, progress=False)
    assert np.allclose(outcome.log_p - outcome.log_q, LOG_EVIDENCE, atol=1e-9, rtol=0)
    z = outcome.draws["z"]
    assert z.shape == outcome.draws["twice"].shape == (1, 1000)
    assert np.array_equal(outcome.draws["twice"], 2 * z)
    assert st.kstest(z[0], st.norm(LOC, SCALE).cdf).pvalue > 1e-3
    expected = st.norm(LOC, SCALE).logpdf(z[0])
    assert np.allclose(outcome.log_q, expected)
    row = compare({"q": by()}, log_evidence=LOG_EVIDENCE, progress=False)["q"]
    assert row["gap"] == pytest.approx(0.0, abs=1e-9) and row["pareto_k"] == -math.inf


def test_training_moves_the_guide():
    """From another start; STL has no variance at the optimum."""

    def away(x):
        loc = pyro.param("loc", torch.tensor(LOC + 0.5))
        pyro.sample("z", dist.Normal(loc, SCALE))

    outcome = by(away, TraceSTL_ELBO(), num_steps=400, lr=0.02)(25, 0, False)
    assert len(outcome.fitted.losses) == 400 and outcome.seconds > 0
    assert np.allclose(outcome.log_p - outcome.log_q, LOG_EVIDENCE, atol=1e-3)


def test_seeds_and_stores_stay_apart():
    """Two guides with parameters of one name do not share them, and the user's store is left."""
    pyro.param("loc", torch.tensor(123.0))
    state = torch.get_rng_state()
    first, again, other = (by()(30, seed, False).draws["z"] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    assert pyro.param("loc").item() == 123.0
    normal = AutoNormal(model)
    by(normal, num_steps=5, lr=0.1)(30, 0, False)
    assert list(pyro.get_param_store()) == ["loc"]
    assert normal.locs.z != 0  # trained, and still there


def test_a_semi_implicit_guide_is_scored_by_h_and_grouped():
    sivi = SemiImplicitELBO(20, 20)
    method = by(AutoSemiImplicit(model), sivi, num_steps=300, lr=0.01, num_mixing_particles=200)
    comparison = compare({"q": method}, log_evidence=LOG_EVIDENCE, num_draws=1000, progress=False)
    assert comparison.outcomes["q"].group_size == 50
    row = comparison["q"]
    assert -4 * row["bound_standard_error"] < row["gap"] < 0.1  # a lower bound
    assert abs(row["log_evidence"] - LOG_EVIDENCE) < 4 * row["log_evidence_standard_error"] + 1e-3
    assert row["pareto_k"] < 0.7


def test_large_models_are_scored_in_small_batches(monkeypatch):
    monkeypatch.setattr("pyro_vi_ext.inference_methods._ELEMENTS", 2 * (len(X) + 2))
    method = by(AutoSemiImplicit(model), SemiImplicitELBO(2, 2), num_mixing_particles=5)
    assert method(100, 0, False).group_size == 2


def test_a_point_mass_has_neither_bound_nor_weights():
    outcome = by(AutoDelta(model))(50, 0, False)
    assert outcome.log_p is None
    assert outcome.notes == ("q is a point mass at site 'z', so it has no bound and no weights.",)
    row = compare({"q": by(AutoDelta(model))}, progress=False)["q"]
    assert row["bound"] is None and row["pareto_k"] is None


def test_equal_draws_of_a_label_are_no_point_mass():
    """Pyro's Bernoulli draws floats."""

    def labelled(x):
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(8.0 * b, 1.0), obs=x)

    def certain(x):
        pyro.sample("b", dist.Bernoulli(pyro.param("p", torch.tensor(1e-9))))

    outcome = by(certain, of=labelled)(50, 0, False)
    want = math.log(0.5) + st.norm.logpdf(X.numpy()).sum()
    assert np.allclose(outcome.log_p, want) and np.allclose(outcome.log_q, 0.0)


def test_a_scaled_model_is_refused_and_a_subsampled_one_is_scored_on_all_data():
    def scaled(x):
        model(x, scale=0.5)

    with pytest.raises(NotImplementedError, match="Site 'x' of the model is scaled"):
        by(of=scaled)(25, 0, False)

    def subsampled(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    outcome = by(of=subsampled)(25, 0, False)
    assert np.allclose(outcome.log_p - outcome.log_q, LOG_EVIDENCE, atol=1e-9, rtol=0)
