r"""Coordinate ascent on the evidence lower bound, from an ordinary NumPyro model.

.. math::

    L(q) = F(\mathbb{E}[t_1], \ldots, \mathbb{E}[t_n]) + \sum_i \mathbb{H}[q_i], \qquad
    \eta_i \leftarrow \frac{\partial F}{\partial\, \mathbb{E}[t_i]} \text{ for } i = 1, \ldots, n.

Each update maximises L over one factor, so the bound never falls (Winn and Bishop 2005,
*Variational message passing*; Hoffman, Johnson and Tran 2018, *Autoconj*, arXiv:1811.11926).
"""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from pyro_vi_ext.cavi.derivation import NotConjugateError, compiled, derive
from pyro_vi_ext.cavi.explanation import explain
from pyro_vi_ext.cavi.plan import Plan, make_plan
from pyro_vi_ext.cavi.result import CAVIResult
from pyro_vi_ext.cavi.sharding import Sharding
from pyro_vi_ext.cavi.starts import first_moments
from pyro_vi_ext.objective import positive_int
from pyro_vi_ext.progress import progress_bar

__all__ = ["CAVI"]

CHUNK = 10  # sweeps in one compiled call


class CAVI:
    r"""The exact mean-field optimum of a conditionally conjugate NumPyro model.

    .. math:: q(z) = \prod_{\text{sites } i} q_i(z_i), \qquad
        q_i^\star(z_i) \propto \exp \mathbb{E}_{q_{-i}} \log p(x, z)

    The model is traced once and its log joint expanded into a polynomial in statistics of the
    latents. If every term has one allowed moment of each site, all updates are closed; otherwise
    the model is refused, by an error that names the site and the reason. Nothing is derived by
    hand, and nothing is approximated. Construction also compares the derived log joint with the
    model's own at a draw from the prior.

    Each latent site is one factor, independent over its elements, except axes of Gaussian sites
    that meet in a product (weights of a regression), which have one joint Gaussian. ``blocks``
    gives several sites one factor.

    :param model: a NumPyro model. Distributions: Normal, MultivariateNormal (precision_matrix;
        known covariance_matrix or scale_tril), LogNormal, Gamma, InverseGamma, Exponential, Beta,
        Dirichlet, Wishart, Bernoulli, Categorical, Binomial, Multinomial, Poisson, and
        ``numpyro.factor``; discrete latents must have a finite support.
    :param args: its arguments, the data; ``kwargs`` likewise.
    :param blocks: tuples of site names, each with one joint factor: Gaussian sites, and at most one
        precision or variance of theirs (Gamma, Exponential, InverseGamma, Wishart). With a
        precision, the priors of the Gaussian sites must have it too, times a known number.
    :ivar plan: the expected log joint, see :class:`~pyro_vi_ext.cavi.plan.Plan`.
    :raises NotConjugateError: if an update has no closed form, naming the site and why.
    :raises ValueError: for blocks of other sites.

    References: J. Winn and C. Bishop, *Variational Message Passing*, JMLR 2005. M. Hoffman, M.
    Johnson and D. Tran, *Autoconj: Recognizing and Exploiting Conjugacy Without a Domain-Specific
    Language*, NeurIPS 2018, arXiv:1811.11926.

    Example: the mean and precision of a sample.

    >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
    >>> from pyro_vi_ext.cavi import CAVI
    >>> def model(x):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    ...     tau = numpyro.sample("tau", dist.Gamma(1.0, 1.0))
    ...     with numpyro.plate("data", len(x)):
    ...         numpyro.sample("x", dist.Normal(mu, 1 / jnp.sqrt(tau)), obs=x)
    >>> x = jnp.array([1.0, 2.0, 3.0, 4.0])
    >>> result = CAVI(model, x).run(num_steps=50)
    >>> q = result.posterior
    >>> round(float(q["mu"].mean), 2), round(float(q["tau"].concentration), 2)
    (2.49, 3.0)
    """

    def __init__(self, model, *args, blocks=(), **kwargs):
        self.model, self.blocks = model, tuple(blocks)
        self._sharding: Sharding | None = None
        self._set(args, kwargs)
        self._first = jax.jit(self._first_sweep)
        self._more = jax.jit(self._sweeps, static_argnames="num")

    def _set(self, args, kwargs) -> None:
        # NumPy arrays cannot be indexed by what is drawn while JAX traces, a subsample for one.
        args, kwargs = jax.tree.map(_as_jax, (args, kwargs))
        self.args, self.kwargs = args, kwargs
        derivation = derive(self.model, args, kwargs, jax.random.PRNGKey(0))
        plan = make_plan(derivation, self.blocks)
        self._check(plan, derivation.example)
        self.plan: Plan = plan
        self._draws = derivation.draws

    def update(self, *args, **kwargs) -> CAVI:
        """Give the model other data; what is compiled is kept if they have the same shapes.

        :returns: the object itself.
        :raises NotConjugateError: as the constructor.
        """
        kept, before = dict(vars(self)), self.plan
        self._set(args, kwargs)
        if self.plan.structure == before.structure:
            self.plan = before.with_arrays(self.plan.arrays)  # with the labels of compiled code
        else:
            self._first = jax.jit(self._first_sweep)
            self._more = jax.jit(self._sweeps, static_argnames="num")
            if self._sharding is not None:
                try:
                    self.shard(self._sharding.plate, self._sharding.devices)
                except Exception:
                    vars(self).update(kept)
                    raise
        return self

    def shard(self, plate: str, devices=None) -> CAVI:
        """Spread the rows of a plate over devices, for all runs that follow.

        :param plate: its name; its rows must be independent given the sites outside of it, and
            divisible by the number of devices.
        :param devices: JAX devices; all there are by default.
        :returns: the object itself.
        :raises ValueError: for a plate that is not in the model, a number of rows that is not
            divisible, or no devices.
        :raises NotConjugateError: if rows of the plate are not independent.
        """
        self._sharding = Sharding(self.plan, plate, jax.devices() if devices is None else devices)
        return self

    def explain(self) -> str:
        """The factors and their updates, site by site, in readable algebra."""
        return explain(self.plan, _named_data(self.model, self.args, self.kwargs))

    def run(
        self,
        num_steps: int = 200,
        tol: float = 1e-9,
        num_restarts: int = 1,
        rng_key=None,
        *,
        state: dict | None = None,
        progress: bool | None = None,
    ) -> CAVIResult:
        """Sweep over all factors until the bound has settled.

        :param num_steps: most sweeps of a start, an integer >= 1.
        :param tol: a start ends when a sweep has changed the bound by less than this, in nats (it
            is looked at every ten sweeps); 0: never before ``num_steps``.
        :param num_restarts: number of starts; the one with the best bound is returned.
        :param rng_key: of the starts; ``jax.random.PRNGKey(0)`` by default.
        :param state: the ``state`` of another result to go on from, in place of restarts.
        :param progress: show a bar: ``None`` on a terminal only, ``True`` always, ``False`` never.
        :returns: a :class:`CAVIResult`.
        :raises ValueError: for arguments out of range; if the first sweep gives a factor that is no
            distribution, or a bound that is not finite, naming the sites.
        """
        num_steps = positive_int("num_steps", num_steps)
        num_restarts = positive_int("num_restarts", num_restarts)
        if not 0 <= tol < np.inf:
            raise ValueError(f"tol must be a number >= 0, in nats, got {tol!r}.")
        key = jax.random.PRNGKey(0) if rng_key is None else rng_key
        best, bounds = None, []
        starts = [state] if state is not None else jax.random.split(key, num_restarts)
        with progress_bar(progress, len(starts) * num_steps, unit="sweep") as bar:
            for restart, start in enumerate(starts):
                if state is None:
                    start = first_moments(self._draws, self.plan, start, restart)
                found = self._ascend(start, num_steps, tol, bar)
                bounds.append(found[0][-1])
                if best is None or bounds[-1] > best[0][-1]:
                    best = found
        series, params, moments = best
        return CAVIResult(self.plan.factors, params, -series, moments, np.asarray(bounds))

    # One start.

    def _ascend(self, moments, num_steps: int, tol: float, bar):
        """Bounds of all sweeps, and the parameters and moments at the end."""
        arrays = self.plan.arrays
        if self._sharding is not None:
            arrays, moments = self._sharding.arrays(arrays), self._sharding.moments(moments)
        moments, params, bound, proper = self._first(arrays, moments)
        self._check_proper(params, float(bound), proper)
        series = [np.asarray(bound)[None]]
        bar.update(1)
        done = 1
        while done < num_steps:
            num = min(CHUNK, num_steps - done)
            moments, params, more = self._more(arrays, moments, params, num=num)
            series.append(np.asarray(more))
            done += num
            bar.update(num, note=f"bound={float(more[-1]):.6g}")
            recent = np.concatenate(series[-2:])
            if tol and (np.abs(np.diff(recent)) < tol).any():
                bar.update(num_steps - done)
                break
        return np.concatenate(series), params, moments

    def _first_sweep(self, arrays, moments):
        """A sweep, and whether each factor is a distribution after it."""
        moments, params, bound = self._sweep(arrays, moments)
        proper = {n: f.is_proper(params[n]) for n, f in self.plan.factors.items()}
        return moments, params, bound, proper

    def _sweep(self, arrays, moments):
        """Update every factor in turn: new moments, parameters, and the bound."""
        params = {}
        for name in self.plan.order:
            eta, params[name] = self.plan.update(arrays, moments, name)
            moments = {**moments, name: self.plan.factors[name].moments(params[name])}
        # F is linear in the moments of each site: its terms with the last one are <eta, moments>.
        bound = self.plan.expected_log_joint(arrays, moments, without=name)
        bound = bound + sum(jnp.vdot(eta[key], moments[name][key]) for key in eta)
        return moments, params, bound + self.plan.entropy(arrays, params)

    def _sweeps(self, arrays, moments, params, num: int):
        def body(carry, _):
            moments, params, bound = self._sweep(arrays, carry[0])
            return (moments, params), bound

        (moments, params), bounds = jax.lax.scan(body, (moments, params), None, length=num)
        return moments, params, bounds

    # Checks.

    def _check(self, plan: Plan, example: dict) -> None:
        """The derived log joint at a draw from the prior is the model's."""
        moments = {name: factor.statistics(example) for name, factor in plan.factors.items()}
        moments = jax.tree.map(np.asarray, moments)
        for name, factor in plan.factors.items():
            if "base" in factor.keys:  # log h(value; size), and only eta knows the size
                eta = plan.natural_parameters(plan.arrays, moments, name)
                moments[name]["base"] = np.asarray(factor.family.log_base(example[name], eta))
        for name, slot in plan.hidden.items():
            eta = plan.natural_parameters(plan.arrays, moments, name)
            if plan.factors[name].touches(eta, jnp.asarray(plan.arrays[slot])):
                raise NotConjugateError(
                    f"Latent site '{name}' is masked, and other sites use its values where it is "
                    "hidden and has no density. Mask these too, or leave the mask out."
                )
        found = float(plan.expected_log_joint(plan.arrays, moments, xp=np))
        expected, size = _log_joint(self.model, self.args, self.kwargs, example)
        tolerance = 1e3 * float(jnp.finfo(jnp.result_type(float)).eps) * (1.0 + size)
        if not abs(found - expected) <= tolerance:
            raise NotConjugateError(
                f"The derived log joint is {found:.10g} at a draw from the prior, and the model's "
                f"is {expected:.10g}: the derivation is wrong for this model. Please report it."
            )

    def _check_proper(self, params: dict, bound: float, proper: dict) -> None:
        bad = [name for name in self.plan.factors if not bool(proper[name])]
        if bad:
            raise ValueError(
                f"After the first sweep the factor of site '{bad[0]}' is no distribution: "
                f"{ {k: np.asarray(v).tolist() for k, v in params[bad[0]].items()} }. Its prior is "
                "improper, or data are NaN or outside of their support."
            )
        if not np.isfinite(bound):
            raise ValueError(
                f"The bound is {bound} after the first sweep. Look for data that are NaN, infinite "
                "or outside of the support of their distribution."
            )


def _as_jax(value):
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def _named_data(model, args, kwargs) -> dict[str, np.ndarray]:
    """The arrays among the arguments, by the names that the model has for them."""
    try:
        given = inspect.signature(model).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # a model without a signature
        given = {f"arg{i}": value for i, value in enumerate(args)} | kwargs
    arrays = {name: value for name, value in given.items() if np.ndim(value) > 0}
    return {n: np.asarray(v) for n, v in arrays.items() if np.asarray(v).dtype.kind in "bfiu"}


def _log_joint(model, args, kwargs, example) -> tuple[float, float]:
    """The log joint, and the sum of its terms' sizes."""

    def evaluate(values):
        # In the order of the derivation: the same key for each site, so the same subsample.
        seeded = handlers.substitute(handlers.seed(model, jax.random.PRNGKey(0)), data=values)
        total = size = 0.0
        for site in handlers.trace(seeded).get_trace(*args, **kwargs).values():
            if site["type"] == "sample":
                scale = 1.0 if site["scale"] is None else site["scale"]
                log_p = site["fn"].log_prob(site["value"]) * scale
                total, size = total + log_p.sum(), size + jnp.abs(log_p).sum()
        return total, size

    total, size = compiled(evaluate, example)(example)
    return float(total), float(size)
