r"""A mixture of K Gaussians with conjugate priors: the NumPyro half of a pair of equal models.

.. math::
    \pi \sim \mathrm{Dirichlet}(c), \qquad
    \mu_{kd} \sim \mathcal N(0, s^2), \qquad
    z_i \sim \mathrm{Categorical}(\pi), \qquad
    x_i \sim \mathcal N(\mu_{z_i}, \Lambda_{z_i}^{-1}),

.. math::
    \Lambda_k = \operatorname{diag}(\tau_k), \quad \tau_{kd} \sim \mathrm{Gamma}(a, \text{rate } b),
    \qquad \text{or} \qquad
    \Lambda_k \sim \mathrm{Wishart}\big(\nu = 2 a + D - 1,\ \text{rate matrix } 2 b I\big).

Its Pyro twin, with the same sites, is in :mod:`pyro_vi_ext.models.gaussian_mixture_conjugate`.
Needs the extra ``numpyro``.
"""

try:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
except ImportError as error:
    raise ImportError(
        "pyro_vi_ext.models.gaussian_mixture_numpyro needs JAX and NumPyro: "
        "pip install pyro_vi_ext[numpyro]"
    ) from error

__all__ = ["conjugate_mixture"]


def conjugate_mixture(
    x,
    num_components: int,
    *,
    marginalize: bool = True,
    full: bool = False,
    concentration: float = 1.0,
    scale: float = 1.0,
    shape: float = 2.0,
    rate: float = 0.2,
) -> None:
    r"""NumPyro model of standardised points from a mixture, with conjugate priors.

    .. math:: \text{as in the module docstring.}

    With the labels drawn every update of coordinate ascent has a closed form
    (:class:`~pyro_vi_ext.cavi.CAVI`); with the labels added up all latents are continuous, for
    NUTS. Sites and arguments are those of the Pyro model.

    Args:
        x: points, shape (N, D), in standard deviations.
        num_components: K.
        marginalize: add up the labels instead of drawing them.
        full: full covariances instead of diagonal ones.
        concentration: c, positive.
        scale: s, positive, in the units of `x`.
        shape: a, positive.
        rate: b, positive, in the squared units of `x`.

    References:
        Bishop 2006, Pattern Recognition and Machine Learning, section 10.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro.handlers import seed, trace
        >>> sites = trace(seed(conjugate_mixture, 0)).get_trace(jnp.zeros((20, 2)), 3)
        >>> sites["means"]["value"].shape, sites["x"]["fn"].batch_shape
        ((3, 2), (20,))
    """
    N, D = x.shape
    weights = numpyro.sample(
        "weights", dist.Dirichlet(jnp.full((num_components,), concentration, x.dtype))
    )
    with numpyro.plate("components", num_components, dim=-1):
        means = numpyro.sample("means", dist.Normal(jnp.zeros(D, x.dtype), scale).to_event(1))
        if full:
            rate_matrix = 2 * rate * jnp.eye(D, dtype=x.dtype)
            prior = dist.Wishart(2 * shape + D - 1, rate_matrix=rate_matrix)
        else:
            prior = dist.Gamma(jnp.full(D, shape, x.dtype), rate).to_event(1)
        precisions = numpyro.sample("precisions", prior)

    def component(means, precisions):
        if full:
            return dist.MultivariateNormal(means, precision_matrix=precisions)
        return dist.Normal(means, 1 / jnp.sqrt(precisions)).to_event(1)

    labels = dist.Categorical(weights)
    with numpyro.plate("data", N, dim=-1):
        if marginalize:
            points = dist.MixtureSameFamily(labels, component(means, precisions))
        else:
            z = numpyro.sample("z", labels)
            points = component(means[z], precisions[z])
        numpyro.sample("x", points, obs=x)
