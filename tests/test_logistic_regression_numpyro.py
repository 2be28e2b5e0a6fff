"""The NumPyro model against its Pyro twin; coordinate ascent against Jaakkola and Jordan."""

import importlib
import sys

import numpy as np
import pyro.poutine as poutine
import pytest
import scipy.stats as st
import torch
from scipy.special import expit, log_expit

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

from numpyro.handlers import reparam, seed, substitute, trace  # noqa: E402
from numpyro.infer.util import log_density  # noqa: E402

from pyro_vi_ext.cavi import CAVI  # noqa: E402
from pyro_vi_ext.cavi.augmentations import PolyaGammaReparam  # noqa: E402
from pyro_vi_ext.models import logistic_regression as pyro_side  # noqa: E402
from pyro_vi_ext.models.logistic_regression_numpyro import logistic_regression  # noqa: E402
from pyro_vi_ext.models.negative_binomial_numpyro import enable_x64  # noqa: E402

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def doubles():
    # Without NumPyro's validation: it compiles dozens of small functions for each distribution.
    with enable_x64(True), numpyro.distributions.distribution.validation_enabled(False):
        yield


def example(N=40, D=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(N, D)), rng.integers(0, 2, N), rng.normal(size=D)


# --- the pair ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [(), (0.3,)])
def test_the_joint_density_is_that_of_the_pyro_model_and_of_scipy(alpha):
    X, y, w = example()
    found = float(log_density(logistic_regression, (X, y, *alpha), {}, {"w": w})[0])
    precision = alpha[0] if alpha else 0.01
    want = st.norm(0, precision**-0.5).logpdf(w).sum() + st.bernoulli(expit(X @ w)).logpmf(y).sum()
    assert found == pytest.approx(want, rel=1e-12)

    conditioned = poutine.condition(pyro_side.logistic_regression, {"w": torch.tensor(w)})
    twin = poutine.trace(conditioned).get_trace(torch.tensor(X), torch.tensor(y), *alpha)
    assert found == pytest.approx(twin.log_prob_sum().item(), rel=1e-12)


def test_sites_and_plates_are_those_of_the_pyro_model():
    X, y, _ = example()
    ours = trace(seed(logistic_regression, 0)).get_trace(X, y)
    twin = poutine.trace(pyro_side.logistic_regression).get_trace(torch.tensor(X), torch.tensor(y))
    for name in ("w", "y"):
        a, b = ours[name], twin.nodes[name]
        assert a["is_observed"] == b["is_observed"]
        assert a["fn"].batch_shape == b["fn"].batch_shape
        assert a["fn"].event_shape == b["fn"].event_shape
        plates = [(f.name, f.dim, f.size) for f in a["cond_indep_stack"]]
        assert plates == [(f.name, f.dim, f.size) for f in b["cond_indep_stack"]]


def test_gradient():
    X, y, w = example()
    gradient = jax.grad(lambda w: log_density(logistic_regression, (X, y, 0.3), {}, {"w": w})[0])
    want = X.T @ (y - expit(X @ w)) - 0.3 * w
    np.testing.assert_allclose(gradient(w), want, rtol=1e-12, atol=1e-12)


def test_data_and_precision_may_be_traced():
    X, y, w = example()

    @jax.jit
    def density(X, y, alpha):
        return log_density(logistic_regression, (X, y, alpha), {}, {"w": w})[0]

    now = log_density(logistic_regression, (X, y, 0.3), {}, {"w": w})[0]
    assert float(density(X, y, 0.3)) == pytest.approx(float(now), rel=1e-12)


def test_labels_are_drawn_with_their_probabilities():
    X, _, w = example()
    n = 40_000
    y = seed(substitute(logistic_regression, {"w": w}), 0)(np.broadcast_to(X[0], (n, 3)))
    p = expit(X[0] @ w)
    se = (p * (1 - p) / n) ** 0.5
    assert y.shape == (n,)
    assert abs(float(y.mean()) - p) < 4 * se
    assert abs(float(y.mean()) - (p + 0.05)) > 4 * se  # a planted bias


@pytest.mark.parametrize(
    "message, changes",
    [
        (r"X must be a matrix.*found shape \(40,\)", {"X": np.zeros(40)}),
        (r'site "y".*shape \(40,\).*found \(40, 1\)', {"y": np.zeros((40, 1))}),
        ("X must be finite, found inf at row 0, column 0", {"X": np.full((40, 3), np.inf)}),
        (r'site "y".*0 or 1, found -1 at index 0 \(40 of 40', {"y": -np.ones(40)}),
        ("alpha, the precision.*found 0.0", {"alpha": 0.0}),
    ],
)
def test_errors_name_site_or_argument(message, changes):
    X, y, _ = example()
    with pytest.raises(ValueError, match=message):
        seed(logistic_regression, 0)(**{"X": X, "y": y} | changes)


def test_shapes_are_checked_where_values_are_traced():
    X, y, _ = example()
    with pytest.raises(ValueError, match='site "y"'):
        jax.eval_shape(seed(logistic_regression, 0), X, y[1:])


def test_without_numpyro_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, logistic_regression.__module__)
    monkeypatch.setitem(sys.modules, "numpyro", None)
    with pytest.raises(ImportError, match=r"pip install pyro_vi_ext\[numpyro\]"):
        importlib.import_module(logistic_regression.__module__)


# --- the bound of Jaakkola and Jordan ------------------------------------------------------------


def jaakkola_jordan(X, y, alpha, sweeps=500):
    r"""Mean and covariance of q(w), and the bound after each sweep (Jaakkola and Jordan 2000).

    S = (alpha I + 2 X' diag(l) X)^-1, m = S X' (y - 1/2), xi^2 = x' (S + m m') x,
    l = tanh(xi / 2) / (4 xi); the bound is that of the two updates before xi is renewed.
    """
    D, xi, bounds = X.shape[1], np.ones(len(X)), []
    for _ in range(sweeps):
        slope = np.tanh(xi / 2) / (4 * xi)
        precision = alpha * np.eye(D) + 2 * (X.T * slope) @ X
        S = np.linalg.inv(precision)
        m = S @ X.T @ (y - 0.5)
        log_det = np.linalg.slogdet(precision)[1]
        bound = 0.5 * (D * np.log(alpha) - log_det + m @ precision @ m)
        bounds.append(bound + (log_expit(xi) - xi / 2 + slope * xi**2).sum())
        xi = np.sqrt(np.einsum("nd,de,ne->n", X, S + np.outer(m, m), X))
    return m, S, np.array(bounds)


def test_the_bound_by_hand_rises_and_is_a_bound():
    X, y, _ = example(D=1)
    m, S, bounds = jaakkola_jordan(X, y, 0.3)
    assert (np.diff(bounds) > -1e-12).all()
    # log p(y) by quadrature in the one weight, and the divergence of q from the posterior.
    w = np.linspace(-5, 5, 20_001)
    log_p = st.norm(0, 0.3**-0.5).logpdf(w) + log_expit((2 * y - 1) * np.outer(w, X)).sum(1)
    evidence = np.log(np.trapezoid(np.exp(log_p), w))
    q = st.norm(m[0], S[0, 0] ** 0.5)
    kl = np.trapezoid(q.pdf(w) * (q.logpdf(w) - log_p + evidence), w)
    # The bound counts the auxiliary variables, too: it is below that of q(w) alone.
    assert bounds[-1] < evidence - kl < evidence


def test_coordinate_ascent_finds_what_is_derived_by_hand():
    X, y, _ = example()
    m, S, bounds = jaakkola_jordan(X, y, 0.3)
    model = reparam(logistic_regression, config={"y": PolyaGammaReparam()})
    result = CAVI(model, X, y, 0.3).run(num_steps=500, tol=0.0)
    q = result.posterior["w"]
    np.testing.assert_allclose(q.mean, m, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(q.covariance_matrix, S, rtol=1e-8, atol=1e-10)
    assert result.bound == pytest.approx(bounds[-1], rel=1e-10)
