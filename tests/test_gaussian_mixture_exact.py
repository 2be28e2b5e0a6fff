"""Exact densities and bounds of a mixture: golden numbers, scipy, scikit-learn, enumeration."""

import itertools
import math

import pytest
import scipy.stats as st
import torch

from pyro_vi_ext.models.gaussian_mixture import load_iris
from pyro_vi_ext.models.gaussian_mixture_exact import (
    LECTURE_MIXTURE,
    QUERY_POINT,
    GaussianMixture,
    check_points,
)

pytestmark = pytest.mark.usefixtures("float64")


def at_query_point():
    return torch.tensor(QUERY_POINT)


def labels(lam):
    return torch.stack([1 - lam, lam], -1)


def random_mixture(num_components, num_features):
    factor = torch.randn(num_components, num_features, num_features)
    return GaussianMixture(
        weights=torch.rand(num_components).softmax(-1),
        means=torch.randn(num_components, num_features),
        covariances=factor @ factor.mT + 0.1 * torch.eye(num_features),
    )


# --- densities -------------------------------------------------------------------------------


def test_golden_numbers_at_the_query_point():
    # The lecture prints p(Z = 1 | x) = .76 for a point that it only draws. The point here is the
    # one on the segment between the means with that posterior; the densities there were computed
    # once with scipy, and are printed to all their digits.
    x = at_query_point()
    log_joint = LECTURE_MIXTURE.log_joint(x)
    density = (log_joint - LECTURE_MIXTURE.weights.log()).exp()
    assert density[1].item() == pytest.approx(0.01025174, abs=5e-9)
    assert density[0].item() == pytest.approx(0.00159454, abs=5e-9)
    assert LECTURE_MIXTURE.log_evidence(x).item() == pytest.approx(-5.414534, abs=5e-7)
    assert LECTURE_MIXTURE.responsibilities(x)[1].item() == pytest.approx(0.76, abs=5e-7)
    s = (x - LECTURE_MIXTURE.means[0]) / (LECTURE_MIXTURE.means[1] - LECTURE_MIXTURE.means[0])
    assert s.tolist() == pytest.approx([0.342856, 0.342856], abs=5e-7)


def test_densities_equal_scipy():
    mixture, x = random_mixture(3, 4), torch.randn(5, 2, 4)
    parts = zip(mixture.weights, mixture.means, mixture.covariances, strict=True)
    want = torch.stack(
        [w.log() + torch.tensor(st.multivariate_normal(m, c).logpdf(x)) for w, m, c in parts], -1
    )
    assert mixture.log_joint(x).allclose(want, rtol=1e-10)
    evidence = mixture.log_evidence(x)
    assert evidence.shape == (5, 2) and evidence.allclose(want.exp().sum(-1).log(), rtol=1e-10)
    posterior = mixture.responsibilities(x)
    assert posterior.allclose((want - evidence.unsqueeze(-1)).exp(), rtol=1e-9)


def test_points_far_from_all_components_keep_their_digits():
    x = torch.tensor([1e3, -1e3])  # every density underflows
    log_joint = LECTURE_MIXTURE.log_joint(x)
    assert bool((log_joint.exp() == 0).all())
    assert LECTURE_MIXTURE.log_evidence(x).item() == pytest.approx(log_joint.max().item())
    assert LECTURE_MIXTURE.responsibilities(x).sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_follow_the_dtype_of_x(dtype):
    x = torch.tensor([QUERY_POINT, (0.0, 0.0)], dtype=dtype)
    q = labels(torch.tensor([0.3, 0.6]))
    rtol = 20 * torch.finfo(dtype).eps
    for name in ("log_joint", "log_evidence", "responsibilities", "elbo", "kl"):
        method = getattr(LECTURE_MIXTURE, name)
        extra = (q,) if name in ("elbo", "kl") else ()
        assert method(x, *extra).dtype == dtype
        assert method(x, *extra).double().allclose(method(x.double(), *extra), rtol, 5 * rtol)
    bound = LECTURE_MIXTURE.importance_weighted_bound(x, q, 5000)
    exact = LECTURE_MIXTURE.importance_weighted_bound(x.double(), q, 5000)
    assert bound.dtype == dtype and bound.double().allclose(exact, rtol)


# --- bounds ----------------------------------------------------------------------------------


def test_elbo_and_kl_add_up_to_the_evidence():
    x, lam = at_query_point(), torch.linspace(0, 1, 101)
    elbo, kl = LECTURE_MIXTURE.elbo(x, labels(lam)), LECTURE_MIXTURE.kl(x, labels(lam))
    evidence = LECTURE_MIXTURE.log_evidence(x)
    assert elbo.shape == (101,)
    assert (elbo + kl).allclose(evidence.expand(101), rtol=1e-14)
    assert float(lam[elbo.argmax()]) == pytest.approx(0.76)
    assert elbo.max().item() == pytest.approx(evidence.item(), abs=1e-12)
    # Neither is the other's remainder: both from their own formula.
    r = LECTURE_MIXTURE.responsibilities(x)[1]
    inner = lam[1:-1]
    want = inner * (inner / r).log() + (1 - inner) * ((1 - inner) / (1 - r)).log()
    assert kl[1:-1].allclose(want, rtol=1e-10, atol=1e-14)
    assert kl[[0, -1]].allclose(-torch.stack([1 - r, r]).log())  # q sure of one label
    assert elbo[[0, -1]].allclose(LECTURE_MIXTURE.log_joint(x))
    # KL(.5 || .76) = .5 log(.5 / .76) + .5 log(.5 / .24)
    assert kl[50].item() == pytest.approx(
        0.5 * math.log(0.5 / 0.76) + 0.5 * math.log(0.5 / 0.24), abs=1e-6
    )


def test_bounds_of_many_points_and_labels():
    mixture, x = random_mixture(4, 2), torch.randn(6, 2)
    q = torch.rand(6, 4).softmax(-1)
    want = (q * (mixture.log_joint(x) - q.log())).sum(-1)
    assert mixture.elbo(x, q).allclose(want)
    assert (mixture.elbo(x, q) + mixture.kl(x, q)).allclose(mixture.log_evidence(x))
    posterior = mixture.responsibilities(x)
    assert mixture.kl(x, posterior).abs().max() < 1e-12


def test_importance_weighted_bound_equals_enumeration():
    x, q = at_query_point(), labels(torch.tensor(0.3))
    weights = (LECTURE_MIXTURE.log_joint(x) - q.log()).exp()
    for n in (1, 2, 3, 6):
        want = sum(
            math.prod(float(q[k]) for k in draw) * math.log(float(weights[list(draw)].mean()))
            for draw in itertools.product((0, 1), repeat=n)
        )
        got = LECTURE_MIXTURE.importance_weighted_bound(x, q, n)
        assert got.item() == pytest.approx(want, rel=1e-12)


def test_importance_weighted_bound_rises_from_elbo_to_evidence():
    x = torch.tensor([QUERY_POINT, (4.0, 3.0)])
    q, evidence = labels(torch.tensor([0.05, 0.5])), LECTURE_MIXTURE.log_evidence(x)
    sizes = (1, 2, 3, 10, 100, 1000, 20_000)
    bounds = [LECTURE_MIXTURE.importance_weighted_bound(x, q, n) for n in sizes]
    assert bounds[0].allclose(LECTURE_MIXTURE.elbo(x, q), rtol=1e-12)
    for low, high in itertools.pairwise([*bounds, evidence]):
        assert bool((low < high).all())
    # Delta method: log p(x) - L_n = Var(w / p) / 2n + O(1 / n^2).
    ratio = (LECTURE_MIXTURE.log_joint(x) - q.log() - evidence.unsqueeze(-1)).exp()
    variance = (q * (ratio - 1) ** 2).sum(-1)
    assert (evidence - bounds[-1]).allclose(variance / 2 / sizes[-1], rtol=1e-2)


def test_importance_weighted_bound_at_the_ends():
    x, log_joint = at_query_point(), LECTURE_MIXTURE.log_joint(at_query_point())
    for n in (1, 7):
        for k in (0, 1):  # only label k is ever drawn: the bound stays log p(x, k)
            one_hot = torch.eye(2)[k]
            got = LECTURE_MIXTURE.importance_weighted_bound(x, one_hot, n)
            assert got.item() == pytest.approx(log_joint[k].item())
        posterior = LECTURE_MIXTURE.responsibilities(x)
        got = LECTURE_MIXTURE.importance_weighted_bound(x, posterior, n)
        assert got.item() == pytest.approx(LECTURE_MIXTURE.log_evidence(x).item(), rel=1e-12)


# --- Iris ------------------------------------------------------------------------------------


def test_em_on_iris_has_the_golden_likelihood():
    # Best of 100 starts of EM, 3 full covariances: -180.1855, weights .2992, .3333, .3675.
    # Computed for this project with scikit-learn; 20 restarts find the same optimum.
    sklearn_mixture = pytest.importorskip("sklearn.mixture")
    x, _ = load_iris()
    em = sklearn_mixture.GaussianMixture(
        3, n_init=20, random_state=0, reg_covar=1e-6, tol=1e-8, max_iter=1000
    ).fit(x.numpy())
    mixture = GaussianMixture(em.weights_, em.means_, em.covariances_)
    log_likelihood = mixture.log_evidence(x).sum().item()
    assert log_likelihood == pytest.approx(-180.1855, abs=5e-5)
    assert log_likelihood == pytest.approx(150 * em.score(x.numpy()), abs=1e-6)
    weights = mixture.weights.sort().values.tolist()
    assert weights == pytest.approx([0.2992, 0.3333, 0.3675], abs=5e-5)
    posterior = torch.tensor(em.predict_proba(x.numpy()))
    assert mixture.responsibilities(x).allclose(posterior, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize(
    "num_groups, golden",
    [
        (1, -379.9146),  # one Gaussian, maximum likelihood
        (3, -182.9208),  # a Gaussian for each species, used as a mixture without the labels
    ],
)
def test_gaussians_fitted_by_moments_have_the_golden_likelihood(num_groups, golden):
    pytest.importorskip("sklearn")
    x, species = load_iris()
    groups = [x[species == k] for k in range(3)] if num_groups == 3 else [x]
    mixture = GaussianMixture(
        weights=[len(group) / 150 for group in groups],
        means=torch.stack([group.mean(0) for group in groups]),
        covariances=torch.stack([group.T.cov(correction=0) for group in groups]),
    )
    assert mixture.log_evidence(x).sum().item() == pytest.approx(golden, abs=5e-5)


# --- errors ----------------------------------------------------------------------------------


def parts(**changes):
    m = LECTURE_MIXTURE
    return {"weights": m.weights, "means": m.means, "covariances": m.covariances, **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": [0.5, 0.4]}, "weights must.*add up to 1"),
        ({"weights": [1.0, 0.0]}, "weights must.*positive.*leave out"),
        ({"weights": [math.nan, 1.0]}, "weights must"),
        ({"weights": 1.0}, "weights must be a vector"),
        ({"means": [[0.0, 0.0]]}, r"means must.*\(2, D\)"),
        ({"means": [[0.0, math.inf], [0.0, 0.0]]}, "means must be finite"),
        ({"covariances": torch.eye(2)}, r"covariances must have shape \(2, 2, 2\).*\(2, 2\)"),
        ({"covariances": [torch.eye(2).tolist(), [[1.0, 2.0], [2.0, 1.0]]]}, "for component 1"),
        ({"covariances": [[[1.0, 0.0], [0.5, 1.0]], torch.eye(2).tolist()]}, "for component 0"),
        ({"covariances": torch.full((2, 2, 2), math.nan)}, "for component 0"),
    ],
)
def test_parameters_that_are_no_mixture(changes, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**parts(**changes))


def test_points_and_labels_of_the_wrong_width():
    x = at_query_point()
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 2\).*found \(4, 3\)"):
        LECTURE_MIXTURE.log_evidence(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"last dimension, found shape \(3,\).*stack"):
        LECTURE_MIXTURE.elbo(x, torch.tensor([0.1, 0.2, 0.7]))
    for q in ([0.3, 0.3], [-0.1, 1.1], [math.nan, 1.0]):  # two lambdas are no q
        with pytest.raises(ValueError, match="do not add up to 1"):
            LECTURE_MIXTURE.kl(x, torch.tensor(q))
    with pytest.raises(ValueError, match="last dimension, found shape"):
        LECTURE_MIXTURE.importance_weighted_bound(x, 0.3, 2)
    with pytest.raises(ValueError, match="num_particles"):
        LECTURE_MIXTURE.importance_weighted_bound(x, labels(torch.tensor(0.3)), 0)
    with pytest.raises(NotImplementedError, match="found 3 components"):
        q = torch.full((3,), 1 / 3)
        random_mixture(3, 2).importance_weighted_bound(x, q, 2)


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(2), r'site "x".*\(N, 2\), found \(2,\).*unsqueeze'),
        (torch.zeros(1, 1, 2), r'site "x".*found \(1, 1, 2\)'),
        (torch.zeros(0, 2), 'site "x": found no points'),
        (torch.zeros(5, 3), r'site "x".*2 columns.*found shape \(5, 3\)'),
        (torch.tensor([[0.0, 1.0], [2.0, math.nan]]), "found nan at row 1, column 1 .1 of 4.*drop"),
        (torch.tensor([[0.0, -math.inf]]), "found -inf at row 0, column 1"),
    ],
)
def test_points_that_are_no_table(x, message):
    with pytest.raises(ValueError, match=message):
        check_points(x, 2)
