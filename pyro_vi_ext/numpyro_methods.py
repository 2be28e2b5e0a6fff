r"""Ways to a posterior in NumPyro: coordinate ascent, stochastic gradients, Markov chains.

.. math::

    z_s \sim q, \qquad \log w_s = \log p(x, z_s) - \log q(z_s), \qquad s = 1, \dots, S.

Each ``by_...`` makes a method for :func:`~pyro_vi_ext.comparison.compare`. They compute in the
precision that JAX is set to: for double, ``numpyro.enable_x64()`` before anything else. Needs the
extra ``numpyro``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from pyro_vi_ext.inference_methods import Outcome, scaled, weighted

try:
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as dist
    from numpyro import handlers
    from numpyro.infer import MCMC, NUTS, SVI
    from numpyro.infer.mcmc import MCMCKernel
    from numpyro.infer.util import log_density
except ImportError as error:
    raise ImportError(
        "pyro_vi_ext.numpyro_methods needs JAX and NumPyro: pip install pyro_vi_ext[numpyro]"
    ) from error

from pyro_vi_ext.cavi import CAVI

__all__ = ["by_cavi", "by_nuts", "by_numpyro_svi"]


def by_cavi(
    model,
    *args,
    marginal: Callable | None = None,
    blocks=(),
    num_steps: int = 500,
    tol: float = 1e-9,
    num_restarts: int = 8,
    **kwargs,
) -> Callable[..., Outcome]:
    r"""Coordinate ascent on a NumPyro model, its labels drawn.

    With ``marginal``, the same model with the labels y added up, :math:`\log w = \log p(x, z) -
    \log q(z)` without them, as of methods that cannot draw labels. Its mean, a bound too, is higher
    than that of coordinate ascent by :math:`E_q\, \mathrm{KL}(q(y) \| p(y \mid z, x))`, and is the
    bound of the row; the other one is in a note.

    :param model: a NumPyro model for :class:`~pyro_vi_ext.cavi.CAVI`.
    :param args: its arguments; ``kwargs`` likewise.
    :param marginal: a NumPyro model with fewer latents, for the same arguments.
    :param blocks: as of ``CAVI``; ``num_steps``, ``tol`` and ``num_restarts`` as of its ``run``.

    When it runs: the errors of ``CAVI``; ``ValueError`` if ``marginal`` is another model, which is
    seen if it has a latent that the model has not, another prior, or a lower bound;
    ``NotImplementedError`` for sites that are scaled or subsampled.

    Example: five data, whose mean has the exact posterior N(2.5, 1/6).

    >>> import numpy as np, numpyro, numpyro.distributions as dist
    >>> from pyro_vi_ext.numpyro_methods import by_cavi
    >>> def model(x):
    ...     z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    ...     with numpyro.plate("data", len(x)):
    ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> method = by_cavi(model, np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    >>> outcome = method(num_draws=100, seed=0, progress=False)
    >>> outcome.draws["z"].shape, bool(np.ptp(outcome.log_p - outcome.log_q) < 1e-4)
    ((1, 100), True)
    """

    def method(num_draws: int, seed: int, progress: bool | None) -> Outcome:
        scored = model if marginal is None else marginal
        names = _latents(scored, args, kwargs)
        missing = sorted(names - _latents(model, args, kwargs))
        if missing:
            raise ValueError(
                f"marginal: its site '{missing[0]}' is no latent of the model given to by_cavi. "
                "Give the same model with some of its latents added up, under the same names."
            )
        run_key, draw_key = jax.random.split(jax.random.PRNGKey(seed))
        start = time.perf_counter()
        result = CAVI(model, *args, blocks=blocks, **kwargs).run(
            num_steps, tol, num_restarts, run_key, progress=progress
        )
        seconds = time.perf_counter() - start

        @jax.jit
        def sample(key):  # compiled, so that labels nobody asks for are never drawn
            found = result.sample(key, (num_draws,))
            return {name: found[name] for name in names}

        draws = sample(draw_key)
        log_q = np.asarray(result.log_density(draws))
        log_p, sites = _score(scored, args, kwargs, draws)
        bound, notes = result.bound, ()
        if marginal is not None:
            _check_marginal(model, marginal, args, kwargs, {n: v[0] for n, v in draws.items()})
            notes = (_marginal_note(log_p - log_q, bound),)
            bound = None
        return Outcome(sites, log_p, log_q, bound, seconds=seconds, notes=notes, fitted=result)

    return method


def by_numpyro_svi(
    model, guide, optim, objective, *args, num_steps: int, **kwargs
) -> Callable[..., Outcome]:
    """Stochastic variational inference by NumPyro.

    :param model: the first four as given to ``numpyro.infer.SVI``; any guide whose draws have a
        density.
    :param args: arguments of model and guide; ``kwargs`` likewise.
    :param num_steps: number of gradient steps.

    When it runs: ``ValueError`` if model and guide do not have the same latents;
    ``NotImplementedError`` for sites that are scaled or subsampled.

    Example:

    >>> import numpyro, numpyro.distributions as dist
    >>> from numpyro.infer import Trace_ELBO
    >>> from numpyro.infer.autoguide import AutoNormal
    >>> from pyro_vi_ext.numpyro_methods import by_numpyro_svi
    >>> def model():
    ...     numpyro.sample("z", dist.Gamma(2.0, 1.0))
    >>> adam = numpyro.optim.Adam(0.01)
    >>> method = by_numpyro_svi(model, AutoNormal(model), adam, Trace_ELBO(), num_steps=10)
    >>> outcome = method(num_draws=100, seed=0, progress=False)
    >>> outcome.draws["z"].shape, outcome.log_q.shape
    ((1, 100), (100,))
    """

    def method(num_draws: int, seed: int, progress: bool | None) -> Outcome:
        run_key, draw_key = jax.random.split(jax.random.PRNGKey(seed))
        svi = SVI(model, guide, optim, objective)
        start = time.perf_counter()
        state = svi.init(run_key, *args, **kwargs)
        params = svi.get_params(state)
        names = _latents(model, args, kwargs, params)
        _check_same(names, _latents(guide, args, kwargs, params, auxiliary=False))
        options = {"init_state": state, "progress_bar": _shown(progress)}
        _check_auxiliaries(guide, args, kwargs, params)
        result = svi.run(run_key, num_steps, *args, **options, **kwargs)
        params = jax.block_until_ready(result.params)
        seconds = time.perf_counter() - start

        def one(key):
            log_q, trace = log_density(handlers.seed(guide, key), args, kwargs, params)
            log_p, trace = log_density(handlers.replay(model, trace), args, kwargs, params)
            return log_p, log_q, _values(trace)

        run = jax.jit(lambda keys: jax.lax.map(one, keys))
        log_p, log_q, sites = _numpy(run(jax.random.split(draw_key, num_draws)))
        return weighted(sites, names, log_p, log_q, seconds=seconds, fitted=result)

    return method


def by_nuts(
    model,
    *args,
    num_chains: int = 4,
    num_warmup: int = 1000,
    num_samples: int = 1000,
    chain_method: str = "vectorized",
    **kwargs,
) -> Callable[..., Outcome]:
    """Draws by NumPyro's No-U-Turn sampler, or another of its kernels: a reference, with no bound.

    :param model: a NumPyro model; or a kernel, ``NUTS(model, target_accept_prob=0.9)``, say.
    :param args: arguments of the model; ``kwargs`` likewise.
    :param num_chains: as of ``numpyro.infer.MCMC``, with ``num_warmup``, ``num_samples`` (of each
        chain, whatever ``num_draws`` of :func:`~pyro_vi_ext.comparison.compare`) and
        ``chain_method``.

    Reference: M. Hoffman and A. Gelman, *The No-U-Turn Sampler*, JMLR 2014, arXiv:1111.4246.

    Example: compiling takes seconds, so the test suite runs this one instead of the doctests.

    >>> method = by_nuts(model, x, num_chains=2, num_samples=500)  # doctest: +SKIP
    >>> method(num_draws=100, seed=0, progress=False).draws["z"].shape  # doctest: +SKIP
    (2, 500)
    """

    def method(num_draws: int, seed: int, progress: bool | None) -> Outcome:
        mcmc = MCMC(
            model if isinstance(model, MCMCKernel) else NUTS(model),
            num_warmup=num_warmup,
            num_samples=num_samples,
            num_chains=num_chains,
            chain_method=chain_method,
            progress_bar=_shown(progress),
        )
        start = time.perf_counter()
        mcmc.run(jax.random.PRNGKey(seed), *args, **kwargs)
        sites = _numpy(mcmc.get_samples(group_by_chain=True))
        seconds = time.perf_counter() - start
        diverging = int(np.sum(mcmc.get_extra_fields().get("diverging", 0)))
        notes = (f"{diverging} of {num_chains * num_samples} transitions diverged.",)
        notes = notes if diverging else ()
        return Outcome(sites, independent=False, seconds=seconds, notes=notes, fitted=mcmc)

    return method


# --- sites and densities ----------------------------------------------------------------------


def _latents(program, args, kwargs, params=None, auxiliary: bool = True) -> set[str]:
    """Names of the latent sites of a model or guide, none of them scaled."""
    seeded = handlers.seed(handlers.substitute(program, data=params or {}), jax.random.PRNGKey(0))
    names = set()
    for name, site in handlers.trace(seeded).get_trace(*args, **kwargs).items():
        if site["type"] != "sample":
            continue
        if site["scale"] is not None and np.any(np.asarray(site["scale"]) != 1):
            raise scaled(name)
        if not site["is_observed"] and (auxiliary or not site["infer"].get("is_auxiliary")):
            names.add(name)
    return names


def _check_same(model: set[str], guide: set[str]) -> None:
    for name in sorted(model ^ guide):
        here, there = ("model", "guide") if name in model else ("guide", "model")
        raise ValueError(
            f"Site '{name}' is a latent of the {here} and not of the {there}. Draw it in both."
        )


def _check_auxiliaries(guide, args, kwargs, params) -> None:
    """With noise of its own, a guide has no known density, unless all latents are functions of it
    with a Jacobian, as those of NumPyro's autoguides are."""
    seeded = handlers.seed(handlers.substitute(guide, data=params), jax.random.PRNGKey(0))
    trace = handlers.trace(seeded).get_trace(*args, **kwargs)
    latent = {n: s for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    noise = [n for n, s in latent.items() if s["infer"].get("is_auxiliary")]
    drawn = [n for n, s in latent.items() if n not in noise and not isinstance(s["fn"], dist.Delta)]
    if noise and drawn:
        raise NotImplementedError(
            f"Site '{noise[0]}' of the guide is noise of its own, so the density of '{drawn[0]}' "
            "is an integral over it, which is not known. Use a guide without auxiliary sites, or "
            "by_pyro_svi with a semi-implicit guide."
        )


def _score(model, args, kwargs, draws) -> tuple[np.ndarray, dict]:
    """log p(x, z) of each draw, and all latents and deterministic sites, with one chain."""

    def is_array(value):
        return jnp.asarray(value) if isinstance(value, np.ndarray) else value

    args, kwargs = jax.tree.map(is_array, (args, kwargs))

    def one(values):
        log_p, trace = log_density(model, args, kwargs, values)
        return log_p, _values(trace)

    log_p, sites = _numpy(jax.jit(lambda values: jax.lax.map(one, values))(draws))
    return log_p, {name: value[None] for name, value in sites.items()}


def _values(trace) -> dict:
    return {
        name: site["value"]
        for name, site in trace.items()
        if site["type"] == "deterministic" or (site["type"] == "sample" and not site["is_observed"])
    }


def _numpy(tree):
    return jax.tree.map(np.asarray, tree)


def _shown(progress: bool | None) -> bool:
    return sys.stderr.isatty() if progress is None else progress


def _check_marginal(model, marginal, args, kwargs, values) -> None:
    """Latents whose density does not depend on those added up have the same one in both models."""

    def log_probs(program, num: int) -> dict[str, np.ndarray]:
        def one(key):
            given = handlers.seed(handlers.substitute(program, data=values), key)
            trace = handlers.trace(given).get_trace(*args, **kwargs)
            return {n: trace[n]["fn"].log_prob(trace[n]["value"]).sum() for n in values}

        keys = jax.random.split(jax.random.PRNGKey(0), num)
        return _numpy(jax.jit(lambda keys: jax.lax.map(one, keys))(keys))

    drawn, own = log_probs(model, 8), log_probs(marginal, 1)
    for name, (value,) in own.items():
        rounding = 1e3 * float(jnp.finfo(jnp.result_type(float)).eps)
        differs = abs(value - drawn[name][0]) > rounding * (1 + abs(value))
        if differs and not np.ptp(drawn[name]):
            raise ValueError(
                f"marginal: the log-density of site '{name}' is {value:.6g} at a draw, and "
                f"{drawn[name][0]:.6g} in the model itself: marginal is another model. Give it the "
                "same priors."
            )


def _marginal_note(log_w: np.ndarray, bound: float) -> str:
    mean, error = float(log_w.mean()), float(log_w.std() / len(log_w) ** 0.5)
    if mean < bound - 5 * error - 100 * np.finfo(log_w.dtype).eps * abs(bound):
        raise ValueError(
            f"marginal: its bound is {mean:.6g} +- {error:.2g} nats, below that of the model "
            f"itself, {bound:.6g}. Adding latents up cannot lower it: marginal is another model. "
            "Give it the same priors and data."
        )
    return f"with all latents of its model in q, the bound is {bound:.4f} nats, exactly."
