r"""Negative-binomial counts with unknown dispersion and success probability.

.. math::
    x_i \sim \mathrm{NB}(r, p), \quad
    p(x_i \mid r, p) = \frac{\Gamma(x_i + r)}{x_i!\,\Gamma(r)}\, p^{x_i} (1 - p)^r, \quad
    r \sim \mathrm{Gamma}(a, \text{rate } b), \quad p \sim \mathrm{Beta}(\alpha, \beta).

Two parameters, one ridge: given :math:`r` the posterior of :math:`p` is a Beta, but only the
mean :math:`r p / (1 - p)` is well determined, so :math:`r` and :math:`p` trade off against each
other. It is the real-data example of semi-implicit variational inference (Yin and Zhou 2018,
arXiv:1805.11183, section 4.1), and small enough to be solved exactly by quadrature:
:func:`~pyro_vi_ext.models.negative_binomial_exact.exact_posterior`, available from here too, is
the reference to which every other method is compared.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from .counts import check_counts
from .negative_binomial_exact import ExactPosterior, exact_posterior

__all__ = ["MITE_COUNTS", "ExactPosterior", "exact_posterior", "load_mites", "negative_binomial"]

#: Leaves with 0, 1, ..., 7 adult female European red mites, 150 leaves in all: Bliss and Fisher,
#: "Fitting the negative binomial distribution to biological data", Biometrics 9 (1953),
#: 176-200, Table 1.
MITE_COUNTS = (70, 38, 17, 10, 9, 3, 2, 1)


def negative_binomial(
    x: Tensor | None = None,
    a: float = 0.01,
    b: float = 0.01,
    alpha: float = 0.01,
    beta: float = 0.01,
    *,
    num_leaves: int | None = None,
) -> Tensor:
    r"""Pyro model of independent negative-binomial counts.

    .. math::
        r \sim \mathrm{Gamma}(a, \text{rate } b), \quad p \sim \mathrm{Beta}(\alpha, \beta), \quad
        x_i \sim \mathrm{NegativeBinomial}(\text{total\_count} = r, \text{probs} = p).

    Sites: ``"r"`` (dispersion, positive), ``"p"`` (probability, in (0, 1)) and, in the plate
    ``"leaves"`` at dim -1, ``"x"`` (counts). A vectorised particle plate sits to its left.

    Args:
        x: observed counts, shape (N,). A floating-point tensor sets dtype and device of the
            model; whole numbers of an integer dtype are converted to torch's default dtype.
            None draws counts instead.
        a: shape of the prior of r.
        b: rate of the prior of r.
        alpha: first concentration (of the count's weight) of the prior of p.
        beta: second concentration of the prior of p.
        num_leaves: number of counts to draw; only without `x`.

    Returns:
        The counts, shape (..., N).

    Raises:
        ValueError: for entries of `x` that are no counts (while Pyro's validation is on), and
            without both `x` and `num_leaves`.

    References:
        Yin and Zhou 2018, Semi-implicit variational inference, arXiv:1805.11183.

    Example:
        >>> import pyro
        >>> trace = pyro.poutine.trace(negative_binomial).get_trace(load_mites())
        >>> trace.nodes["x"]["fn"].batch_shape
        torch.Size([150])
        >>> _ = pyro.set_rng_seed(0)
        >>> draw = pyro.poutine.condition(negative_binomial, {"r": torch.tensor(1.0)})
        >>> draw(alpha=2.0, beta=2.0, num_leaves=3).shape
        torch.Size([3])
    """
    if x is None:
        if num_leaves is None:
            raise ValueError(
                'site "x": found neither counts nor their number; pass the observed counts as x, '
                "or num_leaves=N to draw N counts."
            )
        size, like = num_leaves, torch.empty(())
    else:
        x = torch.as_tensor(x)
        if is_validation_enabled():
            check_counts(x)
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        size, like = x.shape[0], x
    options = {"dtype": like.dtype, "device": like.device}
    a, b, alpha, beta = (torch.as_tensor(value, **options) for value in (a, b, alpha, beta))
    r = pyro.sample("r", dist.Gamma(a, b))
    p = pyro.sample("p", dist.Beta(alpha, beta))
    # A Beta draw can round to 1, where the distribution of x does not exist.
    probs = p.clamp(max=1.0 - torch.finfo(p.dtype).eps)
    with pyro.plate("leaves", size, dim=-1):
        return pyro.sample("x", dist.NegativeBinomial(total_count=r, probs=probs), obs=x)


def load_mites(
    dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Return the 150 red-mite counts of Bliss and Fisher (1953), Biometrics 9:176-200, Table 1.

    Args:
        dtype: type of the result; torch's default dtype if None.
        device: device of the result.

    Returns:
        Mites per apple leaf, shape (150,), in increasing order.

    Example:
        >>> x = load_mites()
        >>> x.shape, int(x.sum()), int(x.max())
        (torch.Size([150]), 172, 7)
    """
    dtype = dtype or torch.get_default_dtype()
    mites = torch.arange(len(MITE_COUNTS), dtype=dtype, device=device)
    return mites.repeat_interleave(torch.tensor(MITE_COUNTS, device=device))
