"""Coordinate ascent and NUTS in NumPyro, against the quadrature and against explicit sums."""

import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats as st
import torch

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

from numpyro.diagnostics import summary  # noqa: E402
from numpyro.handlers import seed, substitute, trace  # noqa: E402

from pyro_vi_ext.models import negative_binomial_numpyro as nb  # noqa: E402
from pyro_vi_ext.models.negative_binomial import exact_posterior, load_mites  # noqa: E402

PRIORS = [1e-2, 1e-6]

# The fixed point: issue 2, to the digits printed there. The 1e-6 column is also what the SIVI
# authors hard-code (114.812, 114.955, 172.000001, 149.813; SIVI_NB.py) to theirs.
PUBLISHED = {
    1e-2: (114.82296, 114.96103, 172.01000, 149.82984),
    1e-6: (114.81190, 114.95593, 172.00000, 149.81205),
}


@pytest.fixture(scope="module", params=PRIORS)
def prior(request):
    return request.param


@pytest.fixture(scope="module")
def result(prior):
    return nb.cavi(load_mites(), prior, prior, prior, prior)


@pytest.fixture(scope="module")
def exact(prior):
    return exact_posterior(load_mites(), prior, prior, prior, prior)


def parameters(result):
    r, p = result.posterior["r"], result.posterior["p"]
    return np.array([r.concentration, r.rate, p.concentration1, p.concentration0])


def gamma_beta_log_density(parameters):
    a, b, alpha, beta = torch.as_tensor(parameters, dtype=torch.float64)
    gamma, beta = torch.distributions.Gamma(a, b), torch.distributions.Beta(alpha, beta)
    return lambda r, p: gamma.log_prob(r) + beta.log_prob(p)


def stirling(n):
    """Unsigned Stirling numbers of the first kind |s(n, 0..n)|, by their recursion."""
    row = [1]
    for m in range(n):
        row = [(row[k - 1] if k else 0) + (m * row[k] if k <= m else 0) for k in range(m + 2)]
    return np.array(row, dtype=float)


def test_cavi_reaches_the_published_digits(prior, result):
    assert parameters(result) == pytest.approx(PUBLISHED[prior], abs=5.1e-6)


def test_cavi_is_at_a_fixed_point(prior, result):
    more = nb.cavi(load_mites(), prior, prior, prior, prior, num_steps=1000)
    assert parameters(more) == pytest.approx(parameters(result), rel=1e-12)


def test_kl_of_the_mean_field_posterior(prior, result, exact):
    kl = exact.kl_from(gamma_beta_log_density(parameters(result))).item()
    # .01: issue 2 and REFERENCES 1b. 1e-6: computed here by this quadrature.
    assert kl == pytest.approx({1e-2: 0.98152, 1e-6: 0.98207}[prior], abs=5e-6)
    if prior == 1e-2:
        assert exact.log_evidence - kl == pytest.approx(-235.0444, abs=5e-5)
    # The bound with L in q is below that of r and p alone, by the expected KL of q(L).
    assert -result.losses[-1] < exact.log_evidence - kl < exact.log_evidence


def test_bound_never_falls_and_stays_below_the_evidence(result, exact):
    assert result.losses.shape == (result.num_steps,) and result.losses.dtype == np.float64
    rounding = 1e-11 * np.abs(result.losses[1:])
    assert (np.diff(result.losses) <= rounding).all()
    assert np.diff(result.losses)[0] < 0
    assert (-result.losses < exact.log_evidence).all()


def by_hand(x, prior, num_sweeps):
    """The same ascent with explicit sums over L; yields q and the bound after each sweep.

    The bound is E_q[log p(x, L, r, p)] - E_q[log q], every term written out: nothing is shared
    with the library but the model.
    """
    a, b, alpha, beta = prior
    q_r, x = None, np.asarray(x, dtype=int)
    mean_r, log_r = 1.0, 0.0
    for _ in range(num_sweeps):
        tables, log_ways = [], 0.0  # log_ways: E[log |s(x, L)|] + entropy of q(L)
        for n in x:
            weights = stirling(n) * np.exp(log_r * np.arange(n + 1))
            q_l = weights / weights.sum()
            tables.append(q_l @ np.arange(n + 1))
            some = q_l > 0
            log_ways += q_l[some] @ (np.log(stirling(n)[some]) - np.log(q_l[some]))
            log_ways -= math.lgamma(n + 1)
        q_p = st.beta(alpha + x.sum(), beta + len(x) * mean_r)
        log_p = q_p.expect(np.log, epsabs=0, epsrel=1e-12)
        log_1mp = q_p.expect(lambda v: np.log1p(-v), epsabs=0, epsrel=1e-12)
        q_r = st.gamma(a + sum(tables), scale=1 / (b - len(x) * log_1mp))
        mean_r = q_r.mean()
        log_r = q_r.expect(np.log, epsabs=0, epsrel=1e-12)
        bound = log_ways + sum(tables) * log_r + x.sum() * log_p + len(x) * mean_r * log_1mp
        bound += q_r.expect(st.gamma(a, scale=1 / b).logpdf) + q_r.entropy()
        bound += q_p.expect(st.beta(alpha, beta).logpdf) + q_p.entropy()
        yield (q_r.args[0], 1 / q_r.kwds["scale"], *q_p.args), bound, np.array(tables)


@pytest.mark.parametrize("num_sweeps", [1, 4])
@pytest.mark.parametrize("data", ["few", "mites"])
def test_sweeps_and_bound_equal_explicit_stirling_sums(data, num_sweeps):
    x, prior = [0, 3, 1, 7, 2, 0, 5], (1.5, 0.7, 2.0, 3.0)
    x = x if data == "few" else load_mites().int().tolist()
    *_, (want, bound, _) = by_hand(x, prior, num_sweeps)
    result = nb.cavi(x, *prior, num_steps=num_sweeps)
    assert parameters(result) == pytest.approx(want, rel=1e-9)
    assert -result.losses[-1] == pytest.approx(bound, rel=1e-10)


def test_tables_are_the_crt_mean_of_the_final_r():
    x = [0, 3, 1, 7]
    result = nb.cavi(x, 1.5, 0.7, 2.0, 3.0)
    *_, (_, _, tables) = by_hand(x, (1.5, 0.7, 2.0, 3.0), 60)
    assert result.tables == pytest.approx(tables, rel=1e-8)
    assert result.posterior["r"].concentration == pytest.approx(1.5 + tables.sum(), rel=1e-8)
    assert result.tables[0] == 0.0 and result.tables[2] == pytest.approx(1.0, rel=1e-15)


def test_stirling_numbers_of_this_file():
    assert stirling(4).tolist() == [0, 6, 11, 6, 1]
    assert stirling(7).sum() == math.factorial(7)


def test_tol_stops_early_and_zero_does_not():
    x = load_mites()
    early, full = nb.cavi(x, tol=1e-6), nb.cavi(x)
    assert full.num_steps == len(full.losses) == 500
    assert 2 <= early.num_steps == len(early.losses) < 100
    assert abs(early.losses[-1] - early.losses[-2]) < 1e-6 < early.losses[-3] - early.losses[-2]
    assert np.array_equal(early.losses, full.losses[: early.num_steps])


def test_cavi_takes_arrays_lists_and_tensors_and_zero_counts():
    x = load_mites()
    kinds = [x, x.numpy(), x.long(), x.int().tolist(), jax.numpy.asarray(x.numpy())]
    results = [parameters(nb.cavi(kind, num_steps=20)) for kind in kinds]
    assert all(np.array_equal(results[0], other) for other in results[1:])
    zeros = nb.cavi([0, 0, 0], 2.0, 1.0, 3.0, 2.0)
    exact = exact_posterior(torch.zeros(3), 2.0, 1.0, 3.0, 2.0)
    assert zeros.posterior["r"].concentration == 2.0 and (zeros.tables == 0).all()
    assert -zeros.losses[-1] < exact.log_evidence
    kl = exact.kl_from(gamma_beta_log_density(parameters(zeros))).item()
    # Without counts L is known, so the augmented bound is that of r and p.
    assert -zeros.losses[-1] == pytest.approx(exact.log_evidence - kl, abs=1e-8)


@pytest.mark.parametrize("run", [nb.cavi, nb.nuts])
def test_bad_input(run):
    with pytest.raises(ValueError, match=r'site "x".*-2 at index 1'):
        run([1, -2, 3])
    with pytest.raises(ValueError, match=r'site "x".*nan at index 0'):
        run(torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="prior parameter alpha"):
        run([1, 2], alpha=0.0)


def test_bad_settings():
    with pytest.raises(ValueError, match="num_steps=0"):
        nb.cavi([1], num_steps=0)
    with pytest.raises(ValueError, match="tol=-1"):
        nb.cavi([1], tol=-1)
    with pytest.raises(ValueError, match="num_leaves"):
        nb.negative_binomial()


def test_a_falling_or_infinite_bound_is_an_error():
    with pytest.raises(RuntimeError, match="fell by 0.25 nats in sweep 3"):
        nb._check_ascent(np.array([5.0, 4.0, 4.25, 4.0]))
    with pytest.raises(RuntimeError, match="nan after sweep 2"):
        nb._check_ascent(np.array([5.0, np.nan]))
    nb._check_ascent(np.array([235.0, 234.0, 234.0 + 1e-10]))  # rounding


def test_global_precision_is_left_alone(result):
    assert jax.numpy.ones(()).dtype == np.float32
    assert result.posterior["r"].concentration.dtype == np.float64


def test_density_of_the_numpyro_model_is_torchs():
    x = load_mites(torch.float64)
    r, p = torch.tensor(1.3, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    with nb.enable_x64(True):
        model = seed(substitute(nb.negative_binomial, {"r": r.numpy(), "p": p.numpy()}), 0)
        sites = trace(model).get_trace(x.numpy(), 0.7, 1.9, 2.5, 0.8)
        got = {k: np.asarray(sites[k]["fn"].log_prob(sites[k]["value"])) for k in ("x", "r", "p")}
    torch_x = torch.distributions.NegativeBinomial(total_count=r, probs=p).log_prob(x)
    # JAX's betaln, which NumPyro's pmf calls, errs by 1.1e-6 once an argument reaches 8 (x = 7).
    assert got["x"][x < 7] == pytest.approx(torch_x[x < 7].numpy(), rel=1e-12)
    assert got["x"][x == 7] == pytest.approx(torch_x[x == 7].numpy(), abs=2e-6)
    assert got["r"] == pytest.approx(st.gamma(0.7, scale=1 / 1.9).logpdf(1.3), rel=1e-9)
    assert got["p"] == pytest.approx(st.beta(2.5, 0.8).logpdf(0.4), rel=1e-9)


def check_nuts(run, exact, shape):
    """Means, spreads and marginals agree with the quadrature within 4 standard errors."""
    grouped = {k: np.asarray(v) for k, v in run.get_samples(group_by_chain=True).items()}
    # Squared deviations have their own autocorrelation, hence their own effective size.
    squares = {f"{k}^2": (v - exact.mean[k]) ** 2 for k, v in grouped.items()}
    stats = summary({**grouped, **squares})
    for name in ("r", "p"):
        draws = grouped[name]
        assert draws.dtype == np.float64 and draws.shape == shape
        n_eff = min(stats[name]["n_eff"], draws.size)
        assert abs(draws.mean() - exact.mean[name]) < 4 * draws.std() / n_eff**0.5
        deviations = squares[f"{name}^2"]
        se = deviations.std() / min(stats[f"{name}^2"]["n_eff"], draws.size) ** 0.5
        assert abs(deviations.mean() - exact.sd[name] ** 2) < 4 * se
        # sqrt(n) KS of independent draws exceeds 1.95 with probability 0.001.
        assert exact.ks_distance(name, torch.from_numpy(draws.copy())) < 1.95 / n_eff**0.5
    return max(stats[name]["r_hat"] for name in ("r", "p"))


@pytest.fixture(scope="module")
def exact_posterior_001():
    return exact_posterior(load_mites())


def test_nuts_agrees_with_the_quadrature(exact_posterior_001):
    run = nb.nuts(load_mites(), num_samples=500, num_warmup=300, rng_key=1, progress_bar=False)
    check_nuts(run, exact_posterior_001, (4, 500))


@pytest.mark.slow
def test_nuts_at_full_length(exact_posterior_001):
    run = nb.nuts(load_mites(), progress_bar=False)
    assert check_nuts(run, exact_posterior_001, (4, 2500)) < 1.01


def test_without_jax_the_import_names_the_extra():
    code = (
        "import sys; sys.modules['jax'] = None\n"
        "import pyro_vi_ext.models.negative_binomial\n"
        "import pyro_vi_ext.models.negative_binomial_numpyro"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError" in done.stderr and "pip install pyro_vi_ext[numpyro]" in done.stderr


def test_the_pyro_model_does_not_load_jax():
    code = "import pyro_vi_ext.models.negative_binomial, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
