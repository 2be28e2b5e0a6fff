"""Axes of sites of a joint factor: what goes in comes out, element by element."""

import itertools

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("numpyro")

from pyro_vi_ext.cavi.gaussian_layout import Member, Precision  # noqa: E402

MEMBERS = [
    Member("a", (2, 3, 4)),
    Member("a", (2, 3, 4), (2, 0)),
    Member("a", (2, 3, 4), (1, 2, 0)),
    Member("a", (2, 3, 4), (2,), 0),
    Member("a", (2, 3, 4), (0, 2), 1),
    Member("a", (3,), (), 0),
    Member("a", ()),
]


def place(member, index, axes):
    return tuple(index[a] for a in axes)


def row(member, index):
    sizes = [member.shape[a] for a in member.joint]
    return int(np.ravel_multi_index(place(member, index, member.joint), sizes)) if sizes else 0


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_rows(member):
    x = np.random.default_rng(0).normal(size=member.shape)
    rows = np.asarray(member.to_rows(x))
    batch = tuple(member.shape[a] for a in member.batch)
    columns = 1 if member.matrix is None else member.shape[member.matrix]
    assert rows.shape == (*batch, member.size, columns)
    for index in np.ndindex(*member.shape):
        column = 0 if member.matrix is None else index[member.matrix]
        at = (*place(member, index, member.batch), row(member, index), column)
        assert rows[at] == np.float32(x[index]) or rows[at] == x[index]
    np.testing.assert_array_equal(member.from_rows(rows), rows.dtype.type(x))


def test_matrices():
    """The first site's plain axes, then the joint axes of the second."""
    a, b = Member("a", (4, 2, 3), (1, 0)), Member("b", (2, 5, 4), (0, 2))
    xx = np.random.default_rng(1).normal(size=(4, 2, 3, 5)).astype(np.float32)
    found = np.asarray(a.to_matrices(xx, b))
    assert found.shape == (2, 4, 3, 5)
    for k, s, i, j in itertools.product(range(4), range(2), range(3), range(5)):
        assert found[s, k, i, j] == xx[k, s, i, j]
    np.testing.assert_array_equal(a.from_matrices(found, b), xx)


@pytest.mark.parametrize(
    ("batch", "shape"), [((1, 0), (3, 2)), ((1,), (3,)), ((), ()), ((None, 0), (1, 2))]
)
def test_precisions_under_the_axes_of_the_block(batch, shape):
    """Sums over the axes that the precision has not are the transpose of repeating it."""
    precision, sizes = Precision("t", "Gamma", shape, batch), (2, 3)
    rng = np.random.default_rng(2)
    t = rng.normal(size=(*shape, 1, 1)).astype(np.float32)
    x = rng.normal(size=(*sizes, 1, 1)).astype(np.float32)
    wide = np.broadcast_to(precision.to_block(t, sizes), x.shape)
    for index in np.ndindex(*sizes):
        own = tuple(0 if axis is None else index[axis] for axis in batch)
        assert wide[index] == t[own]
    left, right = (wide * x).sum(), (t * precision.from_block(x, 2)).sum()
    np.testing.assert_allclose(left, right, rtol=1e-5)
    assert precision.from_block(x, 2).shape == (*shape, 1, 1)


def test_variances_are_reciprocal_precisions():
    t = np.array([2.0, 4.0], np.float32)
    variance = Precision("s", "InverseGamma", (2,), (0,))
    assert np.asarray(variance.to_matrix(t)).ravel().tolist() == [0.5, 0.25]
    assert np.asarray(variance.from_matrix(variance.to_matrix(t))).tolist() == t.tolist()
    assert (variance.sign, variance.jacobian) == (-1.0, -2.0)
    precision = Precision("t", "Gamma", (2,), (0,))
    assert np.asarray(precision.to_matrix(t)).ravel().tolist() == t.tolist()
    assert (precision.sign, precision.jacobian) == (1.0, 0.0)
