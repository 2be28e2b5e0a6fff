"""Functions and shapes of symbolic arrays: against the same functions of numbers."""

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("numpyro")

from pyro_vi_ext.cavi.algebra import (
    Algebra,
    broadcast,
    broadcast_in_dim,
    compact,
    concrete,
    contract_known,
    picked,
    positions,
    table,
)
from pyro_vi_ext.cavi.symbolic import (
    Atom,
    Expr,
    Known,
    Label,
    NotRepresentable,
    Term,
)

from .test_symbolic import NUM, agree, evaluate, indicator, latent

RNG = np.random.default_rng(1)
TAU, P, W = np.exp(RNG.normal(size=3)), RNG.uniform(0.1, 0.9, 3), RNG.normal(size=3)
Z = np.array([2, 0, 3])
VALUES = {"tau": TAU, "p": P, "w": W, "z": Z}


@pytest.fixture
def algebra():
    return Algebra(positive={"tau", "p"}, unit={"p"})


def number(name="z", shape=(3,)) -> Expr:
    """A discrete latent as a number: sum over k of [z = k] k."""
    x = indicator(name, shape)
    return (x * broadcast(Expr.of(np.arange(NUM)), x.shape)).sum([len(shape)])


def chosen(*tables) -> list:
    """Tables at the categories of z, over the same axis."""
    x = indicator("z", (3,))
    return [(x * broadcast(Expr.of(t), x.shape)).sum([1]) for t in tables]


# --- powers and logarithms -----------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
def test_powers_of_a_monomial(algebra, exponent):
    a = np.array([0.5, 2.0, 3.0])
    x = (latent("tau", (3,)) * Expr.of(a)).scaled(2.0)
    agree(algebra.power(x, exponent), (2 * a * TAU) ** exponent, **VALUES)
    agree(algebra.log(x), np.log(2 * a * TAU), **VALUES)


def test_a_root_of_a_square_is_the_value_if_that_is_positive(algebra):
    root = algebra.power(algebra.power(latent("tau", (3,)), 2.0), 0.5)
    agree(root, TAU, **VALUES)
    with pytest.raises(NotRepresentable, match=r"power 0\.5 of a continuous latent"):
        algebra.power(algebra.power(latent("w", (3,)), 2.0), 0.5)  # |w|, not w


def test_whole_powers_of_sums_expand(algebra):
    x = latent("w", (3,)) - latent("tau", (3,)) + Expr.of(2.0)
    agree(algebra.power(x, 3.0), (W - TAU + 2) ** 3, **VALUES)


@pytest.mark.parametrize("known", [-1.0, 0.0])
def test_logarithms_and_roots_need_a_positive_factor(algebra, known):
    x = latent("tau", (3,)) * Expr.of(np.array([1.0, known, 2.0]))
    for function in (algebra.log, lambda y: algebra.power(y, 0.5)):
        with pytest.raises(NotRepresentable):
            function(x)


def test_a_logarithm_of_one_less_a_probability(algebra):
    p, one = latent("p", (3,)), Expr.of(1.0)
    agree(algebra.log(one - p), np.log1p(-P), **VALUES)
    for wrong in (
        Expr.of(1.0 + 1e-6) - p,
        one - p.scaled(1 + 1e-6),
        one + p,
        one - latent("tau", (3,)),
    ):
        with pytest.raises(NotRepresentable):
            algebra.log(wrong)


def test_functions_pass_through_stacked_latents(algebra):
    tau, p = latent("tau", (3,)), latent("p", (3,))
    first = np.array([1.0, 0.0, 1.0])
    x = tau * Expr.of(2 * first) + p * Expr.of(1 - first)
    expected = np.where(first == 1, 2 * TAU, P)
    agree(algebra.log(x), np.log(expected), **VALUES)
    agree(algebra.power(x, -2.0), expected**-2, **VALUES)
    with pytest.raises(NotRepresentable):  # both are there at position 1
        algebra.log(tau * Expr.of(np.array([1.0, 1.0, 0.0])) + p * Expr.of(1 - first))


def test_functions_pass_through_discrete_latents(algebra):
    a, b = RNG.uniform(1, 2, NUM), RNG.normal(size=NUM)
    x, y = chosen(a, b)
    agree(algebra.log(x), np.log(a[Z]), **VALUES)
    agree(algebra.power(x, -0.5), a[Z] ** -0.5, **VALUES)
    agree(algebra.log(x * latent("tau", (3,))), np.log(a[Z] * TAU), **VALUES)
    agree(algebra.elementwise(np.maximum, [x, y], "max"), np.maximum(a, b)[Z], **VALUES)
    agree(algebra.elementwise(np.sin, [number()], "sin"), np.sin(Z), **VALUES)


def test_a_function_of_two_discrete_latents(algebra):
    y = np.array([1, 1, 2])
    found = algebra.elementwise(np.arctan2, [number("z"), number("y")], "atan2")
    agree(found, np.arctan2(Z, y), z=Z, y=y)
    agree(algebra.elementwise(np.sin, [number("z") + number("y")], "sin"), np.sin(Z + y), z=Z, y=y)


def test_a_function_of_an_indicator_whose_category_is_an_axis(algebra):
    x = indicator("z", (3,))
    agree(algebra.elementwise(np.exp, [x], "exp"), np.exp(np.eye(NUM)[Z]), **VALUES)


def test_a_function_of_a_sum_over_discrete_latents_is_refused(algebra):
    with pytest.raises(NotRepresentable, match="exp of a sum over elements"):
        algebra.elementwise(np.exp, [number().sum([0])], "exp")


def test_categories(algebra):
    agree(algebra.categories(number(), NUM), np.eye(NUM)[Z], **VALUES)
    agree(algebra.categories(Expr.of(Z), NUM), np.eye(NUM)[Z])
    reverse = number().scaled(-1.0) + Expr.of(3.0)
    agree(algebra.categories(reverse, NUM), np.eye(NUM)[3 - Z], **VALUES)


def test_categories_of_a_latent_share_no_label_with_it(algebra):
    x = number("z", ())
    product = algebra.categories(x, NUM) * x
    agree(product, np.eye(NUM)[2] * 2, z=np.asarray(2))


# --- determinants --------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_logdet_of_a_latent_matrix_alone_scaled_and_by_label(algebra, dim):
    root = RNG.normal(size=(NUM, dim, dim))
    matrices = root @ np.swapaxes(root, -1, -2) + np.eye(dim)
    x = latent("A", (NUM, dim, dim))
    expected = np.linalg.slogdet(3 * matrices)[1]
    agree(algebra.logdet(x.scaled(3.0)), expected, A=matrices)
    wide = broadcast(x, (3, NUM, dim, dim))
    z = broadcast_in_dim(indicator("z", (3,)), wide.shape, (0, 1))
    agree(algebra.logdet((wide * z).sum([1]).scaled(3.0)), expected[Z], A=matrices, z=Z)
    agree(algebra.logdet(Expr.of(matrices)), np.linalg.slogdet(matrices)[1])


def test_logdet_of_a_block_or_of_a_sum_is_refused(algebra):
    x = latent("A", (3, 3))
    block = picked(x, positions((3, 3))[:2, :2])
    single = picked(x, positions((3, 3))[:1, :1])
    for wrong in (block, single, x + Expr.of(np.eye(3))):
        with pytest.raises(NotRepresentable):
            algebra.logdet(wrong)


# --- shapes --------------------------------------------------------------------------------------

MOVES = {
    "transpose": lambda x: x.T,
    "reshape": lambda x: x.reshape(3, 4),
    "flat": lambda x: x.reshape(-1),
    "reverse": lambda x: x[::-1, ::-1],
    "strided": lambda x: x[:, ::2],
    "diagonal": np.diagonal,
    "repeated": lambda x: np.repeat(x, 2, 0),
    "fancy": lambda x: x[[1, 0, 1], [2, 2, 0]],
    "scalar": lambda x: x[1, 2],
    "new axes": lambda x: x[None, :, None, 1:2],
    "empty": lambda x: x[:0],
    "padded": lambda x: np.pad(x, 1),
    "stacked": lambda x: np.stack([x, 0 * x]),
}


@pytest.mark.parametrize("name", MOVES)
def test_every_move_is_read_off_positions(name):
    value, known = RNG.normal(size=(4, 3)), RNG.normal(size=(4, 3))
    x = latent("w", (4, 3)) * Expr.of(known)
    moved = np.asarray(MOVES[name](positions((4, 3))))
    agree(picked(x, moved), MOVES[name](value * known), w=value)


def test_a_move_of_whole_axes_needs_no_indices():
    x = picked(latent("w", (4, 1, 3)), np.stack([positions((4, 1, 3)).T, np.zeros((3, 1, 4), int)]))
    assert all(isinstance(entry, Label) for entry in x.terms[0].atoms[0].entries)
    assert [known.array.shape for known in x.terms[0].knowns] == [(2,)]


def test_broadcasting():
    w = RNG.normal(size=(3, 1))
    x = latent("w", (3, 1))
    agree(broadcast(x, (2, 3, 4)), np.broadcast_to(w, (2, 3, 4)), w=w)
    agree(broadcast_in_dim(x, (3, 2, 1), (0, 2)), np.broadcast_to(w[:, None], (3, 2, 1)), w=w)
    with pytest.raises(NotRepresentable):
        broadcast(latent("w", (3, 2)), (3, 4))


# --- known arrays --------------------------------------------------------------------------------


def test_known_arrays_stay_compact():
    small = broadcast(Expr.of(np.arange(3.0)), (5, 3))
    assert compact(small).shape == (1, 3)
    assert concrete(small).shape == (5, 3)
    again = table(compact(small) ** 2, small.labels)
    assert again.terms[0].knowns[0].array.shape == (3,)
    agree(again, np.broadcast_to(np.arange(3.0) ** 2, (5, 3)))
    assert compact(table(np.full((1, 1), 2.0), small.labels)).shape == (1, 1)
    assert concrete(Expr((Label(0), Label(3)), ())).shape == (0, 3)


def test_the_value_of_a_latent_is_not_known():
    with pytest.raises(NotRepresentable):
        concrete(latent("w", (3,)))


@pytest.mark.parametrize("dtype", [bool, np.int8, float])
def test_contracting_known_arrays_keeps_the_value(dtype):
    a, b = (RNG.normal(size=(40, 3)) > 0).astype(dtype) * dtype(1), RNG.normal(size=(40, 2))
    i, j, k = Label(40), Label(3), Label(2)
    knowns = (Expr.of(a).relabelled((i, j)).terms[0].knowns[0], Known(b, (i, k)))
    term = Term(2.0, knowns, (Atom("w", ("pow", 1), (j,)),), (Label(5),))
    found = contract_known(term)
    assert [known.labels for known in found.knowns] == [(j,)]
    agree(Expr((), (found,)), evaluate(Expr((), (term,)), VALUES), **VALUES)


def test_contracting_multiplies_what_has_the_same_axes():
    """Masks join the data that they hide: the fewer factors, the cheaper a term."""
    x, mask, n, i = RNG.normal(size=(40, 3)), RNG.integers(0, 2, 40) * 1.0, Label(40), Label(3)
    atoms = (Atom("z", ("onehot",), (n, Label(NUM))), Atom("w", ("pow", 1), (i,)))
    knowns = (Known(mask, (n,)), Known(x, (n, i)), Known(mask, (n,)), Known(x[:3, 0], (Label(3),)))
    term = Term(1.0, knowns, atoms)
    found = contract_known(term)
    assert [known.array.shape for known in found.knowns] == [(40, 3)]
    values = {"z": RNG.integers(0, NUM, 40), "w": RNG.normal(size=3)}
    agree(Expr((), (found,)), evaluate(Expr((), (term,)), values), **values)


def test_contracting_makes_no_array_larger_than_there_was():
    x, n, i, j = RNG.normal(size=(40, 3)), Label(40), Label(3), Label(3)
    atoms = (Atom("z", ("onehot",), (n, Label(NUM))), Atom("A", ("pow", 1), (i, j)))
    term = Term(1.0, (Known(x, (n, i)), Known(x, (n, j))), atoms)
    assert [known.array.shape for known in contract_known(term).knowns] == [(40, 3), (40, 3)]
