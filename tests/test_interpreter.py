"""Functions of latents, run on symbolic arrays: against the functions themselves."""

import re

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402

from pyro_vi_ext.cavi.algebra import Algebra  # noqa: E402
from pyro_vi_ext.cavi.interpreter import Interpreter, Poison  # noqa: E402
from pyro_vi_ext.cavi.symbolic import Expr, Index  # noqa: E402

from .test_algebra import number  # noqa: E402
from .test_symbolic import NUM, evaluate, latent  # noqa: E402


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


RNG = np.random.default_rng(2)
SHAPES = {"w": (4, 3), "u": (3,), "s": (), "tau": (4,), "p": (3,), "one": (1,)}
DISCRETE = {"z": (4,), "y": (4,), "k": ()}
A, B, C = RNG.normal(size=(4, 3)), RNG.normal(size=(3, 3)), RNG.uniform(0.5, 2, size=(4, 3))
TABLE, COUNTS = RNG.normal(size=(NUM, 3)), np.array([3, 0, 1, 2])
MASK = np.array([True, False, True, True])


def draw(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    values["tau"], values["p"] = np.exp(values["tau"]), rng.uniform(0.1, 0.9, 3)
    return values | {name: rng.integers(0, NUM, shape) for name, shape in DISCRETE.items()}


def interpret(function):
    """The outputs of a function of the latents: arrays, symbolic arrays, or poison."""
    symbols = {name: latent(name, shape) for name, shape in SHAPES.items()}
    symbols |= {name: number(name, shape) for name, shape in DISCRETE.items()}
    traced = jax.make_jaxpr(function)(draw(0))
    algebra = Algebra(positive={"tau", "p"}, unit={"p"})
    inputs = [symbols[name] for name in sorted(symbols)]
    return Interpreter(algebra).run(traced.jaxpr, traced.consts, inputs)


def check(function, num: int = 4):
    (found,) = interpret(function)
    assert not isinstance(found, Poison), str(found)
    for seed in range(num):
        values = draw(seed)
        expected = np.asarray(function({k: jnp.asarray(v) for k, v in values.items()}))
        value = evaluate(found, values) if isinstance(found, Expr) else found
        assert value.shape == expected.shape
        np.testing.assert_allclose(value, expected, rtol=1e-11, atol=1e-11)
    return found


@jax.custom_jvp
def doubled(x):
    return 2 * x


doubled.defjvp(lambda primals, tangents: (doubled(*primals), 2 * tangents[0]))

LINEAR = {
    "affine": lambda v: 2 * v["w"] - A / 3 + v["u"],
    "divided": lambda v: v["w"] / C,
    "an array less its sum": lambda v: v["u"] - v["u"].sum(),
    "an array less its mean": lambda v: v["w"] - v["w"].mean(0),
    "an array times its sum": lambda v: v["w"] * v["w"].sum() + v["w"].sum(1, keepdims=True),
    "variance": lambda v: v["w"].var(0),
    "matmul on the left": lambda v: A @ v["u"],
    "matmul on the right": lambda v: v["w"] @ B,
    "matmul of latents": lambda v: v["w"] @ v["u"],
    "matmul with itself": lambda v: v["w"].T @ v["w"],
    "matmul thrice": lambda v: v["w"] @ (B @ v["w"].T),
    "dot": lambda v: jnp.dot(v["u"], v["u"]),
    "einsum": lambda v: jnp.einsum("nd,de,ne->n", v["w"], B, v["w"]),
    "einsum with a trace": lambda v: jnp.einsum("ii->i", v["w"][:3]),
    "einsum transposed": lambda v: jnp.einsum("ij,kj->ki", v["w"], v["w"]),
    "outer": lambda v: jnp.outer(v["u"], v["u"]),
    "batched": lambda v: jax.vmap(lambda a, b: a @ b)(v["w"], A),
    "vmap over one": lambda v: jax.vmap(lambda a: a * v["s"] + v["u"].sum())(v["w"]),
    "vmap of an index": lambda v: jax.vmap(lambda i: v["w"][i] @ v["u"])(COUNTS),
    "jit": lambda v: jax.jit(lambda a, b: a * b)(v["w"], v["u"]),
    "checkpoint": lambda v: jax.checkpoint(lambda a: a * a)(v["w"]),
    "custom_jvp": lambda v: doubled(v["w"]),
    "cumulative sum by a matrix": lambda v: jnp.tril(jnp.ones((4, 4))) @ v["w"],
    "lax.reduce of a sum": lambda v: lax.reduce(v["w"], 0.0, lax.add, (0,)),
    "cubed": lambda v: v["w"] ** 3,
    "polynomial": lambda v: (v["w"] - v["u"]) ** 2 * (v["s"] + 1),
    "times zero": lambda v: v["w"] * 0.0,
    "known": lambda v: jax.nn.softplus(jnp.asarray(A)) + jax.nn.relu(A),
    "known times a latent": lambda v: jax.nn.sigmoid(jnp.asarray(A)) * v["u"],
    "known loop": lambda v: v["u"] * lax.fori_loop(0, 3, lambda i, c: c + i, 0.0),
    "known scan": lambda v: v["w"] * jnp.cumsum(jnp.asarray(COUNTS))[:, None],
    "size one": lambda v: v["one"] * v["w"] + v["one"][0],
}
MOVES = {
    "index": lambda v: v["w"][COUNTS],
    "two indices": lambda v: v["w"][COUNTS, COUNTS[:, None] % 3],
    "scalar index": lambda v: v["w"][2, 1] + v["u"][-1],
    "slice": lambda v: v["w"][1:, ::2],
    "negative step": lambda v: v["w"][::-1, 2:0:-1],
    "reshape": lambda v: v["w"].reshape(2, 6),
    "flat": lambda v: v["w"].ravel() * np.arange(12),
    "transpose": lambda v: v["w"].T * v["u"][:, None],
    "squeeze": lambda v: v["w"][:, None, :, None].squeeze(),
    "stack": lambda v: jnp.stack([v["u"], A[0], 2 * v["u"]], 1),
    "concatenate": lambda v: jnp.concatenate([v["w"], v["u"][None], A]),
    "split": lambda v: jnp.split(v["w"], 2)[1],
    "unstack": lambda v: jnp.unstack(v["w"])[3],
    "tile": lambda v: jnp.tile(v["w"], (2, 1)),
    "repeat": lambda v: jnp.repeat(v["w"], 2, axis=1),
    "roll": lambda v: jnp.roll(v["w"], 1, axis=0),
    "diff": lambda v: jnp.diff(v["w"], axis=0),
    "pad": lambda v: jnp.pad(v["w"], ((1, 0), (0, 2)), constant_values=1.5),
    "set": lambda v: jnp.zeros((4, 3)).at[COUNTS[:2]].set(v["w"][:2]),
    "set in a latent": lambda v: v["w"].at[1].set(v["u"]).at[:, 0].set(0.0),
    "dynamic slice": lambda v: lax.dynamic_slice(v["w"], (1, 1), (2, 2)),
    "dynamic update": lambda v: lax.dynamic_update_slice(v["w"], v["u"][None, :2], (3, 1)),
    "tril": lambda v: jnp.tril(v["w"]),
    "trace": lambda v: jnp.trace(v["w"][:3]),
    "diagonal": lambda v: jnp.diagonal(v["w"]) + jnp.diag(v["u"]),
    "kron": lambda v: jnp.kron(v["u"], A),
    "take_along_axis": lambda v: jnp.take_along_axis(v["w"], COUNTS[:, None] % 3, 1),
    "where": lambda v: jnp.where(MASK[:, None], v["w"], 2 * v["u"]),
    "where with NaN": lambda v: jnp.where(MASK, v["tau"], jnp.log(np.where(MASK, -1.0, 1.0))),
    "where of a scalar": lambda v: jnp.where(True, v["w"], v["u"]),
    "empty": lambda v: jnp.concatenate([v["w"][:0], v["w"][4:].reshape(0, 3), v["u"][None]]),
    "empty only": lambda v: v["w"][:0] * 2,
    "size one": lambda v: v["one"].reshape(1, 1, 1) * v["w"],
}
POSITIVE = {
    "root": lambda v: jnp.sqrt(2 * v["tau"]),
    "reciprocal root": lambda v: lax.rsqrt(v["tau"]) / v["tau"],
    "divided by a product": lambda v: A[:, 0] / (v["tau"] * C[:, 0]),
    "quotient": lambda v: v["tau"] * v["w"][:, 0] / v["tau"],
    "power": lambda v: v["tau"] ** 1.5 * v["tau"] ** -2,
    "logarithm": lambda v: jnp.log(3 * v["tau"] ** 2),
    "logarithm of a product": lambda v: jnp.log(v["tau"][:3] * v["p"] * C[0]),
    "logarithm of one less": lambda v: jnp.log(1 - v["p"]) + jnp.log1p(-v["p"]),
    "logarithm of stacked": lambda v: jnp.log(jnp.concatenate([v["tau"], v["p"], C[0]])),
    "root of selected": lambda v: jnp.sqrt(jnp.where(MASK[:3], v["p"], v["tau"][:3])),
    "odds": lambda v: jnp.log(v["p"] / (v["tau"][0])),
}
LABELS = {
    "value": lambda v: v["z"] * 1.5 + v["k"],
    "table": lambda v: jnp.asarray(TABLE)[v["z"]],
    "latent table": lambda v: v["w"][v["z"]],
    "a column of a latent table": lambda v: v["w"][v["z"]][:, 0],
    "two latents as indices": lambda v: v["w"][v["z"], v["y"] % 3],
    "one latent as two indices": lambda v: v["w"][v["z"], v["z"] % 3],
    "a known and a latent index": lambda v: v["w"][jnp.arange(4), v["z"] % 3],
    "scalar index": lambda v: v["w"][v["k"]] * v["tau"][v["k"]],
    "clipped by default": lambda v: v["u"][v["z"]],
    "filled": lambda v: v["u"].at[v["z"]].get(mode="fill", fill_value=0.0),
    "clipped index": lambda v: v["u"].at[v["z"]].get(mode="clip"),
    "last axis": lambda v: (v["w"].T)[:, v["z"]],
    "negative index": lambda v: v["tau"][v["z"] - NUM],
    "two scalars": lambda v: v["w"][v["k"], v["k"] % 3],
    "index of an index": lambda v: v["tau"][v["y"][COUNTS]],
    "own table": lambda v: v["w"][v["z"]] * v["w"][v["z"]],
    "vmap": lambda v: jax.vmap(lambda k: v["w"][k] @ v["u"])(v["z"]),
    "vmap of both": lambda v: jax.vmap(lambda row, k: row[k % 3])(v["w"], v["z"]),
    "take": lambda v: jnp.take(v["w"], v["z"], axis=0),
    "one-hot": lambda v: jax.nn.one_hot(v["z"], NUM, dtype=float) @ v["w"],
    "longer one-hot": lambda v: jax.nn.one_hot(v["z"], NUM + 2, dtype=float) * 1.0,
    "products of one-hots": lambda v: (
        jax.nn.one_hot(v["z"], NUM)[:, :, None] * jax.nn.one_hot(v["z"], NUM)[:, None, ::-1]
    ).sum((0, 2)),
    "where": lambda v: jnp.where(v["z"] == 2, v["tau"], v["w"][:, 0]),
    "where of a scalar": lambda v: jnp.where(v["k"] > 1, v["w"], -v["w"]),
    "nested where": lambda v: jnp.where(v["z"] < 2, jnp.where(v["y"] == 0, 1.0, v["tau"]), 0.0),
    "logarithm of where": lambda v: jnp.log(jnp.where(v["z"] == 2, v["tau"], v["tau"][::-1])),
    "function": lambda v: jnp.exp(-v["z"]) * jnp.sin(v["y"] * v["z"]),
    "softmax of a table": lambda v: jax.nn.softmax(jnp.asarray(TABLE)[v["z"]], -1),
    "largest in a table": lambda v: jnp.max(jnp.asarray(TABLE)[v["z"]], 1),
    "argmax of a table": lambda v: jnp.argmax(jnp.asarray(TABLE)[v["z"]], 1) * 1.0,
    "larger of two": lambda v: jnp.maximum(v["z"], v["y"]) * 1.0,
    "larger of stacked": lambda v: jnp.max(jnp.stack([v["z"], v["y"]], 1), 1) * 1.0,
    "whole division": lambda v: (v["z"] // 2) * 1.0 + v["z"] % 3,
    "integer div": lambda v: lax.div(v["z"], 2) * 1.0,
    "truncated": lambda v: (v["z"] * 0.6).astype(int) * 1.0,
    "as a boolean": lambda v: v["z"].astype(bool) * 1.0 + (0.5 * v["y"]).astype(bool),
    "logical": lambda v: ((v["z"] > 1) & ~(v["y"] == v["z"])) * 1.0,
    "power of a known": lambda v: 2.0 ** v["z"],
    "power of a table": lambda v: (v["z"] + 1.0) ** v["y"],
    "clipped": lambda v: jnp.clip(v["z"], 1, 2) * 1.0,
    "reciprocal": lambda v: 1.0 / (1 + v["z"]) + v["w"][:, 0] / jnp.sqrt(1.0 + v["y"]),
    "chosen precision": lambda v: 1 / jnp.sqrt(v["tau"][v["z"]]),
    "switch by arithmetic": lambda v: v["z"] * v["tau"] + (1 - v["z"]) * v["w"][:, 0],
    "sum": lambda v: v["z"].sum() * v["s"],
    "known index of a table at a latent": lambda v: jnp.asarray(TABLE)[v["z"]][COUNTS, COUNTS % 3],
    "normalised": lambda v: jnp.where(v["z"] < 0, v["z"] + 4, v["z"]) * 1.0,
}


@pytest.mark.parametrize("name", LINEAR)
def test_polynomials(name):
    check(LINEAR[name])


@pytest.mark.parametrize("name", MOVES)
def test_moves(name):
    check(MOVES[name])


@pytest.mark.parametrize("name", POSITIVE)
def test_functions_of_positive_latents(name):
    check(POSITIVE[name])


@pytest.mark.parametrize("name", LABELS)
def test_functions_of_discrete_latents(name):
    check(LABELS[name], 8)


@pytest.mark.parametrize("seed", range(25))
def test_random_compositions(seed):
    """Chains of moves and arithmetic, drawn at random."""
    rng = np.random.default_rng(seed)
    steps = [
        lambda x, v: x[::-1],
        lambda x, v: x.T,
        lambda x, v: jnp.roll(x, 1, 0),
        lambda x, v: x * RNG_CONSTANT[: x.shape[0], : x.shape[1]],
        lambda x, v: x - x.mean(0),
        lambda x, v: x + v["s"],
        lambda x, v: jnp.concatenate([x, x[:1]]),
        lambda x, v: x[:, None, :].squeeze(1),
        lambda x, v: x @ RNG_CONSTANT[: x.shape[1], :3],
        lambda x, v: jnp.where(RNG_CONSTANT[: x.shape[0], :1] > 0, x, 1.0),
        lambda x, v: x[v["k"] % x.shape[0]][None] + x,
        lambda x, v: x * jnp.where(v["k"] > 1, 1.0, v["s"]),
        lambda x, v: x[np.arange(x.shape[0]) // 2],
        lambda x, v: x.reshape(x.shape[1], x.shape[0]),
    ]
    chain = [steps[i] for i in rng.integers(0, len(steps), 4)]
    start = [lambda v: v["w"], lambda v: v["w"][v["z"]], lambda v: jnp.outer(v["tau"], v["u"])]
    first = start[rng.integers(0, 3)]

    def function(v):
        x = first(v)
        for step in chain:
            x = step(x, v)
        return x.sum(1) * v["u"][0]

    check(function, 2)


RNG_CONSTANT = RNG.normal(size=(12, 12))

REFUSED = {
    "exp": (lambda v: jnp.exp(v["w"]), "exp of a continuous latent"),
    "relu": (lambda v: jax.nn.relu(v["w"]), "max of a continuous latent"),
    "sigmoid": (lambda v: jax.nn.sigmoid(v["w"]), "logistic of a continuous latent"),
    "reciprocal of a real": (lambda v: 1 / v["w"], "power -1 of a continuous latent"),
    "root of a real": (lambda v: jnp.sqrt(v["w"] ** 2), r"power 0\.5"),
    "logarithm of a sum": (lambda v: jnp.log(v["tau"] + 1), "a logarithm of a continuous"),
    "a latent exponent": (lambda v: 2.0 ** v["w"], "exponent"),
    "exponents": (lambda v: v["tau"] ** np.arange(1.0, 5.0), "exponent that is not one"),
    "conversion": (lambda v: v["w"].astype(int), "conversion of a continuous latent"),
    "a Boolean": (lambda v: (v["w"] > 0) * 1.0, "gt of a continuous latent"),
    "argmax": (lambda v: jnp.argmax(v["w"], 1), "argmax of a continuous latent"),
    "largest": (lambda v: jnp.max(v["w"], 1), "reduce_max of a continuous latent"),
    "sort": (lambda v: jnp.sort(v["w"]), "sort of a latent"),
    "sort of labels": (lambda v: jnp.sort(v["z"]), "sort of a latent"),
    "largest label": (lambda v: jnp.max(v["z"]), "reduce_max over elements of a discrete"),
    "product of labels": (lambda v: jnp.prod(v["z"]), "reduce_prod over elements"),
    "cumulative sum of labels": (lambda v: jnp.cumsum(v["z"]), "cumsum of a latent"),
    "function of a sum": (lambda v: jnp.exp(v["z"].sum()), "exp of a sum over elements"),
    "general reduction": (
        lambda v: lax.reduce(v["w"], 0.0, lambda a, b: a + b * 1.0, (0,)), "reduce of a latent",
    ),
    "windows": (
        lambda v: lax.reduce_window(v["w"], 0.0, lax.add, (2, 1), (1, 1), "VALID"), "reduce_window",
    ),
    "scatter_add": (lambda v: jnp.zeros(4).at[COUNTS].add(v["tau"]), "scatter-add of a latent"),
    "an update at a latent": (lambda v: v["w"].at[v["k"]].set(0.0), "positions that depend"),
    "scan": (lambda v: lax.scan(lambda c, x: (c + x, c), 0.0, v["u"])[0], "scan of a latent"),
    "fori_loop": (lambda v: lax.fori_loop(0, 3, lambda i, c: c * v["s"], 1.0), "scan|while"),
    "while": (lambda v: lax.while_loop(lambda c: c < 9, lambda c: c + 1, v["s"]), "while"),
    "cond": (lambda v: lax.cond(v["s"] > 0, lambda x: x, lambda x: -x, v["s"]), "gt of a cont"),
    "cond on a known": (
        lambda v: lax.switch(jnp.asarray(1), [lambda x: x, lambda x: -x], v["s"]), "cond",
    ),
    "cond on a label": (
        lambda v: lax.cond(v["k"] > 1, lambda x: x, lambda x: -x, v["s"]), "cond",
    ),
    "cholesky": (lambda v: jnp.linalg.cholesky(v["w"][:3]), "cholesky"),
    "inverse": (lambda v: jnp.linalg.inv(v["w"][:3]), "of a latent|of a continuous"),
    "out of bounds": (lambda v: jnp.take(v["u"], np.array([0, 3])), "index out of bounds"),
    "a label out of bounds": (lambda v: jnp.take(v["u"], v["z"]), "index out of bounds"),
    "fft": (lambda v: jnp.fft.fft(v["u"]), "fft|complex"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_polynomial_is_poison_that_says_why(name):
    function, reason = REFUSED[name]
    (found,) = interpret(function)
    assert isinstance(found, Poison)
    assert re.search(reason, str(found)), str(found)
    assert "test_interpreter.py:" in str(found)


def test_poison_spreads_to_what_uses_it_only():
    first, second, third = interpret(lambda v: (jnp.exp(v["w"]) + 1, v["w"] + 1, jnp.sin(2.0)))
    assert isinstance(first, Poison) and isinstance(second, Expr)
    assert isinstance(third, np.ndarray)


def test_what_does_not_depend_on_latents_is_a_number_again():
    found = check(lambda v: jnp.sin(v["w"] * 0.0 + 1.0))
    assert isinstance(found, np.ndarray)


def test_tables_do_not_grow_with_what_they_do_not_depend_on():
    """A table at labels of many rows is as large as the table."""
    found = check(lambda v: jnp.asarray(TABLE)[v["z"]] * v["s"])
    sizes = [known.array.size for term in found.terms for known in term.knowns]
    assert sizes == [TABLE.size]
    (term,) = check(lambda v: v["w"][v["z"]]).terms
    assert not term.knowns
    assert not any(isinstance(entry, Index) for atom in term.atoms for entry in atom.entries)
