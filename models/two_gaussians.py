r"""Points from two known Gaussians, with their labels: the smallest model with an exact answer.

.. math::
    z_i \sim \mathrm{Bernoulli}(\pi_1), \qquad
    x_i \mid z_i \sim \mathcal N(\mu_{z_i}, \Sigma_{z_i}).

The label is the only latent, so the evidence, the posterior, the ELBO and the importance-weighted
bound (Burda et al. 2016, arXiv:1509.00519) are finite sums: methods of
:class:`~pyro_vi_ext.models.gaussian_mixture_exact.GaussianMixture`.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vi_ext.objective import positive_int

from .gaussian_mixture_exact import LECTURE_MIXTURE, QUERY_POINT, GaussianMixture, check_points

__all__ = [
    "LECTURE_MIXTURE",
    "QUERY_POINT",
    "two_gaussians",
    "two_gaussians_guide",
    "two_gaussians_posterior",
]


def two_gaussians(
    x: Tensor | None = None,
    mixture: GaussianMixture = LECTURE_MIXTURE,
    *,
    num_points: int | None = None,
) -> Tensor:
    r"""Pyro model of points from a mixture of two known Gaussians, with their labels.

    .. math::
        z_i \sim \mathrm{Bernoulli}(\pi_1), \qquad x_i \sim \mathcal N(\mu_{z_i}, \Sigma_{z_i})

    Sites, both in the plate ``"data"`` at dim -1: ``"z"`` (0 or 1, the label) and ``"x"`` (the
    point, event shape (D,)). Each datum is a unit of its own. A vectorised particle plate or an
    enumerated dimension sits to the left. A relaxed label between 0 and 1 is taken as well: it
    interpolates linearly between the means and between the Cholesky factors.

    Args:
        x: points, shape (N, D); a floating-point tensor sets dtype and device of the model, whole
            numbers become torch's default dtype. None draws points instead.
        mixture: the two components; that of the lecture, in the plane, by default.
        num_points: number of points to draw; only without `x`.

    Returns:
        The points, shape (N, D), or (..., N, D) if drawn with particles.

    Raises:
        ValueError: for an `x` of another shape or with NaN or inf (see
            :func:`~pyro_vi_ext.models.gaussian_mixture_exact.check_points`), without both `x` and
            `num_points`, and for a mixture of more or fewer than two components.

    Example:
        >>> import pyro
        >>> x = torch.tensor([QUERY_POINT])
        >>> trace = pyro.poutine.trace(two_gaussians).get_trace(x)
        >>> trace.nodes["z"]["value"].shape, trace.nodes["x"]["fn"].batch_shape
        (torch.Size([1]), torch.Size([1]))
        >>> two_gaussians(num_points=5).shape
        torch.Size([5, 2])
    """
    _check_two(mixture)
    if x is not None:
        x = check_points(x, mixture.num_features)
        size, like = len(x), x
    elif num_points is not None:
        size, like = positive_int("num_points", num_points), torch.empty(())
    else:
        raise ValueError(
            'site "x": found neither points nor their number; pass the observed points as x, or '
            "num_points=N to draw N points."
        )
    means, scale_trils = mixture.means.to(like), mixture.scale_trils.to(like)
    with pyro.plate("data", size, dim=-1):
        z = pyro.sample("z", dist.Bernoulli(mixture.weights[1].to(like)))
        mean = torch.lerp(*means, z.unsqueeze(-1))
        scale_tril = torch.lerp(*scale_trils, z.unsqueeze(-1).unsqueeze(-1))
        return pyro.sample("x", dist.MultivariateNormal(mean, scale_tril=scale_tril), obs=x)


def two_gaussians_guide(
    x: Tensor, mixture: GaussianMixture = LECTURE_MIXTURE, *, probs: Tensor | float | None = None
) -> None:
    r"""Mean-field guide of :func:`two_gaussians`: one free probability for each datum.

    .. math:: q(z) = \prod_i \mathrm{Bernoulli}(z_i; \lambda_i)

    The labels are independent in the posterior too, so the family contains it: the best ELBO is
    :math:`\log p(x)`, at the responsibilities. The parameter is ``"lambda"``, shape (N,), in
    (0, 1), 1/2 at the start, of the dtype and device of `x`.

    Args:
        x: points, shape (N, D).
        mixture: the model's.
        probs: fixed probabilities of label 1 in place of the parameter, a number or shape (N,), for
            instance with ``functools.partial``; the weight of component 1 proposes from the prior.

    Raises:
        ValueError: as :func:`two_gaussians`.

    Example:
        >>> from functools import partial
        >>> from pyro.infer import TraceEnum_ELBO, config_enumerate
        >>> x = torch.tensor([QUERY_POINT])
        >>> guide = config_enumerate(partial(two_gaussians_guide, probs=0.5))
        >>> print(f"{-TraceEnum_ELBO(max_plate_nesting=1).loss(two_gaussians, guide, x):.3f}")
        -5.572
    """
    _check_two(mixture)
    x = check_points(x, mixture.num_features)
    if probs is None:
        probs = pyro.param(
            "lambda", lambda: x.new_full((len(x),), 0.5), constraint=constraints.unit_interval
        )
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Bernoulli(torch.as_tensor(probs, dtype=x.dtype, device=x.device)))


def two_gaussians_posterior(x: Tensor, mixture: GaussianMixture = LECTURE_MIXTURE) -> None:
    r"""The exact posterior of :func:`two_gaussians` as a guide, without parameters.

    .. math:: q(z_i = 1) = p(z_i = 1 \mid x_i)

    Every importance weight :math:`p(x_i, z_i) / q(z_i)` equals :math:`p(x_i)`, whatever is drawn.

    Args:
        x: points, shape (N, D).
        mixture: the model's.

    Raises:
        ValueError: as :func:`two_gaussians`.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> x = torch.tensor([QUERY_POINT])
        >>> print(f"{-Trace_ELBO().loss(two_gaussians, two_gaussians_posterior, x):.4f}")
        -5.4145
    """
    _check_two(mixture)
    x = check_points(x, mixture.num_features)
    log_joint = mixture.log_joint(x)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Bernoulli(logits=log_joint[:, 1] - log_joint[:, 0]))


def _check_two(mixture: GaussianMixture) -> None:
    if mixture.num_components != 2:
        raise ValueError(
            f'site "z": a label of 0 or 1 needs a mixture of two components, found '
            f"{mixture.num_components}; use gaussian_mixture for another number."
        )
