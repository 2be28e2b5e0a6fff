r"""A mixture of K Gaussians with conjugate priors: the Pyro half of a pair of equal models.

.. math::
    \pi \sim \mathrm{Dirichlet}(c), \qquad
    \mu_{kd} \sim \mathcal N(0, s^2), \qquad
    x_i \sim \sum_k \pi_k\, \mathcal N(\mu_k, \Lambda_k^{-1}),

.. math::
    \Lambda_k = \operatorname{diag}(\tau_k), \quad \tau_{kd} \sim \mathrm{Gamma}(a, \text{rate } b),
    \qquad \text{or} \qquad
    \Lambda_k \sim \mathrm{Wishart}\big(\nu = 2 a + D - 1,\ \text{rate matrix } 2 b I\big).

In both the variances have the prior :math:`\Sigma_{kdd} \sim \mathrm{InverseGamma}(a, b)`. Its
NumPyro twin is in :mod:`pyro_vi_ext.models.gaussian_mixture_numpyro`. (The priors of
:func:`~pyro_vi_ext.models.gaussian_mixture.gaussian_mixture` suit data in any units, and have no
closed updates.)
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

from .gaussian_mixture_exact import check_points

__all__ = ["conjugate_mixture", "sort_components"]


def conjugate_mixture(
    x: Tensor,
    num_components: int,
    *,
    marginalize: bool = True,
    full: bool = False,
    concentration: float = 1.0,
    scale: float = 1.0,
    shape: float = 2.0,
    rate: float = 0.2,
) -> None:
    r"""Pyro model of standardised points from a mixture, with conjugate priors.

    .. math:: \text{as in the module docstring.}

    Sites: ``"weights"`` (event shape (K,)); in the plate ``"components"`` at dim -1, ``"means"``
    (event (D,)) and ``"precisions"`` (event (D,), or (D, D) if `full`); in the plate ``"data"`` at
    dim -1, ``"z"`` (0, ..., K - 1, unless the labels are added up) and ``"x"`` (event (D,)). The
    priors are for columns of mean 0 and standard deviation 1: half of the components' standard
    deviations are between 0.27 and 0.46 of the data's, and 98% between 0.17 and 1.16.

    Args:
        x: points, shape (N, D), in standard deviations.
        num_components: K.
        marginalize: add up the labels instead of drawing them.
        full: full covariances instead of diagonal ones.
        concentration: c, positive.
        scale: s, positive, in the units of `x`.
        shape: a, positive.
        rate: b, positive, in the squared units of `x`.

    Raises:
        ValueError: for an `x` of another shape or with NaN or inf.

    References:
        Bishop 2006, Pattern Recognition and Machine Learning, section 10.2.

    Example:
        >>> import pyro
        >>> trace = pyro.poutine.trace(conjugate_mixture).get_trace(torch.randn(20, 2), 3)
        >>> trace.nodes["means"]["value"].shape, trace.nodes["x"]["fn"].batch_shape
        (torch.Size([3, 2]), torch.Size([20]))
    """
    x = check_points(x)
    N, D = x.shape
    weights = pyro.sample("weights", dist.Dirichlet(x.new_full((num_components,), concentration)))
    with pyro.plate("components", num_components, dim=-1):
        means = pyro.sample("means", dist.Normal(x.new_zeros(D), scale).to_event(1))
        if full:
            rate_matrix = 2 * rate * torch.eye(D, dtype=x.dtype, device=x.device)
            prior = dist.Wishart(x.new_tensor(2 * shape + D - 1), precision_matrix=rate_matrix)
        else:
            prior = dist.Gamma(x.new_full((D,), shape), rate).to_event(1)
        precisions = pyro.sample("precisions", prior)
    # A dimension for the data, left of the components and right of any particles.
    means, precisions = means.unsqueeze(-3), precisions.unsqueeze(-4 if full else -3)

    def component(means, precisions):
        if full:
            return dist.MultivariateNormal(means, precision_matrix=precisions)
        return dist.Normal(means, precisions.rsqrt()).to_event(1)

    labels = dist.Categorical(weights)
    with pyro.plate("data", N, dim=-1):
        if marginalize:
            points = dist.MixtureSameFamily(labels, component(means, precisions))
        else:
            z = pyro.sample("z", labels)
            chosen = Vindex(precisions)[..., z, :, :] if full else Vindex(precisions)[..., z, :]
            points = component(Vindex(means)[..., z, :], chosen)
        pyro.sample("x", points, obs=x)


def sort_components(draws: dict[str, np.ndarray], feature: int = 0) -> dict[str, np.ndarray]:
    r"""Number the components of every draw by their means, so that labels do not switch.

    .. math:: \mu_{0d} \le \mu_{1d} \le \dots \le \mu_{K-1,d}

    The posterior has K! copies of each mode. That makes it one, of components whose means in one
    feature are apart; draws of components that overlap there are mixed up.

    Args:
        draws: ``"means"``, shape (..., K, D), and any of ``"weights"`` (..., K), ``"precisions"``
            (..., K, D) or (..., K, D, D) and ``"z"`` (..., N); other sites stay as they are.
        feature: d.

    Returns:
        A dict of the same sites and shapes.

    Example:
        >>> draws = {"means": np.array([[[3.0], [1.0]]]), "weights": np.array([[0.9, 0.1]])}
        >>> draws["z"] = np.array([[0, 0, 1]])
        >>> {name: value[0].tolist() for name, value in sort_components(draws).items()}
        {'means': [[1.0], [3.0]], 'weights': [0.1, 0.9], 'z': [1, 1, 0]}
    """
    order = np.argsort(draws["means"][..., feature], -1)  # (..., K)
    found = dict(draws)
    for name in {"weights", "means", "precisions"} & set(draws):
        event = draws[name].ndim - order.ndim
        found[name] = np.take_along_axis(
            draws[name], order.reshape(*order.shape, *(1,) * event), order.ndim - 1
        )
    if "z" in draws:
        found["z"] = np.take_along_axis(np.argsort(order, -1), draws["z"], -1)
    return found
