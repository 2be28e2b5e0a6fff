r"""The log joint of the negative-binomial model as a function of log r and logit p.

.. math::
    \log p(x, r, p) + \log r + \log p (1 - p)
    = c + a \log r - b r + \sum_j n_{>j} \log (r + j)
    + \left(\alpha + \textstyle\sum_i x_i\right) \log p + (\beta + N r) \log (1 - p),

with :math:`n_{>j}` the number of counts above j, so that its cost depends on the largest count and
not on N.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .counts import check_counts, check_hyperparameters, count_exceedances

__all__ = ["LogJoint", "make_log_joint"]


@dataclass(frozen=True)
class LogJoint:
    """log p(x, r, p) as a density of (s, v) = (log r, logit p), float64."""

    exceedances: Tensor  # n_{>j}, shape (max count,)
    size: float  # N
    total: float  # sum of the counts
    constant: float  # all that depends on neither r nor p
    a: float
    b: float
    alpha: float
    beta: float

    def of_r(self, s: Tensor) -> Tensor:
        """Terms in r alone; s of shape (S,)."""
        r = s.exp()
        value = self.constant + self.a * s - self.b * r
        if len(self.exceedances):
            value = value + self.exceedances[0] * s  # j = 0, where exp(s) may underflow
        for start in range(1, len(self.exceedances), 1000):  # memory: 1000 S numbers
            n = self.exceedances[start : start + 1000]
            j = torch.arange(start, start + len(n), dtype=s.dtype, device=s.device)
            value = value + (r.unsqueeze(-1) + j).log() @ n
        return value

    def of_p(self, s: Tensor, v: Tensor) -> Tensor:
        """Terms in p: the kernel of Beta(alpha + total, beta + N r) in logit p; broadcasts."""
        first, second = self.alpha + self.total, self.beta + self.size * s.exp()
        return -first * softplus(-v) - second * softplus(v)

    def best_v(self, s: Tensor) -> Tensor:
        """The logit of p that maximises the density for given log r."""
        return math.log(self.alpha + self.total) - (self.beta + self.size * s.exp()).log()

    def profile(self, s: Tensor) -> Tensor:
        """Largest value over logit p."""
        return self.of_r(s) + self.of_p(s, self.best_v(s))

    def __call__(self, s: Tensor, v: Tensor) -> Tensor:
        """Values on the lattice s x v, shape (S, V)."""
        return self.of_r(s).unsqueeze(-1) + self.of_p(s.unsqueeze(-1), v)


def make_log_joint(x, a: float, b: float, alpha: float, beta: float) -> LogJoint:
    """The log joint of counts x, shape (N,), on their device; bad counts or priors are refused."""
    device = x.device if isinstance(x, Tensor) else None
    counts = check_counts(x)
    a, b, alpha, beta = float(a), float(b), float(alpha), float(beta)
    check_hyperparameters(a=a, b=b, alpha=alpha, beta=beta)
    log_beta = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
    constant = a * math.log(b) - math.lgamma(a) - log_beta
    constant -= float(torch.lgamma(torch.from_numpy(counts) + 1.0).sum())
    exceedances = torch.from_numpy(count_exceedances(counts)).to(device)
    return LogJoint(
        exceedances, float(counts.size), float(counts.sum()), constant, a, b, alpha, beta
    )
