r"""The negative-binomial model in NumPyro: mean field by coordinate ascent, and NUTS.

A negative-binomial count is a Poisson number of logarithmic variables, and given the count that
number has a Chinese-restaurant-table law (Zhou and Carin 2012, arXiv:1209.3442):

.. math::
    x_i = \sum_{t=1}^{L_i} u_{it}, \quad u_{it} \sim \mathrm{Log}(p), \quad
    L_i \sim \mathrm{Poisson}(-r \log(1 - p)), \quad L_i \mid x_i, r \sim \mathrm{CRT}(x_i, r), \\
    p(x_i, L_i \mid r, p) = \frac{|s(x_i, L_i)|}{x_i!}\, r^{L_i} p^{x_i} (1 - p)^r ,

with unsigned Stirling numbers of the first kind :math:`|s(n, l)|`. Summing over :math:`L_i` gives
back the model of :mod:`pyro_vi_ext.models.negative_binomial`; with :math:`L_i` kept, every factor
of a mean-field posterior :math:`q(r)\, q(p) \prod_i q(L_i)` has a closed form (:func:`cavi`).

Needs the extra ``numpyro``. All of it computes in float64 and leaves JAX's global setting alone.
"""

from functools import partial
from numbers import Integral
from typing import NamedTuple

import numpy as np

from .counts import check_counts, check_hyperparameters, count_exceedances

try:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from jax.scipy.special import digamma, gammaln
    from numpyro.infer import MCMC, NUTS
except ImportError as error:
    raise ImportError(
        "pyro_vi_ext.models.negative_binomial_numpyro needs JAX and NumPyro: "
        "pip install pyro_vi_ext[numpyro]"
    ) from error

try:
    from jax import enable_x64
except ImportError:  # jax < 0.8
    from jax.experimental import enable_x64

__all__ = ["CAVIResult", "cavi", "enable_x64", "negative_binomial", "nuts"]


def negative_binomial(x=None, a=0.01, b=0.01, alpha=0.01, beta=0.01, *, num_leaves=None):
    r"""NumPyro model of independent negative-binomial counts.

    .. math::
        r \sim \mathrm{Gamma}(a, \text{rate } b), \quad p \sim \mathrm{Beta}(\alpha, \beta), \quad
        p(x_i \mid r, p) = \frac{\Gamma(x_i + r)}{x_i!\,\Gamma(r)}\, p^{x_i} (1 - p)^r .

    Sites ``"r"``, ``"p"`` and, in the plate ``"leaves"``, ``"x"``: those of the Pyro model.
    NumPyro's density of a count above 6 is off by about 1e-6 nats even in float64 (JAX 0.10).

    Args:
        x: observed counts, shape (N,); None draws counts instead. It is not checked here, where
            it may be traced: :func:`cavi` and :func:`nuts` check it.
        a: shape of the prior of r.
        b: rate of the prior of r.
        alpha: first concentration (of the count's weight) of the prior of p.
        beta: second concentration of the prior of p.
        num_leaves: number of counts to draw; only without `x`.

    Returns:
        The counts, shape (N,).

    Raises:
        ValueError: without both `x` and `num_leaves`.

    Example:
        >>> from numpyro.handlers import seed, substitute
        >>> draw = substitute(negative_binomial, {"r": 1.0, "p": 0.5})
        >>> seed(draw, 0)(num_leaves=3).shape
        (3,)
    """
    if x is None and num_leaves is None:
        raise ValueError(
            'site "x": found neither counts nor their number; pass the observed counts as x, '
            "or num_leaves=N to draw N counts."
        )
    r = numpyro.sample("r", dist.Gamma(a, b))
    p = numpyro.sample("p", dist.Beta(alpha, beta))
    with numpyro.plate("leaves", num_leaves if x is None else len(x), dim=-1):
        return numpyro.sample("x", dist.NegativeBinomialProbs(r, p), obs=x)


class CAVIResult(NamedTuple):
    """What :func:`cavi` returns.

    Attributes:
        posterior: ``{"r": Gamma, "p": Beta}``, NumPyro distributions with float64 parameters.
            Evaluate them under ``jax.enable_x64(True)`` to keep all digits.
        losses: negative bound after each sweep run, in nats, shape (num_steps,), non-increasing.
        num_steps: number of sweeps run.
        tables: posterior means E[L_i] of the numbers of logarithmic variables, shape (N,).
    """

    posterior: dict[str, dist.Distribution]
    losses: np.ndarray
    num_steps: int
    tables: np.ndarray


def cavi(
    x, a=0.01, b=0.01, alpha=0.01, beta=0.01, *, num_steps: int = 500, tol: float = 0.0
) -> CAVIResult:
    r"""Mean-field posterior of r and p by coordinate ascent on the augmented bound.

    The factors are :math:`q(r)\, q(p) \prod_i q(L_i)`; each update is the exact maximiser of the
    bound given the others. With :math:`\tilde r = \exp E[\log r]`, and
    :math:`\sum_l |s(n, l)|\, \tilde r^l = \Gamma(n + \tilde r) / \Gamma(\tilde r)`,

    .. math::
        q(L_i) &= \mathrm{CRT}(x_i, \tilde r) \propto |s(x_i, L_i)|\, \tilde r^{L_i}, \qquad
        E[L_i] = \tilde r\,[\psi(\tilde r + x_i) - \psi(\tilde r)]
               = \sum_{j < x_i} \frac{\tilde r}{\tilde r + j}, \\
        q(p) &= \mathrm{Beta}\big(\alpha + \textstyle\sum_i x_i,\; \beta + N\, E[r]\big), \\
        q(r) &= \mathrm{Gamma}\big(a + \textstyle\sum_i E[L_i],\;
               \text{rate } b - N\, E[\log(1 - p)]\big) .

    One sweep updates them in this order. The bound at its end, in which :math:`\tilde r` is still
    the one of the sweep's first update, is comparable with log p(x):

    .. math::
        \mathcal L = \sum_i \Big[\log \frac{\Gamma(x_i + \tilde r)}{\Gamma(\tilde r)\, x_i!}
            + E[L_i] (E[\log r] - \log \tilde r) + x_i E[\log p] + E[r]\, E[\log(1 - p)]\Big]
            - \mathrm{KL}(q(r) \| p(r)) - \mathrm{KL}(q(p) \| p(p)) .

    It bounds log p(x) with L integrated by q(L); the bound of the pair q(r) q(p) alone,
    log p(x) - KL(q(r) q(p) || p(r, p | x)), is higher by the expected KL of q(L).

    Args:
        x: counts, shape (N,); an array, a list or a CPU torch tensor.
        a: shape of the prior of r.
        b: rate of the prior of r.
        alpha: first concentration of the prior of p.
        beta: second concentration of the prior of p.
        num_steps: most sweeps to run, each of cost O(max(x)).
        tol: stop when a sweep changes the bound by less than this many nats; 0 never stops.

    Raises:
        ValueError: for entries of `x` that are no counts, priors that are not positive,
            `num_steps` < 1 or `tol` < 0.
        RuntimeError: if the bound falls, or is not finite; neither happens in exact arithmetic.

    References:
        Zhou and Carin 2012, Negative binomial process count and mixture modeling,
        arXiv:1209.3442. Zhou, Li, Dunson and Carin 2012, Lognormal and gamma mixed negative
        binomial regression, ICML.

    Example:
        >>> result = cavi([0] * 70 + [1] * 38 + [2] * 17 + [3] * 10 + [4] * 9 + [5] * 3 + [6, 6, 7])
        >>> q = result.posterior
        >>> print(f"Gamma({q['r'].concentration:.5f}, rate {q['r'].rate:.5f})")
        Gamma(114.82296, rate 114.96103)
        >>> print(f"Beta({q['p'].concentration1:.5f}, {q['p'].concentration0:.5f})")
        Beta(172.01000, 149.82984)
    """
    counts = check_counts(x)
    check_hyperparameters(a=a, b=b, alpha=alpha, beta=beta)
    if num_steps < 1 or not tol >= 0.0:
        raise ValueError(
            f"cavi needs num_steps >= 1 and tol >= 0, found num_steps={num_steps}, tol={tol}; "
            "tol=0 runs all num_steps sweeps."
        )
    prior = np.array([a, b, alpha, beta], dtype=np.float64)
    with enable_x64(True):
        exceedances = jnp.asarray(count_exceedances(counts))
        size, total = float(counts.size), float(counts.sum())
        log_factorials = float(gammaln(jnp.asarray(counts) + 1.0).sum())
        steps, state, losses = _ascend(
            exceedances, size, total, log_factorials, prior, float(tol), num_steps=int(num_steps)
        )
        losses = np.asarray(losses)[: int(steps)]
        _check_ascent(losses)
        # NumPy scalars keep their digits when they are read outside of the float64 context.
        a_q, b_q, alpha_q, beta_q = np.asarray(state, dtype=np.float64)
        posterior = {"r": dist.Gamma(a_q, b_q), "p": dist.Beta(alpha_q, beta_q)}
        rate = np.exp(float(digamma(a_q) - np.log(b_q)))
        per_count = np.cumsum(rate / (rate + np.arange(len(exceedances))))
        tables = np.concatenate([[0.0], per_count])[counts.astype(np.int64)]
    return CAVIResult(posterior, losses, int(steps), tables)


@partial(jax.jit, static_argnames="num_steps")
def _ascend(exceedances, size, total, log_factorials, prior, tol, *, num_steps):
    """Sweeps until num_steps or tol; returns their number, (a, b, alpha, beta) of q, losses."""
    a, b, alpha, beta = prior
    j = jnp.arange(exceedances.shape[0], dtype=prior.dtype)

    def log_beta(u, v):  # jax.scipy.special.betaln is off by up to 1e-6 for arguments above 8
        return gammaln(u) + gammaln(v) - gammaln(u + v)

    def sweep(mean_r, log_r):
        rate = jnp.exp(log_r)
        tables = (exceedances * (rate / (rate + j))).sum()  # sum of all E[L_i]
        log_ways = (exceedances * jnp.log(rate + j)).sum()  # log sum_l |s(x, l)| rate^l
        alpha_q, beta_q = alpha + total, beta + size * mean_r
        log_p = digamma(alpha_q) - digamma(alpha_q + beta_q)
        log_1mp = digamma(beta_q) - digamma(alpha_q + beta_q)
        a_q, b_q = a + tables, b - size * log_1mp
        mean_r, new_log_r = a_q / b_q, digamma(a_q) - jnp.log(b_q)
        kl_r = (a_q - a) * new_log_r - a_q + b * mean_r - gammaln(a_q) + gammaln(a)
        kl_r += a_q * jnp.log(b_q) - a * jnp.log(b)
        kl_p = (alpha_q - alpha) * log_p + (beta_q - beta) * log_1mp
        kl_p += log_beta(alpha, beta) - log_beta(alpha_q, beta_q)
        bound = log_ways - log_factorials + tables * (new_log_r - log_r)
        bound += total * log_p + size * mean_r * log_1mp - kl_r - kl_p
        return jnp.stack([a_q, b_q, alpha_q, beta_q]), mean_r, new_log_r, -bound

    def running(carry):
        step, _, _, _, losses = carry
        change = jnp.abs(losses[step - 2] - losses[step - 1])
        stopped = (step >= 2) & (tol > 0.0) & (change < tol)
        return (step < num_steps) & ~stopped

    def body(carry):
        step, mean_r, log_r, _, losses = carry
        state, mean_r, log_r, loss = sweep(mean_r, log_r)
        return step + 1, mean_r, log_r, state, losses.at[step].set(loss)

    # The first sweep starts from r = 1.
    start = (0, jnp.ones(()), jnp.zeros(()), prior, jnp.zeros(num_steps))
    step, _, _, state, losses = jax.lax.while_loop(running, body, start)
    return step, state, losses


def _check_ascent(losses: np.ndarray) -> None:
    """Raise RuntimeError unless the losses are finite and rise by no more than rounding."""
    if not np.isfinite(losses).all():
        step = int(np.argmin(np.isfinite(losses)))
        raise RuntimeError(
            f"cavi: the bound is {-losses[step]} after sweep {step + 1}; the counts or priors "
            "exceed the float64 range: use larger a, b, alpha, beta or fewer steps."
        )
    rise = np.diff(losses)
    if (rise > 1e-11 * (1.0 + np.abs(losses[1:]))).any():
        step = int(np.argmax(rise))
        raise RuntimeError(
            f"cavi: the bound fell by {rise[step]:.3g} nats in sweep {step + 2}, from "
            f"{-losses[step]:.12g}; coordinate ascent cannot do that: please report it."
        )


def nuts(
    x,
    a=0.01,
    b=0.01,
    alpha=0.01,
    beta=0.01,
    *,
    num_chains: int = 4,
    num_samples: int = 2500,
    num_warmup: int = 1000,
    rng_key=None,
    progress_bar: bool = True,
) -> MCMC:
    r"""Draw from the posterior of :func:`negative_binomial` by the No-U-Turn sampler, in float64.

    .. math:: (r, p) \sim p(r, p \mid x) \propto p(x \mid r, p)\, p(r)\, p(p)

    The chains run side by side in one vectorised program. Check them with
    ``numpyro.diagnostics.summary``: r-hat of the default run on the mite counts is below 1.01.

    Args:
        x: counts, shape (N,); an array, a list or a CPU torch tensor.
        a: shape of the prior of r.
        b: rate of the prior of r.
        alpha: first concentration of the prior of p.
        beta: second concentration of the prior of p.
        num_chains: number of chains.
        num_samples: draws kept per chain.
        num_warmup: draws per chain that adapt step size and metric, then are dropped.
        rng_key: JAX random key, or an integer seed; None is ``PRNGKey(0)``.
        progress_bar: show a progress bar.

    Returns:
        The finished ``numpyro.infer.MCMC``; ``get_samples()`` has float64 arrays ``"r"`` and
        ``"p"`` of shape (num_chains * num_samples,).

    Raises:
        ValueError: for entries of `x` that are no counts, or priors that are not positive.

    References:
        Hoffman and Gelman 2014, The No-U-Turn sampler, arXiv:1111.4246.

    Example:
        Compiling takes seconds, so the test suite runs this one instead of the doctests:

        >>> run = nuts([0, 2, 1, 4], num_samples=100)  # doctest: +SKIP
        >>> run.get_samples()["r"].shape, run.get_samples()["r"].dtype  # doctest: +SKIP
        ((400,), dtype('float64'))
    """
    counts = check_counts(x)
    check_hyperparameters(a=a, b=b, alpha=alpha, beta=beta)
    with enable_x64(True):
        if rng_key is None or isinstance(rng_key, Integral):
            rng_key = jax.random.PRNGKey(int(rng_key or 0))
        run = MCMC(
            NUTS(negative_binomial),
            num_warmup=num_warmup,
            num_samples=num_samples,
            num_chains=num_chains,
            chain_method="vectorized",
            progress_bar=progress_bar,
        )
        run.run(rng_key, jnp.asarray(counts), float(a), float(b), float(alpha), float(beta))
    return run
