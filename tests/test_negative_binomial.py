"""The Pyro model: its density, its plates, its dtypes, its errors."""

import pyro
import pyro.poutine as poutine
import pytest
import scipy.stats as st
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_vi_ext.models.negative_binomial import MITE_COUNTS, load_mites, negative_binomial


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def log_joint(r, p, x, *args):
    data = {"r": torch.as_tensor(r), "p": torch.as_tensor(p)}
    return poutine.trace(poutine.condition(negative_binomial, data)).get_trace(x, *args)


def test_mites_are_the_published_table():
    x = load_mites(torch.float64)
    assert torch.bincount(x.long()).tolist() == [70, 38, 17, 10, 9, 3, 2, 1] == list(MITE_COUNTS)
    assert x.dtype == torch.float64 and x.shape == (150,)
    assert load_mites().dtype == torch.get_default_dtype()
    # Mean and unbiased variance as printed by Bliss and Fisher (1953): 1.1467 and 2.2736.
    assert x.mean().item() == pytest.approx(1.1467, abs=5e-5)
    assert x.var().item() == pytest.approx(2.2736, abs=5e-5)


def test_log_joint_equals_scipy():
    x, r, p = load_mites(torch.float64), 1.3, 0.4
    trace = log_joint(torch.tensor(r).double(), torch.tensor(p).double(), x, 0.7, 1.9, 2.5, 0.8)
    want = st.gamma(0.7, scale=1 / 1.9).logpdf(r) + st.beta(2.5, 0.8).logpdf(p)
    want += st.nbinom(r, 1 - p).logpmf(x.numpy()).sum()  # scipy counts failures
    assert trace.log_prob_sum().item() == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_counts(dtype):
    trace = poutine.trace(negative_binomial).get_trace(load_mites(dtype))
    assert all(trace.nodes[name]["value"].dtype == dtype for name in ("r", "p", "x"))


def test_integer_counts_take_the_default_dtype():
    trace = poutine.trace(negative_binomial).get_trace(load_mites().long())
    assert trace.nodes["r"]["value"].dtype == torch.get_default_dtype()
    assert trace.nodes["x"]["value"].dtype == torch.get_default_dtype()


def test_vectorised_particles_broadcast_to_the_left():
    x = load_mites(torch.float64)
    r, p = torch.rand(4, 1).double() + 0.5, torch.rand(4, 1).double()
    with pyro.plate("particles", 4, dim=-2):
        trace = log_joint(r, p, x)
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (4, 150)
    for k in range(4):
        one = log_joint(r[k, 0], p[k, 0], x)
        one.compute_log_prob()
        assert trace.nodes["x"]["log_prob"][k].allclose(one.nodes["x"]["log_prob"], rtol=1e-12)


def test_predictive_draws_have_the_model_mean():
    # x | r, p has mean r p / (1 - p) and variance r p / (1 - p)^2.
    r, p, n = 2.0, 0.3, 40_000
    conditioned = poutine.condition(negative_binomial, {"r": torch.tensor(r), "p": torch.tensor(p)})
    x = conditioned(num_leaves=n).double()
    se = (r * p / (1 - p) ** 2 / n) ** 0.5
    assert abs(x.mean().item() - r * p / (1 - p)) < 4 * se
    draws = Predictive(negative_binomial, num_samples=3)(a=2.0, b=2.0, alpha=2.0, num_leaves=7)
    assert draws["x"].shape == (3, 7)


def test_prior_draws_with_p_rounded_to_one_are_valid():
    conditioned = poutine.condition(negative_binomial, {"r": torch.tensor(1.0)})
    trace = poutine.trace(poutine.condition(conditioned, {"p": torch.tensor(1.0)})).get_trace(
        load_mites(), alpha=1.0, beta=1.0
    )
    assert torch.isfinite(torch.as_tensor(trace.log_prob_sum()))


def test_bad_counts_name_site_entry_and_remedy():
    with pytest.raises(ValueError, match=r'site "x".*found -1 at index 1.*drop'):
        negative_binomial(torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r'site "x".*num_leaves'):
        negative_binomial()


def test_the_check_of_counts_is_part_of_validation():
    with pyro.validation_enabled(False):
        negative_binomial(torch.tensor([0.0, 0.5]))


def test_hyperparameters_may_be_learned():
    alpha = torch.tensor(2.0, requires_grad=True)
    log_joint(
        torch.tensor(1.0), torch.tensor(0.3), load_mites(), 1.0, 1.0, alpha
    ).log_prob_sum().backward()
    # d/d alpha log Beta(p; alpha, b) = log p - psi(alpha) + psi(alpha + b)
    digamma = torch.special.digamma
    want = torch.tensor(0.3).log() - digamma(torch.tensor(2.0)) + digamma(torch.tensor(2.01))
    assert alpha.grad.item() == pytest.approx(want.item(), rel=1e-5)


def test_stock_svi_with_an_autoguide_runs():
    guide = AutoNormal(negative_binomial)
    loss = Trace_ELBO(num_particles=10, vectorize_particles=True)
    svi = SVI(negative_binomial, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    losses = [svi.step(load_mites(torch.float64)) for _ in range(60)]
    assert sum(losses[-5:]) < sum(losses[:5])
