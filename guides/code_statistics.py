r"""How often codes are used, what is assigned to them, and the sums of both over processes.

.. math::

    n_k = \sum_i w_i [k_i = k], \qquad s_k = \sum_i w_i [k_i = k]\, z_i, \qquad
    \text{perplexity} = \exp\Big(-\sum_k f_k \log f_k\Big), \quad f_k = n_k / \sum_j n_j.

Under data parallel training (``torch.distributed``) every process has a part of the batch. Sums run
over all of them, and random choices are those of the first, so that all keep the same codebook: the
one that a single process would have on the whole batch.
"""

from __future__ import annotations

import torch
import torch.distributed as distributed
from torch import Tensor, nn

__all__ = [
    "CodeUsage",
    "draw_rows",
    "from_first_process",
    "gather_rows",
    "perplexity",
    "totals",
]


def perplexity(counts: Tensor) -> Tensor:
    """Exponential of the entropy of code frequencies: from 1 to K; NaN if nothing was counted.

    :param counts: how often each code was used, shape (..., K); any positive scale.
    :returns: shape (...).

    Example:

    >>> perplexity(torch.tensor([[5.0, 5.0, 0.0], [7.0, 0.0, 0.0]])).tolist()
    [2.0, 1.0]
    """
    frequencies = counts / counts.sum(-1, keepdim=True)
    return torch.special.entr(frequencies).sum(-1).exp()


class CodeUsage(nn.Module):
    r"""Running counts of the codes: an exponential moving average over gradient calls.

    .. math:: n_k \leftarrow \gamma n_k + (1 - \gamma) n_k^{\text{batch}}

    :param num_codes: K.
    :param decay: :math:`\gamma`.
    :ivar count: shape (K,), from zero.
    :ivar weight: what the average of a constant 1 would be; ``count / weight`` is without bias.
    """

    def __init__(self, num_codes: int, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("count", torch.zeros(num_codes))
        self.register_buffer("weight", torch.zeros(()))

    @property
    def per_batch(self) -> Tensor:
        """Average number of uses of each code in a batch, shape (K,); NaN before the first."""
        return self.count / self.weight

    @torch.no_grad()
    def update(self, counts: Tensor) -> Tensor:
        """Add the counts of a batch; the rate at which it entered, 0 if it was empty."""
        rate = (1 - self.decay) * (counts.sum() > 0).to(counts.dtype)
        self.count.lerp_(counts, rate)
        self.weight.lerp_(torch.ones_like(self.weight), rate)
        return rate


def totals(indices: Tensor, weights: Tensor, num_codes: int, z: Tensor | None = None):
    """Weighted counts, shape (K,), and sums of vectors, shape (K, D), over all processes.

    :param indices: shape (N,).
    :param weights: shape (N,).
    :param z: vectors, shape (N, D), or ``None``.
    :raises ValueError: for weights in half precision, in which sums are wrong.
    """
    if torch.finfo(weights.dtype).bits < 32:
        raise ValueError(
            f"A quantizer of {weights.dtype} cannot count its codes: sums stop growing at a few "
            "hundred. Keep the quantizer in single precision, quantizer.float(); what it quantises "
            "may have another dtype."
        )
    counts = weights.new_zeros(num_codes).index_add_(0, indices, weights)
    if z is None:
        return _sum_over_processes(counts), None
    # Rows without weight may hold anything.
    weighted = torch.where(weights.unsqueeze(1) > 0, z, 0.0) * weights.unsqueeze(1)
    sums = weights.new_zeros(num_codes, z.shape[1]).index_add_(0, indices, weighted)
    both = _sum_over_processes(torch.cat([counts.unsqueeze(1), sums], 1))
    return both[:, 0], both[:, 1:]


def draw_rows(z: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """Random rows, with replacement, in proportion to their weights, out of all processes'.

    :returns: shape (num_rows, D), the same in every process.
    """
    cumulative = weights.cumsum(0)
    mine = cumulative[-1:] if len(weights) else weights.new_zeros(1)
    all_of_them = _gather(mine)
    uniform = torch.rand(num_rows, device=z.device, dtype=weights.dtype)
    position = from_first_process(uniform) * sum(all_of_them)
    start = sum(all_of_them[: _rank()], torch.zeros_like(mine))
    inside = (position >= start) & (position < start + mine)  # of one process, despite rounding
    if not len(z):
        return _sum_over_processes(z.new_zeros(num_rows, z.shape[1]))
    last = torch.searchsorted(cumulative, mine)  # of positive weight
    row = torch.searchsorted(cumulative, position - start, right=True).minimum(last)
    return _sum_over_processes(torch.where(inside.unsqueeze(1), z[row], 0.0))


def gather_rows(z: Tensor) -> Tensor:
    """The rows of all processes, in their order."""
    if not _parallel():
        return z
    parts: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, z.cpu())
    return torch.cat([part.to(z.device) for part in parts])


def _parallel() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _rank() -> int:
    return distributed.get_rank() if _parallel() else 0


def _sum_over_processes(tensor: Tensor) -> Tensor:
    if _parallel():
        distributed.all_reduce(tensor)
    return tensor


def _gather(tensor: Tensor) -> list[Tensor]:
    if not _parallel():
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor)
    return parts


def from_first_process(tensor: Tensor) -> Tensor:
    """The value that the tensor has in the first process, in place."""
    if _parallel():
        distributed.broadcast(tensor, 0)
    return tensor
