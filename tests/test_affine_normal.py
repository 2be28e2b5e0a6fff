"""AffineNormal is torch's MultivariateNormal: density, moments, draws, gradients, errors."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_vi_ext.guides.affine_normal import AffineNormal


@pytest.fixture(autouse=True)
def fresh():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def affine_normal(batch=(), D=3, unit=True):
    loc, scale = torch.randn(D), torch.rand(D) + 0.5
    unit_tril = torch.eye(D) + torch.randn(D, D).tril(-1) if unit else None
    fn = AffineNormal(loc, scale, unit_tril, torch.randn(*batch, D), torch.randn(*batch, D) / 2)
    lower = scale[:, None] * (unit_tril if unit else torch.eye(D))
    means = loc + (lower @ fn.shift.unsqueeze(-1)).squeeze(-1)
    return fn, MultivariateNormal(means, scale_tril=lower * fn.log_sigma.exp().unsqueeze(-2))


@pytest.mark.parametrize("unit", [True, False])
def test_conditional_is_torchs_multivariate_normal(unit):
    fn, exact = affine_normal((5,), unit=unit)
    value = torch.randn(4, 1, 3)
    torch.testing.assert_close(fn.log_prob(value), exact.log_prob(value))
    torch.testing.assert_close(fn.mean, exact.mean)
    torch.testing.assert_close(fn.variance, exact.variance)
    wide = fn.expand([2, 5])
    assert wide.batch_shape == (2, 5) and wide.rsample([4]).shape == (4, 2, 5, 3)
    torch.testing.assert_close(
        wide.log_prob(value[:, None]), exact.log_prob(value[:, None]) + torch.zeros(4, 2, 5)
    )


@pytest.mark.parametrize("unit", [True, False])
def test_conditional_draws_what_it_scores(unit):
    fn, exact = affine_normal(unit=unit)
    N = 20000
    z = fn.sample((N,)) - exact.mean
    error = (exact.variance / N).sqrt()
    assert (z.mean(0).abs() < 4 * error).all()
    products = z[:, :, None] * z[:, None, :]
    error = products.std(0) / N**0.5
    assert ((products.mean(0) - exact.covariance_matrix).abs() < 4 * error).all()


def test_conditional_gradients():
    fn, exact = affine_normal((5,))
    value = torch.randn(4, 1, 3, requires_grad=True)
    (ours,) = torch.autograd.grad(fn.log_prob(value).exp().sum(), value)
    (theirs,) = torch.autograd.grad(exact.log_prob(value).exp().sum(), value)
    torch.testing.assert_close(ours, theirs)
    leaves = [
        torch.randn(3),
        torch.rand(3) + 0.5,
        torch.eye(3),
        torch.randn(5, 3),
        torch.randn(5, 3),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    fixed = value.detach()
    assert torch.autograd.gradcheck(
        lambda a, b, c, d, e: AffineNormal(a, b, c, d, e).log_prob(fixed), leaves
    )


def test_conditional_refuses_bad_parameters_and_values():
    nan = torch.full((3,), math.nan)
    with pytest.raises(ValueError, match="loc"):
        AffineNormal(nan, torch.ones(3), None, torch.zeros(3), torch.zeros(3), validate_args=True)
    fn = AffineNormal(
        *[torch.ones(3)] * 2, None, torch.zeros(3), torch.zeros(3), validate_args=True
    )
    with pytest.raises(ValueError):
        fn.log_prob(torch.zeros(2))
