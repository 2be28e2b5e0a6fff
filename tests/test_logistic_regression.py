"""The Pyro model against SciPy, its gradient by hand, its errors, and the data."""

import sys

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import scipy.io
import scipy.stats as st
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from scipy.special import expit

from pyro_vi_ext.models.logistic_regression import (
    load_logistic_data,
    log_joint,
    logistic_regression,
)

pytestmark = pytest.mark.usefixtures("float64")

ALPHA = 0.3


def example(N=40, D=3):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(N, D))
    return torch.tensor(X), torch.tensor(rng.integers(0, 2, N)), torch.tensor(rng.normal(size=D))


def traced(w, X, y, *alpha):
    return poutine.trace(poutine.condition(logistic_regression, {"w": w})).get_trace(X, y, *alpha)


def by_scipy(w, X, y, alpha):
    w, X, y = (value.numpy() for value in (w, X, y))
    prior = st.norm(0, alpha**-0.5).logpdf(w).sum()
    return prior + st.bernoulli(expit(X @ w)).logpmf(y).sum()


# --- the density ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.01, ALPHA])
def test_both_log_joints_equal_scipy(alpha):
    X, y, w = example()
    want = by_scipy(w, X, y, alpha)
    assert traced(w, X, y, alpha).log_prob_sum().item() == pytest.approx(want, rel=1e-12)
    assert log_joint(w, X, y, alpha).item() == pytest.approx(want, rel=1e-12)


def test_the_default_precision_is_that_of_the_paper():
    X, y, w = example()
    assert traced(w, X, y).log_prob_sum().item() == pytest.approx(by_scipy(w, X, y, 0.01))
    assert log_joint(w, X, y).item() == pytest.approx(by_scipy(w, X, y, 0.01), rel=1e-12)


def test_the_log_joint_is_finite_where_probabilities_round_to_zero():
    # log sigma(-800) = -800 to the last bit, and exp(800) overflows.
    X, y, w = torch.tensor([[800.0]]), torch.tensor([0.0]), torch.tensor([1.0])
    want = -800.0 + st.norm(0, ALPHA**-0.5).logpdf(1.0)
    assert log_joint(w, X, y, ALPHA).item() == pytest.approx(want, rel=1e-14)
    assert traced(w, X, y, ALPHA).log_prob_sum().item() == pytest.approx(want, rel=1e-14)


def test_gradient():
    # d/dw log p(w, y) = X' (y - sigma(X w)) - alpha w
    X, y, w = example()
    w.requires_grad_()
    want = X.mT @ (y - (X @ w).sigmoid()) - ALPHA * w
    for value in (traced(w, X, y, ALPHA).log_prob_sum(), log_joint(w, X, y, ALPHA)):
        (gradient,) = torch.autograd.grad(value, w)
        torch.testing.assert_close(gradient, want.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_particles_broadcast_to_the_left(shape):
    X, y, _ = example()
    w = torch.randn(*shape, 3)
    with pyro.plate_stack("particles", shape, rightmost_dim=-2):
        trace = traced(w.unsqueeze(-2), X, y, ALPHA)
    trace.compute_log_prob()
    nodes = trace.nodes
    assert nodes["y"]["log_prob"].shape == (*shape, len(X))
    total = nodes["w"]["log_prob"].squeeze(-1) + nodes["y"]["log_prob"].sum(-1)
    torch.testing.assert_close(total, log_joint(w, X, y, ALPHA), rtol=1e-12, atol=0.0)


def test_labels_are_drawn_with_their_probabilities():
    X, _, w = example(D=1)
    X = X[:2].repeat_interleave(20_000, 0)
    y = poutine.condition(logistic_regression, {"w": w})(X)
    for rows in (slice(0, 20_000), slice(20_000, None)):
        p = (X[rows][0] @ w).sigmoid()
        se = (p * (1 - p) / 20_000).sqrt()
        assert (y[rows].mean() - p).abs() < 4 * se
        assert (y[rows].mean() - (p + 0.05)).abs() > 4 * se  # a planted bias
    assert Predictive(logistic_regression, num_samples=3, parallel=True)(X[:5])["y"].shape == (3, 5)


def test_dtypes():
    X, y, _ = example()
    for dtype in (torch.float32, torch.float64):
        trace = poutine.trace(logistic_regression).get_trace(X.to(dtype), y)
        assert trace.nodes["w"]["value"].dtype == trace.nodes["y"]["value"].dtype == dtype
    whole = poutine.trace(logistic_regression).get_trace(torch.ones(2, 1, dtype=torch.long), y[:2])
    assert whole.nodes["w"]["value"].dtype == torch.get_default_dtype()


def test_the_precision_may_be_learned():
    X, y, w = example()
    alpha = torch.tensor(ALPHA, requires_grad=True)
    traced(w, X, y, alpha).log_prob_sum().backward()
    want = len(w) / (2 * ALPHA) - w.square().sum() / 2
    assert alpha.grad.item() == pytest.approx(want.item(), rel=1e-12)


def test_stock_svi_with_an_autoguide_runs():
    X, y, _ = example()
    guide = AutoMultivariateNormal(logistic_regression)
    loss = Trace_ELBO(10, vectorize_particles=True)
    svi = SVI(logistic_regression, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    losses = [svi.step(X, y) for _ in range(60)]
    assert sum(losses[-5:]) < sum(losses[:5])


# --- what is refused -----------------------------------------------------------------------------


def refused(message, **changes):
    X, y, w = example()
    arguments = {"X": X, "y": y, "alpha": 1.0} | changes
    for call in (logistic_regression, lambda X, y, alpha: log_joint(w, X, y, alpha)):
        with pytest.raises(ValueError, match=message):
            call(**arguments)


def test_shapes_are_named():
    X, y, _ = example()
    refused(r"X must be a matrix.*found shape \(40,\).*X\[:, None\]", X=X[:, 0])
    refused(r"X must be a matrix.*found shape \(40, 0\)", X=X[:, :0])
    refused(r'site "y".*shape \(40,\).*found \(40, 1\).*reshape', y=y[:, None])
    refused(r'site "y".*shape \(40,\).*found \(39,\)', y=y[1:])


def test_values_are_named():
    X, y, _ = example()
    X[3, 2], X[5, 1] = torch.nan, torch.inf
    refused("X must be finite, found nan at row 3, column 2", X=X)
    refused(r'site "y".*0 or 1, found -1 at index .*of 40 entries.*y > 0', y=2 * y - 1)
    refused('site "y".*found 0.5 at index 0', y=torch.full((40,), 0.5))
    refused('site "y".*found nan at index 0', y=torch.full((40,), torch.nan))
    for alpha in (0.0, -1.0, float("inf"), float("nan")):
        refused("alpha, the precision.*positive finite.*found", alpha=alpha)


def test_the_check_of_values_is_part_of_validation():
    X, _, w = example()
    with pyro.validation_enabled(False):
        assert traced(w, X, torch.full((40,), 0.5)).log_prob_sum().isfinite()


# --- data ----------------------------------------------------------------------------------------


def test_breast_cancer():
    from sklearn.datasets import load_breast_cancer

    data = load_logistic_data()
    assert data.X_train.shape == (400, 31) and data.X_test.shape == (169, 31)
    assert data.X_train.dtype == data.y_train.dtype == torch.float64
    assert data.vb is None and data.gibbs is None
    for X in (data.X_train, data.X_test):
        assert (X[:, 0] == 1).all()
    torch.testing.assert_close(data.X_train[:, 1:].mean(0), torch.zeros(30))
    torch.testing.assert_close(data.X_train[:, 1:].std(0, correction=0), torch.ones(30))
    # Every biopsy once, with its label: the columns are those of the source up to their units.
    source, labels = load_breast_cancer(return_X_y=True)
    X = torch.cat([data.X_train, data.X_test])[:, 1:]
    y = torch.cat([data.y_train, data.y_test])
    for ours, theirs in ((X[y == 1], source[labels == 1]), (X[y == 0], source[labels == 0])):
        slope = source[:, 0].std() / X[:, 0].std(correction=0)
        back = source[:, 0].mean() + (ours[:, 0] - X[:, 0].mean()) * slope
        torch.testing.assert_close(back.sort().values, torch.tensor(np.sort(theirs[:, 0])))
    again = load_logistic_data()
    assert all(torch.equal(a, b) for a, b in zip(data[:4], again[:4], strict=True))
    first = {tuple(row) for row in data.X_train.tolist()}
    assert not first & {tuple(row) for row in data.X_test.tolist()}


def paper_file(path, **changes):
    rng = np.random.default_rng(0)
    variables = {
        "X_train": rng.integers(0, 2, (5, 2)).astype(np.uint8),
        "y_train": np.array([[0, 1, 1, 0, 1]], np.uint8),
        "X_test": rng.normal(size=(3, 2)),
        "y_test": np.array([[1, 1, 0]], np.uint8),
        "mu_Beta": rng.normal(size=(2, 1)),
        "Sig_Beta": np.array([[2.0, 0.5], [0.5, 1.0]]),
        "BetaMCMC": rng.normal(size=(2, 7)),
    } | changes
    scipy.io.savemat(path, {name: v for name, v in variables.items() if v is not None})
    return variables


def test_a_file_of_the_paper(tmp_path):
    path = tmp_path / "small.mat"
    variables = paper_file(path)
    data = load_logistic_data(path)
    assert data.X_train.dtype == torch.float64 and data.X_train.shape == (5, 2)
    assert data.y_train.tolist() == [0, 1, 1, 0, 1] and data.y_test.tolist() == [1, 1, 0]
    np.testing.assert_array_equal(data.X_test, variables["X_test"])
    np.testing.assert_array_equal(data.vb[0], variables["mu_Beta"][:, 0])
    np.testing.assert_array_equal(data.vb[1], variables["Sig_Beta"])
    np.testing.assert_array_equal(data.gibbs, variables["BetaMCMC"].T)
    assert load_logistic_data(str(path)).X_train.shape == (5, 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mu_Beta": None}, "has no variable mu_Beta"),
        ({"y_test": np.ones((1, 3))}, "all labels of y_test are 1"),
        ({"y_train": np.ones((1, 4))}, r"variables X_train and y_train: site \"y\".*\(5,\)"),
        ({"X_test": np.full((3, 2), np.nan)}, "variables X_test and y_test: X must be finite"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, changes, message):
    path = tmp_path / "bad.mat"
    paper_file(path, **changes)
    with pytest.raises(ValueError, match=f"bad.mat'.*{message}"):
        load_logistic_data(path)


def test_no_file_and_no_matlab_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file 'nowhere.mat'.*breast_cancer"):
        load_logistic_data("nowhere.mat")
    path = tmp_path / "text.mat"
    path.write_text("no such thing")
    with pytest.raises(ValueError, match="text.mat' cannot be read as a MATLAB file"):
        load_logistic_data(path)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pyro_vi_ext\[data\]"):
        load_logistic_data()
