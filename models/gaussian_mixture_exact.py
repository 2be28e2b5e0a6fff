r"""A mixture of Gaussians with known parameters, and everything exact that can be said of it.

.. math::
    p(x, z = k) = \pi_k\, \mathcal N(x; \mu_k, \Sigma_k), \qquad
    \log p(x) = \underbrace{\sum_k q_k \log \frac{p(x, k)}{q_k}}_{\mathrm{ELBO}(q)}
        + \underbrace{\sum_k q_k \log \frac{q_k}{p(k \mid x)}}_{\mathrm{KL}(q \,\|\, p)} .

The latent is one of K labels, so evidence, posterior, ELBO and KL are finite sums, and with two
components so is the importance-weighted bound of Burda et al. 2016, arXiv:1509.00519. The Pyro
models are :func:`~pyro_vi_ext.models.two_gaussians.two_gaussians` and
:func:`~pyro_vi_ext.models.gaussian_mixture.gaussian_mixture`.
"""

import math
from dataclasses import dataclass, field

import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_vi_ext.objective import positive_int

__all__ = ["LECTURE_MIXTURE", "QUERY_POINT", "GaussianMixture", "check_points"]


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    r"""The parameters of a mixture of K Gaussians in D dimensions, and its exact densities.

    .. math:: p(x) = \sum_{k=0}^{K-1} \pi_k\, \mathcal N(x; \mu_k, \Sigma_k)

    Parameters may be tensors, arrays or nested sequences, for instance ``weights_``, ``means_``
    and ``covariances_`` of scikit-learn. They are kept in float64; every method computes in the
    dtype and on the device of its `x`, an array of points of shape (..., D), in the same units
    as the means. Log-densities are in nats.

    Attributes:
        weights: :math:`\pi`, positive, adding up to 1, shape (K,).
        means: :math:`\mu`, shape (K, D).
        covariances: :math:`\Sigma`, symmetric and positive definite, shape (K, D, D).
        scale_trils: lower Cholesky factors of the covariances, shape (K, D, D); computed.

    Raises:
        ValueError: for parameters that are no mixture; the message names the first bad one.

    Example:
        >>> x = torch.tensor(QUERY_POINT, dtype=torch.float64)
        >>> print(f"{LECTURE_MIXTURE.log_evidence(x):.6f}")
        -5.414534
        >>> print("{:.2f} {:.2f}".format(*LECTURE_MIXTURE.responsibilities(x)))
        0.24 0.76
        >>> q = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> print(f"{LECTURE_MIXTURE.elbo(x, q):.4f} + {LECTURE_MIXTURE.kl(x, q):.4f}")
        -5.5722 + 0.1576
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    scale_trils: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        for name in ("weights", "means", "covariances"):
            value = torch.as_tensor(getattr(self, name), dtype=torch.float64)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "scale_trils", self._check())

    def _check(self) -> Tensor:
        """The Cholesky factors of parameters that are a mixture."""
        weights, means, covariances = self.weights, self.means, self.covariances
        if weights.dim() != 1 or not bool((weights > 0).all() and abs(weights.sum() - 1) < 1e-6):
            raise ValueError(
                f"weights must be a vector of positive numbers that add up to 1, found {weights}; "
                "leave out components of weight 0, and divide by weights.sum()."
            )
        if means.dim() != 2 or len(means) != len(weights) or not bool(means.isfinite().all()):
            raise ValueError(
                f"means must be finite and of shape ({len(weights)}, D), one row for each weight, "
                f"found {means}."
            )
        shape = (len(weights), means.shape[1], means.shape[1])
        if covariances.shape != shape:
            raise ValueError(
                f"covariances must have shape {shape}, one square matrix for each component, found "
                f"{tuple(covariances.shape)}."
            )
        scale_trils, failed = torch.linalg.cholesky_ex(covariances)
        symmetric = torch.isclose(covariances, covariances.mT, rtol=1e-5, atol=0.0).all(-1).all(-1)
        bad = (failed != 0) | ~symmetric | ~scale_trils.isfinite().all(-1).all(-1)
        if bool(bad.any()):
            k = int(bad.nonzero()[0])
            raise ValueError(
                "covariances must be symmetric and positive definite, found "
                f"{covariances[k].tolist()} for component {k}; pass variances and covariances, not "
                "Cholesky factors or precisions."
            )
        return scale_trils

    @property
    def num_components(self) -> int:
        """K."""
        return self.means.shape[0]

    @property
    def num_features(self) -> int:
        """D."""
        return self.means.shape[1]

    def log_joint(self, x: Tensor) -> Tensor:
        r""":math:`\log p(x, z = k)` for all k, shape (..., K)."""
        if x.dim() == 0 or x.shape[-1] != self.num_features:
            raise ValueError(
                f"x must have shape (..., {self.num_features}), one entry for each column of the "
                f"means, found {tuple(x.shape)}."
            )
        components = dist.MultivariateNormal(self.means.to(x), scale_tril=self.scale_trils.to(x))
        return self.weights.log().to(x) + components.log_prob(x.unsqueeze(-2))

    def log_evidence(self, x: Tensor) -> Tensor:
        r""":math:`\log p(x)` of each point, shape (...); its sum is the log-likelihood."""
        return self.log_joint(x).logsumexp(-1)

    def responsibilities(self, x: Tensor) -> Tensor:
        r"""The posterior :math:`p(z = k \mid x)` of each point, shape (..., K)."""
        return self.log_joint(x).softmax(-1)

    def elbo(self, x: Tensor, q: Tensor) -> Tensor:
        r""":math:`\sum_k q_k [\log p(x, k) - \log q_k]` of each point, shape (...).

        Args:
            x: points, shape (..., D).
            q: probabilities of the labels, shape (..., K), broadcast against the points.
        """
        log_joint = self.log_joint(x)
        q = self._check_q(q, x)
        return (q * log_joint).sum(-1) + torch.special.entr(q).sum(-1)

    def kl(self, x: Tensor, q: Tensor) -> Tensor:
        r""":math:`\sum_k q_k [\log q_k - \log p(k \mid x)]` of each point; arguments as `elbo`."""
        log_posterior = self.log_joint(x).log_softmax(-1)
        q = self._check_q(q, x)
        return -(q * log_posterior).sum(-1) - torch.special.entr(q).sum(-1)

    def importance_weighted_bound(self, x: Tensor, q: Tensor, num_particles: int) -> Tensor:
        r"""The exact importance-weighted bound of each point; two components, shape (...).

        .. math::
            L_n = \mathbb E \log \frac 1n \sum_{i=1}^n \frac{p(x, z_i)}{q_{z_i}}
                = \sum_{m=0}^n \binom nm q_1^m q_0^{n-m}
                \log \Big[ \frac mn \frac{p(x, 1)}{q_1} + \frac{n-m}{n} \frac{p(x, 0)}{q_0} \Big]

        It is the ELBO at n = 1 and rises to :math:`\log p(x)` with n, unless q rules out a label.

        Args:
            x: points, shape (..., D).
            q: probabilities of the labels, shape (..., 2), broadcast against the points.
            num_particles: n, an integer >= 1. Memory grows with it.

        Raises:
            NotImplementedError: for more or fewer than two components.

        References:
            Burda, Grosse and Salakhutdinov 2016, Importance weighted autoencoders,
            arXiv:1509.00519.
        """
        n = positive_int("num_particles", num_particles)
        if self.num_components != 2:
            raise NotImplementedError(
                "importance_weighted_bound counts the draws of one of two components, found "
                f"{self.num_components} components; estimate the bound by sampling instead."
            )
        double = x.double()  # log-Gamma of large n leaves float32 too few digits
        log_joint = self.log_joint(double).unsqueeze(-2)
        q = self._check_q(q, double).unsqueeze(-2)
        ones = torch.arange(n + 1, dtype=torch.float64, device=x.device)
        draws = torch.stack([n - ones, ones], -1)  # of each label, shape (n + 1, 2)
        probability = (torch.xlogy(draws, q) - torch.lgamma(draws + 1)).sum(-1).softmax(-1)
        log_weights = torch.where(
            draws > 0, (draws / n).log() + log_joint - q.log(), -math.inf
        ).logsumexp(-1)
        bound = torch.where(probability > 0, probability * log_weights, 0.0).sum(-1)
        return bound.to(x.dtype)

    def _check_q(self, q: Tensor, x: Tensor) -> Tensor:
        q = torch.as_tensor(q, dtype=x.dtype, device=x.device)
        if q.dim() == 0 or q.shape[-1] != self.num_components:
            found = f"shape {tuple(q.shape)}"
        elif not bool((q >= 0).all() and ((q.sum(-1) - 1).abs() < 1e-4).all()):
            found = "entries that are negative, NaN or do not add up to 1"
        else:
            return q
        raise ValueError(
            f"q must hold the probabilities of the {self.num_components} labels along its last "
            f"dimension, found {found}; for q(z = 1) = lam write "
            "torch.stack([1 - lam, lam], -1)."
        )


#: The mixture of the lecture: component 0 of weight .67, component 1 of weight .33, in the plane.
LECTURE_MIXTURE = GaussianMixture(
    weights=[0.67, 0.33],
    means=[[1.10, 0.86], [4.04, 3.83]],
    covariances=[[[1.20, -0.97], [-0.97, 1.15]], [[1.79, -0.10], [-0.10, 2.00]]],
)

#: A point, on the segment between the two means, at which the posterior p(z = 1 | x) is .76, the
#: value of the lecture's figure (which does not print the point).
QUERY_POINT = (2.107996, 1.878282)


def check_points(x: Tensor, num_features: int | None = None, site: str = "x") -> Tensor:
    """Return `x` as a floating-point tensor, having checked that it is a table of points.

    Args:
        x: points, shape (N, D), N and D at least 1; an integer dtype becomes torch's default one.
        num_features: the D asked for, if any.
        site: name of the sample site that observes the points, for the message.

    Raises:
        ValueError: for another shape, and (while Pyro's validation is on) for NaN or inf; the
            message names the site, what was found and a remedy.

    Example:
        >>> check_points(torch.tensor([[1, 2]]))
        tensor([[1., 2.]])
        >>> check_points(torch.tensor([1.0, 2.0]))
        Traceback (most recent call last):
        ValueError: site "x": points must have shape (N, D), found (2,); pass x.unsqueeze(0) ...
    """
    x = torch.as_tensor(x)
    wanted = "D" if num_features is None else num_features
    if x.dim() != 2:
        raise ValueError(
            f'site "{site}": points must have shape (N, {wanted}), found {tuple(x.shape)}; pass '
            "x.unsqueeze(0) for a single point, x.unsqueeze(-1) for a single feature."
        )
    if x.numel() == 0:
        raise ValueError(f'site "{site}": found no points (shape {tuple(x.shape)}); pass some.')
    if num_features is not None and x.shape[1] != num_features:
        raise ValueError(
            f'site "{site}": points must have {num_features} columns, as the means of the mixture, '
            f"found shape {tuple(x.shape)}; choose the columns, or transpose."
        )
    if not x.is_floating_point():
        x = x.to(torch.get_default_dtype())
    if is_validation_enabled() and not bool(x.isfinite().all()):
        bad = (~x.isfinite()).nonzero()
        row, column = bad[0].tolist()
        raise ValueError(
            f'site "{site}": points must be finite, found {float(x[row, column])} at row {row}, '
            f"column {column} ({len(bad)} of {x.numel()} entries); drop or mend these rows before "
            "the call, x[x.isfinite().all(1)]."
        )
    return x
