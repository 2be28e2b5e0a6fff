r"""Bayesian logistic regression in NumPyro.

.. math::
    w \sim \mathcal N(0, \alpha^{-1} I_D), \qquad
    y_n \sim \mathrm{Bernoulli}\big(\sigma(x_n^\top w)\big).

The twin of :func:`pyro_vi_ext.models.logistic_regression.logistic_regression`: the same sites and
the same joint density. Needs the extra ``numpyro``.
"""

from .logistic_regression import check_shapes, check_values

try:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
except ImportError as error:
    raise ImportError(
        "pyro_vi_ext.models.logistic_regression_numpyro needs JAX and NumPyro: "
        "pip install pyro_vi_ext[numpyro]"
    ) from error

__all__ = ["logistic_regression"]


def logistic_regression(X, y=None, alpha=0.01):
    r"""NumPyro model of binary labels with Gaussian weights.

    .. math::
        w \sim \mathcal N(0, \alpha^{-1} I_D), \qquad
        y_n \sim \mathrm{Bernoulli}(\text{logits} = x_n^\top w).

    Sites ``"w"`` (event shape (D,)) and, in the plate ``"data"``, ``"y"``: those of the Pyro model.
    There is no intercept: give `X` a column of ones.

    Args:
        X: covariates, shape (N, D), an array.
        y: observed labels, 0 or 1, shape (N,), an array of any dtype; None draws labels instead.
        alpha: precision of the prior of each weight, positive.

    Returns:
        The labels, shape (N,).

    Raises:
        ValueError: for an `X` that is no matrix and a `y` of another length; where JAX does not
            trace them, also for covariates that are not finite, labels other than 0 and 1 and an
            `alpha` that is not positive. Site or argument are named.

    References:
        Yin and Zhou 2018, Semi-implicit variational inference, arXiv:1805.11183.

    Example:
        >>> import numpy as np
        >>> from numpyro.handlers import seed
        >>> seed(logistic_regression, 0)(np.ones((3, 2))).shape
        (3,)
    """
    X = jnp.asarray(X)
    y = None if y is None else jnp.asarray(y)
    check_shapes(X, y)
    if not any(isinstance(value, jax.core.Tracer) for value in (X, y, alpha)):
        check_values(X, y, alpha)
    loc = jnp.zeros(X.shape[1])
    w = numpyro.sample("w", dist.Normal(loc, 1 / jnp.sqrt(alpha)).to_event(1))
    with numpyro.plate("data", X.shape[0], dim=-1):
        return numpyro.sample("y", dist.Bernoulli(logits=X @ w), obs=y)
