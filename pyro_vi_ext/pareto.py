r"""Pareto-smoothed importance sampling (Vehtari et al. 2024, arXiv:1507.02646).

.. math::

    M = \lceil \min(S / 5,\, 3 \sqrt{S}) \rceil, \qquad
    r_{(S-M+j)} - \hat u \sim \mathrm{GPD}(\sigma, k), \qquad
    \tilde r_{(S-M+j)} = \min\Big\{ \hat u + \hat F^{-1}\Big(\frac{j - 1/2}{M}\Big),\, \max_s r_s
    \Big\}, \qquad j = 1, \dots, M.

The :math:`M` largest of :math:`S` importance ratios :math:`r` exceed the cutoff :math:`\hat u` (the
next largest) by amounts that follow a generalised Pareto distribution :math:`F`. Its quantiles take
their place. Its shape :math:`\hat k` says whether the mean ratio can be trusted: it can below 0.7
(below :math:`1 - 1 / \log_{10} S`, for :math:`S` under 2200), and above 1 no mean exists. The fit
is that of Zhang and Stephens (2009, Technometrics 51:316-325), with the paper's weak prior on k.

Conventions are those of ``arviz.psislw`` with ``reff=1``: :math:`M` is rounded up, ratios tied with
the cutoff are not in the tail, and the cutoff is at least the smallest normal number times the
largest ratio. (``psislw`` of ``arviz_stats`` takes log-likelihoods, rounds :math:`M` down, keeps
ties with the cutoff in the tail, has no least cutoff, and raises an error where nothing is fitted.)
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_ext.objective import positive_int

__all__ = ["WeightSummary", "effective_sample_size", "pareto_smooth"]


@torch.no_grad()
def pareto_smooth(
    log_weights: Tensor, dim: int = 0, *, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Smooth the largest importance weights of each unit, and tell how heavy their tail is.

    .. math:: \log \tilde r_s \text{ and } \hat k \text{ as in the module docstring.}

    A unit whose tail has at most four draws (any with :math:`S \le 20`, or with constant weights),
    or whose fit fails, is returned as it came with :math:`\hat k = \infty`. All of this is without
    gradients.

    :param log_weights: log r, the draws along ``dim``, units along all other dimensions; in nats,
        with any constant offset. ``-inf`` is a weight of zero. float32 or float64.
    :param dim: the dimension of the draws.
    :param normalize: subtract the log of the sum of the smoothed weights of each unit.
    :returns: smoothed log weights (shape and offset of ``log_weights``) and k (shape of
        ``log_weights`` without ``dim``, no units).
    :raises ValueError: for NaN or ``+inf``, other dtypes, no draws, and ``normalize=True`` where
        all weights of a unit are zero.

    .. seealso:: :class:`WeightSummary`, for draws that come in chunks.

    Reference: A. Vehtari, D. Simpson, A. Gelman, Y. Yao and J. Gabry, *Pareto Smoothed Importance
    Sampling*, JMLR 25(72), 2024, arXiv:1507.02646.

    Example: weights :math:`u^{-k}` of evenly spaced :math:`u` have a Pareto tail of shape k.

    >>> u = (torch.arange(1000.0) + 0.5) / 1000
    >>> log_weights = -torch.log(u)[:, None] * torch.tensor([0.2, 0.6, 1.0])
    >>> smoothed, k = pareto_smooth(log_weights)
    >>> smoothed.shape, [round(value, 1) for value in k.tolist()]
    (torch.Size([1000, 3]), [0.2, 0.6, 0.9])
    """
    _check("log_weights", log_weights, dim)
    log_w = log_weights.movedim(dim, 0)
    top, draws = log_w.topk(min(tail_length(len(log_w)) + 1, len(log_w)), 0)
    smoothed_top, k = smooth_top(top)
    smoothed = log_w.scatter(0, draws, smoothed_top)
    if normalize:
        total = smoothed.logsumexp(0)
        if bool((total == -math.inf).any()):
            raise ValueError(
                "log_weights has units whose weights are all zero (-inf), which cannot be "
                "normalised. Leave them out, or pass normalize=False."
            )
        smoothed = smoothed - total
    return smoothed.movedim(0, dim), k


@torch.no_grad()
def effective_sample_size(log_weights: Tensor, dim: int = 0) -> Tensor:
    r"""Number of equally weighted draws that importance weights are worth.

    .. math:: \mathrm{ESS} = \Big(\sum_s r_s\Big)^2 \Big/ \sum_s r_s^2 \in [1, S].

    :param log_weights: as in :func:`pareto_smooth`.
    :param dim: the dimension of the draws.
    :returns: shape of ``log_weights`` without ``dim``, in draws; 0 where all weights are zero.
    :raises ValueError: as :func:`pareto_smooth`.

    Reference: A. Kong, *A note on importance sampling using standardized weights*, 1992.

    Example:

    >>> effective_sample_size(torch.tensor([1.0, 1.0, 2.0]).log()).item()  # 4^2 / 6
    2.66...
    """
    _check("log_weights", log_weights, dim)
    r = _relative(log_weights, log_weights.amax(dim, keepdim=True))
    return (r.sum(dim).square() / r.square().sum(dim)).nan_to_num(0.0)


class WeightSummary:
    r"""Evidence, ELBO and their diagnostics from log weights that come in chunks.

    .. math::

        \bar r = \frac{1}{S} \sum_s r_s, \qquad
        \mathrm{se}(\log \bar r) =
            \sqrt{\frac{1}{S - 1} \Big( \frac{S^{-1} \sum_s r_s^2}{\bar r^2} - 1 \Big)}, \qquad
        \mathrm{ESS} = \frac{(\sum_s r_s)^2}{\sum_s r_s^2}.

    Memory is proportional to :math:`(M + \text{chunk}) \times \text{units}`, with :math:`M` as in
    the module docstring, whatever :math:`S`. Results do not depend on the chunks, up to rounding.
    All have the shape of the units, the dtype and device of the weights, and no gradients; logs
    are in nats.

    :param num_draws: S, the number of draws to come. An integer >= 1.
    :raises ValueError: if ``num_draws`` is no such integer; from :meth:`add` for NaN or ``+inf``,
        another shape, dtype or device than before, no draws or too many; from all results until
        the last draw is in.

    .. seealso:: :func:`pareto_smooth`, for weights that fit into memory.

    Reference: A. Vehtari, D. Simpson, A. Gelman, Y. Yao and J. Gabry, *Pareto Smoothed Importance
    Sampling*, JMLR 25(72), 2024, arXiv:1507.02646.

    Example: weights :math:`e^{s z - s^2 / 2}` with normal :math:`z` have mean 1, and mean log
    :math:`-s^2 / 2`.

    >>> _ = torch.manual_seed(0)
    >>> summary = WeightSummary(num_draws=5000)
    >>> for _ in range(50):
    ...     summary.add(0.5 * torch.randn(100, 3) - 0.125)  # 3 units
    >>> bool((summary.log_mean.abs() < 4 * summary.log_mean_se).all())
    True
    >>> bool(((summary.mean_log + 0.125).abs() < 4 * summary.mean_log_se).all())
    True
    >>> summary.pareto_k.shape, bool((summary.pareto_k < 0.7).all())
    (torch.Size([3]), True)
    """

    def __init__(self, num_draws: int):
        self.num_draws = positive_int("num_draws", num_draws)
        self._log_r, self._r = _Moments(), _Moments()  # the latter relative to the largest so far
        self._top: Tensor | None = None  # the M + 1 largest log weights, in descending order
        self._rest: Tensor | None = None  # logsumexp of the other ones
        self._any_zero: Tensor | None = None

    @torch.no_grad()
    def add(self, log_w: Tensor) -> None:
        """Take in a chunk of log weights, shape (chunk, *units), in nats."""
        _check("log_w", log_w, 0)
        self._check_fits(log_w)
        if self._top is None:
            self._rest = torch.full_like(log_w[0], -math.inf)
            self._top = self._rest.expand(tail_length(self.num_draws) + 1, *log_w.shape[1:])
            self._any_zero = torch.zeros_like(log_w[0], dtype=torch.bool)

        joined = torch.cat([self._top, log_w])
        top, draws = joined.topk(len(self._top), 0)
        dropped = joined.scatter(0, draws, -math.inf)
        self._rest = torch.logaddexp(self._rest, dropped.logsumexp(0))

        self._r.rescale(_relative(self._top[0], top[0]))
        self._r.add(_relative(log_w, top[0]))
        self._top = top

        self._log_r.add(log_w)
        self._any_zero = self._any_zero | (log_w == -math.inf).any(0)

    @property
    def log_mean(self) -> Tensor:
        """log of the mean weight, the evidence estimate; ``-inf`` if all weights are zero."""
        return self._log_mean(self._complete()._top)

    @property
    def log_mean_se(self) -> Tensor:
        """Standard error of :attr:`log_mean` (delta method); NaN if S = 1 or all are zero."""
        r = self._complete()._r
        return r.standard_error() / r.mean

    @property
    def ess(self) -> Tensor:
        """Effective sample size, in draws; 0 if all weights are zero."""
        r = self._complete()._r
        return (r.count / (1.0 + r.squares / r.count / r.mean.square())).nan_to_num(0.0)

    @property
    def mean_log(self) -> Tensor:
        """Mean of the log weights, the ELBO estimate; ``-inf`` if any weight is zero."""
        return self._complete()._log_r.mean.masked_fill(self._any_zero, -math.inf)

    @property
    def mean_log_se(self) -> Tensor:
        """Standard error of :attr:`mean_log`; NaN if S = 1 or any weight is zero."""
        return self._complete()._log_r.standard_error()

    @property
    def pareto_k(self) -> Tensor:
        """Shape of the tail, as of :func:`pareto_smooth`; ``inf`` if all weights are zero."""
        return self._complete()._smoothed[1]

    @property
    def log_mean_psis(self) -> Tensor:
        """log of the mean Pareto-smoothed weight; ``-inf`` if all weights are zero."""
        return self._log_mean(self._complete()._smoothed[0])

    @functools.cached_property
    def _smoothed(self) -> tuple[Tensor, Tensor]:
        return smooth_top(self._top)

    def _log_mean(self, top: Tensor) -> Tensor:
        return torch.logaddexp(self._rest, top.logsumexp(0)) - math.log(self.num_draws)

    def _complete(self) -> WeightSummary:
        if self._r.count < self.num_draws:
            raise ValueError(
                f"WeightSummary(num_draws={self.num_draws}) has {self._r.count} draws so far. "
                "add() the others before asking for results, or give the right num_draws."
            )
        return self

    def _check_fits(self, log_w: Tensor) -> None:
        if self._r.count + len(log_w) > self.num_draws:
            raise ValueError(
                f"log_w has {len(log_w)} draws after {self._r.count}, more than "
                f"num_draws={self.num_draws} in all. Give the right num_draws."
            )
        chunks = [log_w] if self._top is None else [log_w, self._top]
        found, *known = (
            f"units of shape {tuple(t.shape[1:])}, {t.dtype} on {t.device}" for t in chunks
        )
        if known and found != known[0]:
            raise ValueError(f"log_w has {found}, the chunks before had {known[0]}.")


@dataclass
class _Moments:
    """Count, mean and sum of squared deviations of numbers that come in chunks (Chan et al.)."""

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        total, mean = self.count + len(x), x.mean(0)
        delta = mean - self.mean
        within, between = (x - mean).square().sum(0), delta * (delta * self.count * len(x) / total)
        self.squares = self.squares + within + between
        self.mean = self.mean + delta * (len(x) / total)
        self.count = total

    def rescale(self, factor: Tensor) -> None:
        self.mean, self.squares = self.mean * factor, self.squares * factor.square()

    def standard_error(self) -> Tensor:
        return (self.squares / self.count / (self.count - 1)).sqrt()


# --- the tail --------------------------------------------------------------------------------


def tail_length(num_draws: int) -> int:
    """M, the number of draws in the tail."""
    return math.ceil(min(num_draws / 5, 3 * num_draws**0.5))


def smooth_top(top: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth the M + 1 largest log weights.

    :param top: shape (M + 1, *units), in descending order: the tail and the cutoff.
    :returns: smoothed values in the same order, and k, shape (*units).
    """
    k = torch.full_like(top[0], math.inf)
    if len(top) <= 5:
        return top, k
    log_r = top - top[0]  # NaN, hence no tail, where all weights are zero
    log_u = log_r[-1].clamp(min=math.log(torch.finfo(top.dtype).tiny))
    in_tail = log_r > log_u
    size = in_tail.sum(0).to(top.dtype)
    # r - u without cancellation where all weights are nearly equal
    excess = torch.where(in_tail, -log_r.exp() * torch.expm1(log_u - log_r), 0.0)
    fit_k, sigma = fit_generalized_pareto(excess, size)
    # The prior is worth 10 draws of k = 0.5.
    fit_k = _nonzero((size * fit_k + 10 * 0.5) / (size + 10))
    fitted = (size > 4) & (sigma > 0) & (sigma < math.inf)

    rank = torch.arange(len(top), dtype=top.dtype, device=top.device) + 0.5
    log_upper = (rank.reshape(-1, *(1,) * k.dim()) / size).log()  # log(1 - p), largest first
    quantile = sigma * torch.expm1(-fit_k * log_upper) / fit_k
    log_smoothed = log_u + torch.log1p(quantile * torch.exp(-log_u))
    smoothed = top[0] + log_smoothed.clamp(max=0.0)
    return torch.where(in_tail & fitted, smoothed, top), torch.where(fitted, fit_k, k)


def fit_generalized_pareto(x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    r"""Zhang and Stephens's estimate of a generalised Pareto distribution, without prior on k.

    With :math:`b = -k / \sigma` the likelihood is profiled,
    :math:`k(b) = \frac{1}{n} \sum_j \log(1 - b x_j)`, and :math:`b` is averaged over its posterior
    on a grid of :math:`m = 30 + \lfloor \sqrt n \rfloor` points.

    :param x: shape (T, *units), in descending order, zero after the first n entries of each unit.
    :param size: n, shape (*units); for n < 5 the result means nothing.
    :returns: k and sigma (in units of x), shape (*units); not finite where the fit fails.
    """
    m = 30 + size.sqrt().floor()
    quartile = x.gather(0, (size - (size / 4 + 0.5).floor()).long()[None])[0]
    points, log_likelihood = [], []
    for i in range(1, 31 + math.isqrt(len(x))):  # one by one, so that memory stays that of x
        b = _nonzero(1 / x[0] + (1 - (m / (i - 0.5)).sqrt()) / (3 * quartile))
        k = torch.log1p(-b * x).sum(0) / size
        points.append(b)
        log_likelihood.append(torch.where(i <= m, size * (torch.log(-b / k) - k - 1), -math.inf))
    b = (torch.stack(points) * torch.stack(log_likelihood).softmax(0)).sum(0)
    k = torch.log1p(-b * x).sum(0) / size
    return k, -k / b


def _nonzero(x: Tensor) -> Tensor:
    """Zero moved by so little that f(x) / x is its limit at zero, if f(0) = 0."""
    return torch.where(x == 0, torch.finfo(x.dtype).eps, x)


def _relative(log_r: Tensor, log_largest: Tensor) -> Tensor:
    """r over the largest one, 0 if that is zero."""
    return (log_r - log_largest).exp().nan_to_num(0.0)


def _check(name: str, log_weights: Tensor, dim: int) -> None:
    if not torch.is_tensor(log_weights) or log_weights.dtype not in (torch.float32, torch.float64):
        found = log_weights.dtype if torch.is_tensor(log_weights) else type(log_weights).__name__
        raise ValueError(f"{name} must be a tensor of float32 or float64, got {found}.")
    if not -log_weights.dim() <= dim < log_weights.dim() or log_weights.shape[dim] == 0:
        raise ValueError(
            f"{name} has shape {tuple(log_weights.shape)}, which has no draws along dim {dim}."
        )
    bad = ~(log_weights < math.inf)
    if bool(bad.any()):
        index = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name} is {log_weights[index].item()} at index {index}. A log weight is finite, or "
            "-inf for a weight of zero; find the site whose log-probability is NaN or +inf."
        )
