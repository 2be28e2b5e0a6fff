r"""Stochastic coordinate ascent: natural-gradient steps on minibatches of a plate.

.. math::

    \hat\eta_i = \frac{\partial F_B}{\partial\, \mathbb{E}[t_i]}, \qquad
    \eta_i \leftarrow (1 - \rho_t)\, \eta_i + \rho_t\, \hat\eta_i, \qquad
    \rho_t = (t + \tau)^{-\kappa},

for the factors of all sites outside of the plate, after those inside have been updated for the
rows B. The difference of the two natural parameters is the natural gradient of the bound (Hoffman,
Blei, Wang and Paisley 2013, *Stochastic variational inference*, arXiv:1206.7051).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pyro_vi_ext.cavi.coordinate_ascent import CAVI
from pyro_vi_ext.cavi.derivation import NotConjugateError
from pyro_vi_ext.cavi.result import CAVIResult, MeanField
from pyro_vi_ext.cavi.rows import Rows
from pyro_vi_ext.cavi.starts import first_moments
from pyro_vi_ext.objective import positive_int
from pyro_vi_ext.progress import progress_bar

__all__ = ["StochasticCAVI", "StochasticResult"]

CHUNK = 10  # steps in one compiled call


@dataclass(frozen=True, eq=False, repr=False)
class StochasticResult(CAVIResult):
    """What :meth:`StochasticCAVI.run` returns: the factors outside of the plate.

    :ivar losses: negative bound of each step, nats, 1-D: estimated from its minibatch, with the
        factors before the step.
    :ivar state: natural parameters, the number of steps, and the seed of the minibatches;
        ``run(state=...)`` goes on there as if it had not stopped.
    :ivar bounds: the bound at the end, from all rows, nats, shape (1,).
    """

    _local: Callable

    _unit = "steps"

    @property
    def bound(self) -> float:
        """The evidence lower bound at the end, from all rows, nats."""
        return float(self.bounds[0])

    def local(self, rows) -> MeanField:
        """The factors of the sites in the plate, for some rows, given those outside.

        :param rows: which ones, integers, 1-D.
        """
        return self._local(rows)


class StochasticCAVI:
    r"""Coordinate ascent on minibatches, for plates of many rows.

    No more than a minibatch of responsibilities is held at once. With a fixed step size of 1 and
    minibatches of all rows it is coordinate ascent.

    :param cavi: the model with all of its data, as they are now: what ``cavi.update`` does later
        changes nothing here.
    :param plate: name of the plate to draw minibatches from. Its sites must be independent given
        those outside of it.
    :param batch_size: number of rows in a minibatch.
    :param delay: :math:`\tau \ge 0`, slows down the first steps.
    :param forgetting_rate: :math:`\kappa`, in (0.5, 1], how fast the steps get shorter.
    :param num_local_steps: sweeps over the factors in the plate in a step; by default 1 if there is
        one at most, and otherwise 10.
    :raises ValueError: for arguments out of range.
    :raises NotConjugateError: if rows of the plate are not independent, naming the site.

    References: M. Hoffman, D. Blei, C. Wang and J. Paisley, *Stochastic Variational Inference*,
    JMLR 2013, arXiv:1206.7051.

    Example: the clusters of 10,000 numbers.

    >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
    >>> from pyro_vi_ext.cavi import CAVI, StochasticCAVI
    >>> def model(x):
    ...     with numpyro.plate("components", 2):
    ...         mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    ...     with numpyro.plate("data", len(x)):
    ...         z = numpyro.sample("z", dist.Bernoulli(0.5))
    ...         numpyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)
    >>> x = jax.random.normal(jax.random.PRNGKey(0), (10_000,)).at[::2].add(6.0)
    >>> result = StochasticCAVI(CAVI(model, x), "data", batch_size=100).run(num_steps=200)
    >>> sorted(round(float(m)) for m in result.posterior["mu"].mean)
    [0, 6]
    >>> result.local([0, 1]).posterior["z"].probs.shape
    (2,)
    """

    def __init__(
        self,
        cavi: CAVI,
        plate: str,
        batch_size: int,
        *,
        delay: float = 1.0,
        forgetting_rate: float = 0.7,
        num_local_steps: int | None = None,
    ):
        if not 0.5 < forgetting_rate <= 1.0:
            raise ValueError(f"forgetting_rate must be in (0.5, 1], got {forgetting_rate!r}.")
        if not 0.0 <= delay < np.inf:
            raise ValueError(f"delay must be a number >= 0, got {delay!r}.")
        self.plan, self._draws, self.plate = cavi.plan, cavi._draws, plate
        self.rows = Rows.of(self.plan, plate, positive_int("batch_size", batch_size))
        self.delay, self.forgetting_rate = float(delay), float(forgetting_rate)
        default = 1 if len(self.rows.local) <= 1 else 10
        self.num_local_steps = positive_int(
            "num_local_steps", default if num_local_steps is None else num_local_steps
        )
        order = self.rows.plan.order
        self._local = [name for name in order if name in self.rows.local]
        self._global = [name for name in order if name not in self.rows.local]
        if not self._global:
            raise ValueError(f"All latents are in plate '{plate}': there is nothing to learn.")
        masked = next((name for name in self._global if name in self.plan.hidden), None)
        if masked is not None:
            raise NotConjugateError(
                f"Site '{masked}' is masked and outside of plate '{plate}', where its hidden "
                "elements have no natural parameters: leave them out of the model."
            )
        self._many = jax.jit(self._steps)
        self._estimate = jax.jit(self._estimates)

    def run(
        self,
        num_steps: int = 1000,
        rng_key=None,
        *,
        state: dict | None = None,
        progress: bool | None = None,
    ) -> StochasticResult:
        """Take natural-gradient steps, and evaluate the bound on all rows at the end.

        The factors start at the best ones for the first minibatch, whose labels are clusters of its
        rows. Minibatches are drawn without replacement until all rows have been used.

        :param num_steps: number of steps, an integer >= 1.
        :param rng_key: of the start and the minibatches; ``jax.random.PRNGKey(0)`` by default.
        :param state: the ``state`` of another result to go on from.
        :param progress: show a bar: ``None`` on a terminal only, ``True`` always, ``False`` never.
        :raises ValueError: if a factor is no distribution, or the bound is not finite.
        """
        num_steps = positive_int("num_steps", num_steps)
        if state is None:
            key = jax.random.PRNGKey(0) if rng_key is None else rng_key
            state = self._start(key)
        eta, first = state["eta"], int(state["step"])
        batches = _Batches(self.rows.num_rows, self.rows.size, state["seed"])
        arrays, draws = jax.tree.map(jnp.asarray, (self.plan.arrays, state["draws"]))
        losses = []
        with progress_bar(progress, num_steps, unit="step") as bar:
            for begin in range(first, first + num_steps, CHUNK):
                steps = np.arange(begin, min(begin + CHUNK, first + num_steps))
                rows = np.stack([batches[step] for step in steps])
                eta, (bounds, proper) = self._many(arrays, draws, eta, rows, steps)
                self._check_steps(steps, bounds, proper)
                losses.append(-np.asarray(bounds))
                bar.update(len(steps), note=f"bound={float(bounds[-1]):.6g}")
        params = {n: self.rows.plan.factors[n].update(eta[n]) for n in self._global}
        factors = {n: self.rows.plan.factors[n] for n in self._global}
        bound = self._bound(arrays, draws, eta)
        if not np.isfinite(bound):
            raise ValueError(f"The bound is {bound} after step {first + num_steps}.")
        state = {**state, "eta": eta, "step": first + num_steps}

        def local(rows) -> MeanField:
            return self._locals_of(arrays, draws, eta, np.asarray(rows))

        return StochasticResult(
            factors, params, np.concatenate(losses), state, np.array([bound]), local
        )

    def _start(self, key) -> dict:
        """Natural parameters for the first minibatch, from clusters of its rows."""
        seed = [int(x) for x in np.ravel(jax.random.key_data(key))]
        rows = _Batches(self.rows.num_rows, self.rows.size, seed)[0]
        draws = self._draws(key)
        arrays = [np.asarray(x) for x in self.rows.arrays(self.plan.arrays, rows)]

        def some(_):
            return jax.tree.map(np.asarray, self.rows.values(draws, self.plate, rows))

        moments = first_moments(some, self.rows.plan.with_arrays(arrays), key, 0)
        eta, proper = jax.jit(self._best)(arrays, moments)
        for name in self._global:
            if not bool(proper[name]):
                raise ValueError(
                    f"The first minibatch gives no distribution for site '{name}': its prior is "
                    "improper, data are NaN or outside of their support, or the minibatch is too "
                    "small."
                )
        own = {site for name in self._local for site in self.rows.plan.factors[name].sites}
        draws = {n: v for n, v in draws.items() if n in own and not self._is_discrete(n)}
        return {"eta": eta, "step": 0, "seed": seed, "draws": draws}

    def _best(self, arrays, moments):
        """The best natural parameters of each factor outside of the plate, in turn."""
        eta, proper, moments = {}, {}, dict(moments)
        for name in self._global:
            factor = self.rows.plan.factors[name]
            eta[name] = self.rows.plan.natural_parameters(arrays, moments, name)
            params = factor.update(eta[name])
            proper[name] = factor.is_proper(params)
            moments[name] = factor.moments(params)
        return eta, proper

    def _is_discrete(self, site: str) -> bool:
        factors = self.rows.plan.factors
        return site in factors and bool(factors[site].num_values)

    def _check_steps(self, steps, bounds, proper: dict) -> None:
        for name, good in proper.items():
            if not good.all():
                raise ValueError(
                    f"After step {steps[~np.asarray(good)][0] + 1} the factor of site '{name}' is "
                    "no distribution. Take larger minibatches, or look for data that are NaN or "
                    "outside of their support."
                )
        bad = ~np.isfinite(bounds)
        if bad.any():
            raise ValueError(
                f"The bound is {np.asarray(bounds)[bad][0]} in step {steps[bad][0] + 1}. Look for "
                "data that are NaN, infinite or outside of the support."
            )

    # Steps.

    def _steps(self, arrays, draws, eta, rows, steps):
        def body(eta, at):
            step, own = at
            return self._step(arrays, draws, eta, own, step)

        return jax.lax.scan(body, eta, (steps, rows))

    def _step(self, arrays, draws, eta, rows, step):
        """The factors in the plate, the bound, and then a step of those outside."""
        plan = self.rows.plan
        arrays, moments, bound, _ = self._inner(self.rows, arrays, draws, eta, rows)
        size = (1.0 + step + self.delay) ** -self.forgetting_rate
        eta, proper = dict(eta), {}
        for name in self._global:
            best = plan.natural_parameters(arrays, moments, name)
            eta[name] = jax.tree.map(lambda a, b: a + size * (b - a), eta[name], best)
            factor = plan.factors[name]
            params = factor.update(eta[name])
            proper[name] = factor.is_proper(params)
            moments = {**moments, name: factor.moments(params)}
        return eta, (bound, proper)

    def _inner(self, rows: Rows, arrays, draws, eta, own):
        """Arrays of some rows; moments, the estimated bound and all parameters after them."""
        plan, arrays = rows.plan, rows.arrays(arrays, own)
        params = {n: plan.factors[n].update(eta[n]) for n in self._global}
        moments = {n: plan.factors[n].moments(params[n]) for n in self._global}
        values = rows.values(draws, self.plate, own)
        for name in self._local:
            factor = plan.factors[name]
            if factor.num_values:
                shape = (*factor.axes.shape, factor.num_values)
                moments[name] = {"onehot": jnp.full(shape, 1.0 / factor.num_values)}
            else:
                moments[name] = factor.statistics(values)

        def sweep(_, carry):
            moments, params = dict(carry[0]), dict(carry[1])
            for name in self._local:
                _, params[name] = plan.update(arrays, moments, name)
                moments[name] = plan.factors[name].moments(params[name])
            return moments, params

        found = sweep(0, (moments, params))
        moments, params = jax.lax.fori_loop(1, self.num_local_steps, sweep, found)
        bound = plan.expected_log_joint(arrays, moments)
        return arrays, moments, bound + plan.entropy(arrays, params), params

    # All rows.

    def _bound(self, arrays, draws, eta) -> float:
        """The mean of the estimates of minibatches that are all rows, one after the other."""
        num, size = self.rows.num_rows, self.rows.size
        whole = np.arange(num - num % size).reshape(-1, size)
        total = len(whole) * size * self._estimate(arrays, draws, eta, whole).mean()
        if num % size:
            rest = np.arange(num - num % size, num)
            total = total + len(rest) * self._estimate(arrays, draws, eta, rest[None])[0]
        return float(total) / num

    def _estimates(self, arrays, draws, eta, batches):
        """The bound as each batch of the same size estimates it."""
        rows = Rows.of(self.plan, self.plate, batches.shape[1])
        return jax.lax.map(lambda own: self._inner(rows, arrays, draws, eta, own)[2], batches)

    def _locals_of(self, arrays, draws, eta, own: np.ndarray) -> MeanField:
        known = self.rows.num_rows
        if own.ndim != 1 or own.dtype.kind not in "iu" or not own.size:
            raise ValueError(f"rows must be integers, 1-D, got shape {own.shape}, {own.dtype}.")
        if own.min() < 0 or own.max() >= known:
            raise ValueError(f"rows must be 0, ..., {known - 1}, got {own.min()}, {own.max()}.")
        rows = Rows.of(self.plan, self.plate, len(own))
        params = self._inner(rows, arrays, draws, eta, own)[3]
        factors = {name: rows.plan.factors[name] for name in self._local}
        return MeanField(factors, {name: params[name] for name in self._local})


class _Batches:
    """Rows of each step: epochs of random order, cut into pieces; a function of seed and step."""

    def __init__(self, num_rows: int, size: int, seed: list[int]):
        self.num_rows, self.size, self.seed = num_rows, size, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __getitem__(self, step: int) -> np.ndarray:
        begin, pieces = int(step) * self.size, []
        end = begin + self.size
        while begin < end:
            epoch, place = divmod(begin, self.num_rows)
            pieces.append(self._order(epoch)[place : place + end - begin])
            begin += len(pieces[-1])
        return np.concatenate(pieces)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            order = np.random.default_rng([*self.seed, epoch]).permutation(self.num_rows)
            self._epochs = {epoch: order}
        return self._epochs[epoch]
