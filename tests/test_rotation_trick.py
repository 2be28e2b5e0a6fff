"""The rotation trick: the value is the code, the gradient that of the rotation as a matrix."""

import pytest
import torch
from torch.nn.functional import normalize

from pyro_vi_ext.guides.rotation_trick import rotate

pytestmark = pytest.mark.usefixtures("float64")


def rotation(z, e):
    """R of the paper, dense, of two vectors (D,) that are not opposite."""
    z, e = normalize(z, dim=0), normalize(e, dim=0)
    r = normalize(z + e, dim=0)
    return torch.eye(len(z)) - 2 * torch.outer(r, r) + 2 * torch.outer(e, z)


def gradient(z, e, g):
    """What reaches z of a gradient g at the value, and the value."""
    z = z.detach().clone().requires_grad_()
    value = rotate(z, e)
    return torch.autograd.grad(value, z, g)[0], value.detach()


@pytest.mark.parametrize("d", [2, 3, 10])
def test_gradient_is_that_of_the_rotation(d):
    for _ in range(20):
        z, e, g = torch.randn(3, d)
        matrix = rotation(z, e)
        torch.testing.assert_close(matrix @ matrix.t(), torch.eye(d))
        torch.testing.assert_close(torch.linalg.det(matrix), torch.tensor(1.0))
        torch.testing.assert_close(matrix @ normalize(z, dim=0), normalize(e, dim=0))
        off_plane = torch.linalg.qr(torch.stack([z, e], 1), mode="complete").Q[:, 2:]
        torch.testing.assert_close(matrix @ off_plane, off_plane)
        found, value = gradient(z, e, g)
        torch.testing.assert_close(found, e.norm() / z.norm() * matrix.t() @ g)
        assert value.equal(e)


def test_in_one_dimension_it_is_the_ratio_of_the_lengths():
    z, e, g = (torch.tensor([[a]]) for a in (2.0, 3.0, 5.0))
    assert gradient(z, e, g)[0].item() == pytest.approx(7.5)
    assert gradient(z, -e, g)[0].item() == pytest.approx(-7.5)  # opposite: the reflection


@pytest.mark.parametrize("shape", [(4, 3), (2, 1, 5, 3), (0, 3)])
def test_batches_are_vector_by_vector(shape):
    z, e, g = (torch.randn(shape) for _ in range(3))
    found, value = gradient(z, e, g)
    assert value.equal(e)
    rows = zip(*(t.reshape(-1, 3) for t in (z, e, g, found)), strict=True)
    for z_row, e_row, g_row, found_row in rows:
        torch.testing.assert_close(gradient(z_row, e_row, g_row)[0], found_row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_value_is_the_code_bit_for_bit(dtype):
    z = 10.0 ** torch.randint(-10, 10, (2000, 1)) * torch.randn(2000, 4)
    e = 10.0 ** torch.randint(-10, 10, (2000, 1)) * torch.randn(2000, 4)
    found, value = gradient(z.to(dtype), e.to(dtype), torch.randn(2000, 4, dtype=dtype))
    assert value.equal(e.to(dtype)) and value.dtype == dtype
    assert found.isfinite().all()


def test_where_lengths_and_directions_agree_it_is_straight_through():
    z, g = torch.randn(2, 6)
    torch.testing.assert_close(gradient(z, z.clone(), g)[0], g)
    torch.testing.assert_close(gradient(z, 3 * z, g)[0], 3 * g)


def test_a_zero_vector_is_passed_straight_through():
    z, e, g = torch.randn(3, 4, 3)
    z[0], e[1], z[2], e[2] = 0.0, 0.0, 0.0, 0.0
    found, value = gradient(z, e, g)
    assert found[:3].equal(g[:3]) and value.equal(e)
    torch.testing.assert_close(found[3], gradient(z[3], e[3], g[3])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opposite_vectors_are_reflected(dtype):
    z, g = torch.randn(2, 50, 4, dtype=dtype)
    unit = normalize(z, dim=1)
    found, value = gradient(z, -2 * z, g)
    torch.testing.assert_close(found, 2 * (g - 2 * unit * (unit * g).sum(1, keepdim=True)))
    assert value.equal(-2 * z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearly_opposite_vectors_are_finite_and_not_stretched(dtype):
    """The direction of r is that of rounding errors; R is bounded all the same."""
    z, g = torch.randn(2, 2000, 3, dtype=dtype)
    e = -z * (1 + 2 * torch.finfo(dtype).eps * torch.randn_like(z))
    found, value = gradient(z, e, g)
    assert value.equal(e) and (found.norm(dim=1) <= 5 * g.norm(dim=1)).all()


def test_no_gradient_reaches_the_code():
    z, e = torch.randn(2, 4, 3)
    assert not rotate(z, e.requires_grad_()).requires_grad
    value = rotate(z.requires_grad_(), e)
    assert torch.autograd.grad(value.sum(), e, allow_unused=True, retain_graph=True) == (None,)
    (found,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    assert not found.requires_grad  # the rotation is constant: linear in z


def test_a_vector_that_is_not_finite_is_not_quantised_silently():
    z, e = torch.randn(2, 3, 2)
    z[1, 0] = torch.inf
    assert rotate(z, e)[1].isnan().any() and rotate(z, e)[[0, 2]].equal(e[[0, 2]])
