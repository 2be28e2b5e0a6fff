"""Symbolic arrays: every operation against the same operation on numbers."""

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("numpyro")

from pyro_vi_ext.cavi.symbolic import (
    Atom,
    Expr,
    Index,
    Known,
    Label,
    NotRepresentable,
    Term,
    equal,
    merged,
    same_entry,
    simplified,
    taken,
)

RNG = np.random.default_rng(0)
NUM = 4  # categories of every discrete latent here
STATISTICS = {
    "log": np.log,
    "log1m": lambda x: np.log1p(-x),
    "logdet": lambda x: np.linalg.slogdet(x)[1],
    "onehot": lambda x: np.eye(NUM)[x],
}


def evaluate(x: Expr, values: dict) -> np.ndarray:
    """The array at values of the latents: all factors on one grid of all labels, no algebra."""
    result = np.zeros(x.shape)
    for term in x.terms:
        labels = [*x.labels, *sorted(term.labels() - set(x.labels), key=id)]
        shape = [label.size for label in labels]
        at = dict(zip(labels, np.indices(shape, sparse=True), strict=True))
        product = np.full(shape, term.coefficient)
        for known in term.knowns:
            product = product * known.array[tuple(at[label] for label in known.labels)]
        for atom in term.atoms:
            kind, *power = atom.stat
            value = values[atom.site]
            value = value ** power[0] if power else STATISTICS[kind](value)
            product = product * value[tuple(_position(entry, at) for entry in atom.entries)]
        result += product.sum(tuple(range(len(x.labels), len(labels))))
    return result


def _position(entry, at: dict):
    return (
        at[entry] if isinstance(entry, Label) else entry.array[tuple(at[k] for k in entry.labels)]
    )


def latent(name: str, shape: tuple, stat=("pow", 1)) -> Expr:
    labels = tuple(Label(size) for size in shape)
    return Expr(labels, (Term(1.0, (), (Atom(name, stat, labels),)),))


def indicator(name: str, shape: tuple) -> Expr:
    """[z = k], shape (*shape, NUM)."""
    return latent(name, (*shape, NUM), ("onehot",))


def agree(x: Expr, expected, **values) -> None:
    np.testing.assert_allclose(evaluate(x, values), expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def w():
    return RNG.normal(size=(3, 2))


@pytest.fixture
def z():
    return np.array([2, 0, 3])


# --- sums and products ---------------------------------------------------------------------------


def test_products_of_sums_expand(w):
    v, a = RNG.normal(size=(3, 2)), RNG.normal(size=(3, 2))
    x, y, c = latent("w", (3, 2)), latent("v", (3, 2)), Expr.of(a)
    agree((x - c) * (y + c) * (x - y), (w - a) * (v + a) * (w - v), w=w, v=v)


def test_a_product_renames_the_labels_that_both_sides_sum_over(w):
    x = latent("w", (3, 2))
    row = x.sum([1])  # both factors sum over the axis that had one label
    agree(row * row, w.sum(1) ** 2, w=w)
    agree(row * row * row, w.sum(1) ** 3, w=w)
    total = x.sum([0, 1])
    agree(total * total, w.sum() ** 2, w=w)


def test_an_array_and_its_own_sum_share_no_label(w):
    x = latent("w", (3, 2))
    agree(x - x.sum([0, 1]), w - w.sum(), w=w)
    agree(x * x.sum([0, 1]), w * w.sum(), w=w)
    agree(x.sum([0, 1]) + x, w + w.sum(), w=w)


def test_summing_labels_that_are_in_no_factor_counts_them(w):
    x = latent("w", (3, 2))
    wide = Expr((*x.labels, Label(5)), x.terms)
    agree(wide.sum([2]), 5 * w, w=w)
    agree(wide.sum([0, 2]), 5 * w.sum(0), w=w)
    agree(wide.sum([2]) * wide.sum([2]), 25 * w**2, w=w)
    agree(wide.sum([2]).sum([0, 1]), 5 * w.sum(), w=w)
    agree(Expr((Label(7),), (Term(2.0),)).sum([0]), 14.0)


def test_an_empty_axis_sums_to_zero():
    x = latent("w", (0, 2))
    agree(x.sum([0]), np.zeros(2), w=np.zeros((0, 2)))
    agree(Expr((Label(0),), (Term(1.0),)).sum([0]), 0.0)


def test_shapes_must_agree():
    with pytest.raises(NotRepresentable, match=r"\(3,\) and \(2,\)"):
        latent("w", (3,)) + latent("w", (2,))


def test_constant_arrays_are_numbers():
    """No axis is laid out for them; a zero stays a term, so that shapes stay what they are."""
    for value in (1.0, 0.0):
        (term,) = Expr.of(np.full((2, 3), value)).terms
        assert (term.coefficient, term.knowns) == (value, ())
    assert Expr.of(np.full((2, 3), 4.0)).shape == (2, 3)


def test_known_arrays_become_floats():
    """Sums of booleans would saturate at 1, sums of small integers would overflow."""
    assert Expr.of(np.arange(3) > 0).terms[0].knowns[0].array.dtype == float
    assert Expr.of(np.arange(3, dtype=np.int8)).terms[0].knowns[0].array.dtype == float


# --- substitution --------------------------------------------------------------------------------


def test_one_label_for_two_axes_is_a_diagonal():
    square, a = RNG.normal(size=(3, 3)), RNG.normal(size=(3, 3))
    x, i = latent("w", (3, 3)), Label(3)
    both = x * Expr.of(a)
    diagonal = both.substituted(dict.fromkeys(both.labels, i), (i,))
    agree(diagonal, np.diag(square) * np.diag(a), w=square)


def test_axes_swap_at_once(w):
    x = latent("w", (2, 2))
    i, j = x.labels
    agree(x.substituted({i: j, j: i}, (i, j)), w[:2].T, w=w[:2])


def test_indices_of_indices_compose(w):
    x, n, m = latent("w", (3, 2)), Label(5), Label(2)
    outer, inner = np.array([0, 2, 2, 1, 0]), np.array([4, 1])
    y = x.substituted({x.labels[0]: Index(outer, (n,))}, (n, x.labels[1]))
    y = y.substituted({n: Index(inner, (m,))}, (m, x.labels[1]))
    agree(y, w[outer][inner], w=w)


def test_labels_that_are_summed_over_are_not_captured(w):
    x = latent("w", (2, 2))
    agree(x.sum([0]).relabelled((x.labels[0],)), w[:2].sum(0), w=w[:2])


def test_taken_broadcasts_indices_of_different_labels():
    a, n, m = RNG.normal(size=(4, 3)), Label(5), Label(2)
    rows, columns = RNG.integers(0, 4, 5), RNG.integers(0, 3, (2, 5))
    array, labels = taken(a, [Index(rows, (n,)), Index(columns, (m, n))])
    assert labels == (n, m)
    np.testing.assert_array_equal(array, a[rows[:, None], columns.T])


def test_entries_of_an_axis_of_size_one_are_one_entry():
    a, b, zero = Label(1), Label(1), Index(np.asarray(0), ())
    assert same_entry(a, b) and same_entry(a, zero) and same_entry(zero, a)
    assert not same_entry(Label(2), Label(2))
    assert not same_entry(Index(np.asarray(1), ()), a)


# --- joining atoms -------------------------------------------------------------------------------


def test_powers_of_one_variable_add_up_and_cancel():
    tau, x = np.exp(RNG.normal(size=3)), latent("tau", (3,))
    inverse = Expr(x.labels, (Term(1.0, (), (Atom("tau", ("pow", -1), x.labels),)),))
    (square,) = (x * x).terms
    assert [atom.stat for atom in square.atoms] == [("pow", 2)]
    (one,) = (x * inverse).terms
    assert not one.atoms
    agree(x * inverse, np.ones(3), tau=tau)


def test_powers_that_cancel_leave_their_labels_counted():
    tau, k = np.exp(RNG.normal(size=(3, 2))), latent("tau", (3, 2))
    i, j = k.labels
    term = Term(1.0, (), (Atom("tau", ("pow", 2), (i, j)), Atom("tau", ("pow", -2), (i, j))))
    summed = Expr((i,), tuple(simplified([term], (i,))))
    assert not summed.terms[0].atoms
    agree(summed, np.full(3, 2.0), tau=tau)


def test_other_entries_of_one_latent_are_not_joined(w):
    x, flip = latent("w", (3, 2)), Index(np.array([1, 0]), (Label(2),))
    y = x.substituted({x.labels[1]: flip}, (x.labels[0], *flip.labels))
    (term,) = (x * y).terms
    assert len(term.atoms) == 2
    agree(x * y, w * w[:, ::-1], w=w)


def test_indicators_are_idempotent(z):
    x = indicator("z", (3,))
    (term,) = (x * x * x).terms
    assert len(term.atoms) == 1
    agree(x * x, np.eye(NUM)[z], z=z)


@pytest.mark.parametrize("joint", ["both summed", "one summed", "both outputs"])
def test_indicators_of_one_variable_have_one_category(z, joint):
    """[z = k][z = l] f_k g_l = [z = k] f_k g_k, whichever of k and l is an output."""
    f, g = RNG.normal(size=NUM), RNG.normal(size=NUM)
    n, k, m = Label(3), Label(NUM), Label(NUM)
    atoms = (Atom("z", ("onehot",), (n, k)), Atom("z", ("onehot",), (n, m)))
    outputs = {"both summed": (n,), "one summed": (n, m), "both outputs": (n, k, m)}[joint]
    term = Term(1.0, (Known(f, (k,)), Known(g, (m,))), atoms)
    found = Expr(outputs, tuple(simplified([term], outputs)))
    assert len(found.terms[0].atoms) == 1
    agree(found, evaluate(Expr(outputs, (term,)), {"z": z}), z=z)


def test_an_indicator_at_a_permuted_category_is_not_identified_with_itself(z):
    """Sum over k of [z = k] [z = reverse(k)] f_k is 0 here, not f at reverse(z)."""
    f, reverse = RNG.normal(size=NUM), np.array([3, 1, 2, 0])
    n, k = Label(3), Label(NUM)
    atoms = (Atom("z", ("onehot",), (n, k)), Atom("z", ("onehot",), (n, Index(reverse, (k,)))))
    found = Expr((n,), tuple(simplified([Term(1.0, (Known(f, (k,)),), atoms)], (n,))))
    assert all(len(term.atoms) == 1 for term in found.terms)
    agree(found, np.where(reverse[z] == z, f[z], 0.0), z=z)


def test_known_categories_are_compared(z):
    a, b = np.array([2, 1, 3]), np.array([2, 0, 3])
    n = Label(3)
    atoms = tuple(Atom("z", ("onehot",), (n, Index(x, (n,)))) for x in (a, b))
    found = Expr((n,), tuple(simplified([Term(1.0, (), atoms)], (n,))))
    assert len(found.terms[0].atoms) == 1
    agree(found, (z == a) * (z == b), z=z)


def test_equal_of_labels_and_indices():
    n, k = Label(3), Label(NUM)
    known = equal(Index(np.array([1, 3, 1]), (n,)), k)
    np.testing.assert_array_equal(known.array, np.eye(NUM)[[1, 3, 1]])
    assert known.labels == (n, k)


# --- merging -------------------------------------------------------------------------------------


def test_terms_that_differ_in_names_and_coefficients_are_added_up(w):
    a = RNG.normal(size=(3, 2))

    def term(coefficient, swapped=False):
        i, j = Label(3), Label(2)
        atoms = (Atom("w", ("pow", 1), (i, j)), Atom("v", ("pow", 1), (i,)))
        return Term(coefficient, (Known(a, (i, j)),), atoms[::-1] if swapped else atoms)

    found = merged([term(2.0), term(-0.5), term(1.0, swapped=True)])
    assert [t.coefficient for t in found] == [2.5]
    assert merged([term(1.0), term(-1.0)]) == []


def test_terms_that_differ_in_their_pattern_of_labels_are_not_merged():
    i, j = Label(3), Label(3)
    square = Term(1.0, (), (Atom("w", ("pow", 1), (i,)), Atom("v", ("pow", 1), (i,))))
    outer = Term(1.0, (), (Atom("w", ("pow", 1), (i,)), Atom("v", ("pow", 1), (j,))))
    counted = Term(1.0, (), (Atom("w", ("pow", 1), (i,)),), (Label(2),))
    plain = Term(1.0, (), (Atom("w", ("pow", 1), (i,)),))
    assert len(merged([square, outer, counted, plain])) == 4


def test_terms_with_arrays_of_one_content_but_two_patterns_stay_apart():
    a, i, j = np.arange(4.0).reshape(2, 2), Label(2), Label(2)
    atoms = (Atom("w", ("pow", 1), (i,)), Atom("v", ("pow", 1), (j,)))
    assert (
        len(merged([Term(1.0, (Known(a, (i, j)),), atoms), Term(1.0, (Known(a, (j, i)),), atoms)]))
        == 2
    )
