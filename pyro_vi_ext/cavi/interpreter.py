r"""From latents to the parameters of distributions: a jaxpr run on symbolic arrays.

Known values are computed as JAX would. Sums, products, powers and logarithms act on polynomials in
statistics of the latents (:mod:`.symbolic`); whatever moves data is applied to positions, and its
result read off as an index map; any function of discrete latents is a function of their labels. A
value that is none of these becomes a :class:`Poison`, which matters only if a parameter needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.extend import core

from pyro_vi_ext.cavi.algebra import (
    Algebra,
    broadcast,
    broadcast_in_dim,
    compact,
    concrete,
    picked,
    positions,
)
from pyro_vi_ext.cavi.symbolic import (
    Atom,
    Expr,
    Label,
    NotRepresentable,
    simplified,
)

__all__ = ["Interpreter", "Poison"]

CALLS = (
    "jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call custom_vjp_call "
    "custom_vjp_call_jaxpr"
).split()
NESTED = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters that hold what a call runs
# What moves data: which operands are data; None: all of them. The others are positions.
MOVES = {
    **dict.fromkeys(
        "reshape transpose squeeze expand_dims slice rev split tile unstack".split(), (0,)
    ),
    **{"dynamic_slice": (0,), "gather": (0,), "concatenate": None, "stack": None, "pad": (0, 1)},
    **{"dynamic_update_slice": (0, 1), "scatter": (0, 2)},
}
# Functions element by element; with those that have a rule of their own for continuous latents.
ELEMENTWISE = set(
    "abs acos acosh add and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp "
    "convert_element_type cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt "
    "igamma igammac integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg "
    "nextafter not or polygamma population_count pow regularized_incomplete_beta rem round rsqrt "
    "shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh "
    "xor zeta".split()
)
REDUCTIONS = "reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin".split()


@dataclass(frozen=True)
class Poison:
    """A value that is no polynomial in statistics of the latents.

    :ivar reason: what was computed.
    :ivar where: file and line of the model, if known.
    """

    reason: str
    where: str = ""

    def __str__(self):
        return self.reason + (f" ({self.where})" if self.where else "")


class Interpreter:
    """Runs jaxprs on arrays that are known (NumPy), symbolic, or poison."""

    def __init__(self, algebra: Algebra):
        self.algebra = algebra

    def run(self, jaxpr, consts: Sequence, inputs: Sequence) -> list:
        """Values of a jaxpr's outputs."""
        env: dict = {}

        def read(atom):
            return np.asarray(atom.val) if isinstance(atom, core.Literal) else env[atom]

        env.update(zip(jaxpr.constvars, map(_known, consts), strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))
        for eqn in _needed(jaxpr):
            outputs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn, inputs: list) -> list:
        name, params = eqn.primitive.name, eqn.params
        if name in CALLS:
            inner = next(params[key] for key in NESTED if key in params)
            closed = inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, ())
            outputs = self.run(closed.jaxpr, closed.consts, inputs)
            return [
                replace(x, where=_where(eqn)) if isinstance(x, Poison) and not x.where else x
                for x in outputs
            ]
        if not any(isinstance(x, Expr | Poison) for x in inputs):
            outputs = eqn.primitive.bind(*inputs, **params)
            return [_known(x) for x in (outputs if eqn.primitive.multiple_results else [outputs])]
        poisoned = next((x for x in inputs if isinstance(x, Poison)), None)
        if poisoned is not None:
            return [poisoned] * len(eqn.outvars)
        self.dtypes = [atom.aval.dtype for atom in eqn.invars]
        try:
            result = self.apply(eqn.primitive, params, inputs)
        except NotRepresentable as error:
            what = str(error) if name in str(error) else f"{name}: {error}"
            return [Poison(what, _where(eqn))] * len(eqn.outvars)
        results = result if isinstance(result, list) else [result]
        return [
            np.asarray(concrete(x), out.aval.dtype) if x.is_known() else x
            for x, out in zip(results, eqn.outvars, strict=True)
        ]

    def apply(self, primitive, params: dict, inputs: list):
        """One primitive with at least one symbolic operand."""
        name = primitive.name
        if name in ELEMENTWISE:
            inputs = _same_shapes(inputs)
        rule = getattr(self, f"_{name}", None)
        if rule is not None:
            return rule(*inputs, **params)
        if name in MOVES:
            return self._moved(primitive, params, inputs)
        if name in ELEMENTWISE:
            return self._elementwise(primitive, params, inputs)
        if name in REDUCTIONS and isinstance(inputs[0], Expr):
            return self._reduced(primitive, params, inputs[0])
        raise NotRepresentable(f"{name} of a latent")

    # Algebra.

    def _add(self, a, b, **_):
        return expr(a) + expr(b)

    _add_any = _add

    def _sub(self, a, b, **_):
        return expr(a) - expr(b)

    def _neg(self, a, **_):
        return -a

    def _mul(self, a, b, **_):
        return expr(a) * expr(b)

    def _div(self, a, b, **params):
        if np.issubdtype(self.dtypes[0], np.integer):
            return self._elementwise(jax.lax.div_p, params, [a, b])
        if isinstance(b, np.ndarray):
            return a * Expr.of(1.0 / b)
        return expr(a) * self.algebra.power(b, -1.0)

    def _integer_pow(self, a, y, **_):
        return self.algebra.power(a, float(y))

    def _pow(self, a, b, **params):
        if isinstance(b, np.ndarray) and b.size and (b == b.flat[0]).all():
            return self.algebra.power(a, float(b.flat[0]))
        if _is_table(expr(a)) and _is_table(expr(b)):
            return self._elementwise(jax.lax.pow_p, params, [a, b])
        raise NotRepresentable("an exponent that is not one known number")

    def _square(self, a, **_):
        return self.algebra.power(a, 2.0)

    def _sqrt(self, a, **_):
        return self.algebra.power(a, 0.5)

    def _rsqrt(self, a, **_):
        return self.algebra.power(a, -0.5)

    def _log(self, a, **_):
        return self.algebra.log(a)

    def _log1p(self, a, **_):
        return self.algebra.log(a + Expr.of(1.0))

    def _copy(self, a, **_):
        return a

    _stop_gradient = _copy

    def _convert_element_type(self, a, new_dtype, **params):
        widens = np.issubdtype(new_dtype, np.integer) and not np.issubdtype(
            self.dtypes[0], np.inexact
        )
        if np.issubdtype(new_dtype, np.inexact) or widens:
            return a
        if not _is_table(a):
            raise NotRepresentable("conversion of a continuous latent to an integer")
        params = {"new_dtype": new_dtype, **params}
        return self._elementwise(jax.lax.convert_element_type_p, params, [a])

    def _reduce_sum(self, a, axes, **_):
        return a.sum(axes)

    def _dot_general(self, a, b, dimension_numbers, **_):
        (contract_a, contract_b), (batch_a, batch_b) = dimension_numbers
        a, b = expr(a), expr(b)
        if a.labels and set(a.labels) & set(b.labels):
            b = b.relabelled([Label(label.size) for label in b.labels])
        shared = [(a.labels[i], b.labels[j]) for i, j in zip(batch_a, batch_b, strict=True)]
        summed = [(a.labels[i], b.labels[j]) for i, j in zip(contract_a, contract_b, strict=True)]
        same = {theirs: ours for ours, theirs in shared + summed}
        b = b.substituted(same, tuple(same.get(label, label) for label in b.labels))
        gone = {ours for ours, _ in summed}
        labels = [ours for ours, _ in shared]
        labels += [x for x in a.labels if x not in gone and x not in labels]
        labels += [x for x in b.labels if x not in gone and x not in labels]
        inside = (*labels, *gone)
        product = Expr(inside, a.terms) * Expr(inside, b.terms)
        return product.sum(range(len(labels), len(inside)))

    def _select_n(self, which, *cases, **_):
        """The sum over i of [which = i] times case i."""
        shape, total = cases[0].shape, None
        for i, case in enumerate(cases):
            if isinstance(which, np.ndarray) and isinstance(case, np.ndarray):
                part = Expr.of(np.where(which == i, case, 0.0))  # a case may be NaN where not used
            else:
                chosen = (
                    expr(which == i)
                    if isinstance(which, np.ndarray)
                    else self.algebra.elementwise(lambda w, i=i: w == i, [which], "a choice")
                )
                part = broadcast(chosen, shape) * expr(case)
            total = part if total is None else total + part
        return Expr(total.labels, tuple(simplified(total.terms, total.labels)))

    # Functions of discrete latents.

    def _elementwise(self, primitive, params: dict, inputs: list):
        def function(*xs):
            xs = [np.asarray(x, dtype) for x, dtype in zip(xs, self.dtypes, strict=True)]
            return np.asarray(primitive.bind(*xs, **params))

        return self.algebra.elementwise(function, [expr(x) for x in inputs], primitive.name)

    def _reduced(self, primitive, params: dict, x: Expr):
        """A reduction over axes along which no discrete latent runs."""
        gone = {x.labels[axis] for axis in params["axes"]}
        for atom in (atom for term in x.terms for atom in term.atoms if atom.stat[0] == "onehot"):
            if gone & set(Atom(atom.site, atom.stat, atom.entries[:-1]).labels()):
                raise NotRepresentable(f"{primitive.name} over elements of a discrete latent")
        (dtype,) = self.dtypes

        def function(x: Expr) -> Expr:
            if not x.is_known():
                return self.algebra.by_label(function, [x], primitive.name)
            kept = tuple(label for label in x.labels if label not in gone)
            axes = tuple(axis for axis, label in enumerate(x.labels) if label in gone)
            value = primitive.bind(np.asarray(concrete(x), dtype), **{**params, "axes": axes})
            return Expr.of(value).relabelled(kept)

        return function(x)

    # Data movement.

    def _transpose(self, a, *, permutation):
        return Expr(tuple(a.labels[axis] for axis in permutation), a.terms)

    def _broadcast_in_dim(self, a, *_, shape, broadcast_dimensions, **params):
        return broadcast_in_dim(a, shape, broadcast_dimensions)

    def _moved(self, primitive, params: dict, inputs: list):
        """What each operand contributes, by the positions that the primitive moves."""
        data = MOVES[primitive.name] or range(len(inputs))
        if any(isinstance(x, Expr) for i, x in enumerate(inputs) if i not in data):
            raise NotRepresentable("positions that depend on a latent")
        total = None
        for which in data:
            operands = [
                (positions if i == which else np.zeros)(x.shape, np.int32) if i in data else x
                for i, x in enumerate(inputs)
            ]
            moved = primitive.bind(*operands, **params)
            moved = moved if primitive.multiple_results else [moved]
            parts = [picked(expr(inputs[which]), np.asarray(m)) for m in moved]
            total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
        return total

    def _gather(self, array, index, fill_value, **params):
        params["fill_value"] = 0 if fill_value == 0 else -1  # nothing, or what is refused
        if isinstance(index, np.ndarray):
            return self._moved(jax.lax.gather_p, params, [array, index])
        numbers = params["dimension_numbers"]
        rank = len(index.labels) - 1 + len(numbers.offset_dims)
        batch = [dim for dim in range(rank) if dim not in numbers.offset_dims]
        varying = numbers.start_indices_batching_dims
        return self._looked_up(
            array, index, batch, varying, lambda p, i: jax.lax.gather_p.bind(p, i, **params)
        )

    def _dynamic_slice(self, array, *starts, **params):
        if all(isinstance(start, np.ndarray) for start in starts):
            return self._moved(jax.lax.dynamic_slice_p, params, [array, *starts])
        columns = np.eye(len(starts))
        index = [
            broadcast(expr(s), (len(starts),)) * Expr.of(columns[i]) for i, s in enumerate(starts)
        ]
        index = functools.reduce(Expr.__add__, index)
        return self._looked_up(
            array, index, (), (), lambda p, i: jax.lax.dynamic_slice_p.bind(p, *i, **params)
        )

    def _looked_up(self, array, index: Expr, dims, varying, lookup):
        """Entries at positions that depend on discrete latents.

        :param index: shape (\\*batch, columns).
        :param dims: which axes of the result are those of the batch.
        :param varying: axes of the batch that the array has too.
        :param lookup: (positions of the array's entries, index) -> positions of the result's.
        """
        batch, array = index.labels[:-1], expr(array)
        whole = positions(array.shape)

        def function(x: Expr) -> Expr:  # shape (*batch, columns, *categories)
            if not x.is_known():
                return self.algebra.by_label(function, [x], "a position")
            categories = x.labels[len(batch) + 1 :]
            values = np.rint(compact(x)).astype(np.int32)
            lead = [x.shape[i] if i in varying else values.shape[i] for i in range(len(batch))]
            values = np.broadcast_to(values, [*lead, *x.shape[len(batch) :]])
            values = values.reshape(*lead, index.labels[-1].size, -1)
            maps = [np.asarray(lookup(whole, values[..., k])) for k in range(values.shape[-1])]
            moved = np.stack(maps, -1)
            moved = moved.reshape(*moved.shape[:-1], *(k.size for k in categories))
            same = [dim for b, dim in zip(batch, dims, strict=True) if moved.shape[dim] != b.size]
            found = picked(array, np.squeeze(moved, tuple(same)))
            own = list(found.labels)
            for dim in same:  # nothing depends on these
                own.insert(dim, Label(1))
            labels = [*own[: len(own) - len(categories)], *categories]
            for label, dim in zip(batch, dims, strict=True):
                labels[dim] = label
            return Expr(tuple(own), found.terms).relabelled(labels)

        return self.algebra.by_label(function, [index], "a position")


# --- helpers -------------------------------------------------------------------------------------


def expr(x) -> Expr:
    return x if isinstance(x, Expr) else Expr.of(x)


def _needed(jaxpr) -> list:
    """The equations that outputs depend on: distributions compute more than they are asked for."""
    needed, found = {id(atom) for atom in jaxpr.outvars}, []
    for eqn in reversed(jaxpr.eqns):
        if any(id(out) in needed for out in eqn.outvars):
            needed.update(map(id, eqn.invars))
            found.append(eqn)
    return found[::-1]


def _known(x):
    return np.asarray(x) if not isinstance(x, jax.Array) or not _is_key(x) else x


def _is_key(x) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _same_shapes(inputs: list) -> list:
    """Arrays with axes of size 1 broadcast; scalars stay what they are."""
    shapes = {x.shape for x in inputs if x.shape}
    if len(shapes) < 2:
        return inputs
    shape = np.broadcast_shapes(*shapes)
    grown = {np.ndarray: np.broadcast_to, Expr: broadcast}
    return [grown[type(x)](x, shape) if x.shape else x for x in inputs]


def _is_table(x: Expr) -> bool:
    return all(atom.stat[0] == "onehot" for term in x.terms for atom in term.atoms)


def _where(eqn) -> str:
    """File and line of the user's code, as far as JAX tells."""
    try:
        from jax._src import source_info_util

        frame = source_info_util.user_frame(eqn.source_info.traceback)
        return f"{frame.file_name.rsplit('/', 1)[-1]}:{frame.start_line}"
    except Exception:  # a private function of JAX: a message may do without it
        return ""
