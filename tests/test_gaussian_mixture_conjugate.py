"""The conjugate mixture in Pyro: density and priors by scipy, and the numbering of components."""

import math

import numpy as np
import pyro
import pytest
import scipy.stats as st
import torch
from pyro.infer.util import torch_item
from scipy.special import logsumexp

from pyro_vi_ext.models.gaussian_mixture_conjugate import conjugate_mixture, sort_components

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Singular sample"),  # torch draws such a Wishart matrix anew
]

PRIORS = {"concentration": 1.5, "scale": 0.8, "shape": 2.5, "rate": 0.3}


def draw(full, x, K=3):
    trace = pyro.poutine.trace(conjugate_mixture).get_trace(x, K, full=full, **PRIORS)
    return {name: trace.nodes[name]["value"] for name in ("weights", "means", "precisions")}


def log_joint(values, x, **options):
    conditioned = pyro.condition(conjugate_mixture, values)
    K = len(values["weights"])
    trace = pyro.poutine.trace(conditioned).get_trace(x, K, **options, **PRIORS)
    return torch_item(trace.log_prob_sum())


def by_scipy(values, x, full, z=None):
    """log p(x, weights, means, precisions), and with labels if they are given."""
    weights, means, precisions = (values[n].numpy() for n in ("weights", "means", "precisions"))
    K, D = means.shape
    a, b = PRIORS["shape"], PRIORS["rate"]
    total = st.dirichlet([PRIORS["concentration"]] * K).logpdf(weights)
    total += st.norm(0, PRIORS["scale"]).logpdf(means).sum()
    if full:
        prior = st.wishart(2 * a + D - 1, np.eye(D) / (2 * b))
        total += sum(prior.logpdf(matrix) for matrix in precisions)
        covariances = np.linalg.inv(precisions)
    else:
        total += st.gamma(a, scale=1 / b).logpdf(precisions).sum()
        covariances = np.stack([np.diag(1 / row) for row in precisions])
    normals = [st.multivariate_normal(m, c) for m, c in zip(means, covariances, strict=True)]
    each = np.stack([n.logpdf(x) for n in normals], -1) + np.log(weights)
    return total + (logsumexp(each, -1) if z is None else each[np.arange(len(x)), z]).sum()


@pytest.mark.parametrize("full", [False, True])
def test_log_joint_is_that_of_scipy(full):
    x, z = torch.randn(7, 2), torch.tensor([0, 1, 2, 2, 1, 0, 2])
    for _ in range(3):
        values = draw(full, x)
        found = log_joint(values, x, full=full)
        assert found == pytest.approx(by_scipy(values, x.numpy(), full), abs=1e-10, rel=1e-12)
        found = log_joint({**values, "z": z}, x, full=full, marginalize=False)
        expected = by_scipy(values, x.numpy(), full, z.numpy())
        assert found == pytest.approx(expected, abs=1e-10, rel=1e-12)


@pytest.mark.parametrize("full", [False, True])
def test_variances_have_the_same_inverse_gamma_prior(full):
    x = torch.zeros(1, 3)
    precisions = draw(full, x, K=4000)["precisions"]
    covariances = precisions.inverse() if full else torch.diag_embed(1 / precisions)
    variances = covariances.diagonal(dim1=-1, dim2=-2)
    prior = st.invgamma(PRIORS["shape"], scale=PRIORS["rate"])
    for column in variances.T:
        assert st.kstest(column.numpy(), prior.cdf).pvalue > 1e-4
        planted = st.invgamma(PRIORS["shape"] + 0.5, scale=PRIORS["rate"])
        assert st.kstest(column.numpy(), planted.cdf).pvalue < 1e-4


def test_standard_deviations_of_the_default_prior():
    quantiles = st.invgamma(2.0, scale=0.2).ppf([0.01, 0.25, 0.75, 0.99]) ** 0.5
    assert quantiles.round(2).tolist() == [0.17, 0.27, 0.46, 1.16]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("marginalize", [False, True])
def test_particles_sit_to_the_left(full, marginalize):
    x, options = torch.randn(5, 2), {"full": full, "marginalize": marginalize}
    with pyro.plate("particles", 4, dim=-2):
        trace = pyro.poutine.trace(conjugate_mixture).get_trace(x, 3, **options)
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (4, 5)
    one = {
        name: trace.nodes[name]["value"][2].squeeze(0)
        for name in ("weights", "means", "precisions", "z")[: 3 + (not marginalize)]
    }
    alone = pyro.poutine.trace(pyro.condition(conjugate_mixture, one)).get_trace(x, 3, **options)
    alone.compute_log_prob()
    assert torch.allclose(alone.nodes["x"]["log_prob"], trace.nodes["x"]["log_prob"][2])


def test_points_of_another_shape():
    with pytest.raises(ValueError, match=r"points must have shape \(N, D\)"):
        conjugate_mixture(torch.zeros(3), 2)


@pytest.mark.parametrize("full", [False, True])
def test_sorted_draws_have_the_same_density_and_ordered_means(full):
    x, z = torch.randn(6, 2), torch.tensor([0, 1, 2, 2, 0, 0])
    values = draw(full, x)
    values["means"][:, 1] = torch.tensor([2.0, 0.0, 1.0])  # a permutation that is not its inverse
    draws = {name: value.numpy()[None, None] for name, value in values.items()}
    draws["z"] = z.numpy()[None, None]
    found = sort_components({**draws, "other": np.zeros((1, 1))}, feature=1)
    assert set(found) == {*draws, "other"}
    assert (np.diff(found["means"][..., 1]) > 0).all()
    before, after = ({n: torch.as_tensor(d[n][0, 0]) for n in draws} for d in (draws, found))
    options = {"full": full, "marginalize": False}
    assert log_joint(after, x, **options) == pytest.approx(log_joint(before, x, **options))
    wrong = {**after, "z": before["z"]}
    assert not math.isclose(log_joint(wrong, x, **options), log_joint(before, x, **options))
