r"""The nearest code of each vector, without a tensor of all differences.

.. math::

    k(z) = \arg\min_j \lVert z - e_j \rVert^2
         = \arg\min_j \Big( \tfrac12 \lVert e_j - c \rVert^2 - (z - c)^\top (e_j - c) \Big)

for any :math:`c`; with the mean of the codes, a common offset costs no precision. A block of rows
at a time is a matrix product of bounded size. Codes that its rounding cannot tell apart are decided
by the distances themselves, so equal codes and exact ties give the lowest index, as ``argmin``
would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vi_ext.has_values import has_values

__all__ = ["kmeans", "nearest_code"]

BLOCK = 2**22  # elements of a block of scores: 16 MB of float32


@torch.no_grad()
def nearest_code(z: Tensor, codebook: Tensor, block: int = BLOCK) -> Tensor:
    r"""Index of the nearest code of each vector in Euclidean distance; the lowest one of a tie.

    Time is N K D, memory a few times ``block`` elements plus the result. The index is that of
    ``argmin`` over directly computed distances, up to the rounding of these. On CUDA, and in a
    compiled step, this is so for ties of equal codes and of two codes; among more that the product
    cannot tell apart, it is one of them. A code that is NaN is the nearest, as it is to ``argmin``;
    a row that is not finite has a valid index.

    :param z: vectors, shape (..., D).
    :param codebook: codes, shape (K, D).
    :param block: number of scores in memory at once.
    :returns: int64, shape (...).

    Example:

    >>> import torch
    >>> codes = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    >>> nearest_code(torch.tensor([[1.0, 0.0], [1.5, 3.0]]), codes).tolist()
    [0, 1]
    """
    dtype = torch.promote_types(z.dtype, codebook.dtype)
    dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    codes = codebook.to(dtype)
    rows = z.to(dtype).reshape(-1, codes.shape[-1])
    finite = codes.isfinite().all(1)
    zero = torch.zeros_like(codes)
    center = torch.where(finite.unsqueeze(1), codes, zero).sum(0) / finite.sum().clamp(min=1)
    minus = torch.where(finite.unsqueeze(1), center - codes, zero).t().contiguous()
    half_squares = minus.square().sum(0) / 2
    largest = half_squares.max()
    # An infinite code is never the nearest; one that is NaN always is, so that it is not hidden.
    beyond = torch.where(codes.isnan().any(1), torch.nan, torch.inf).to(dtype)
    half_squares = torch.where(finite, half_squares, beyond)
    indices = torch.empty(len(rows), dtype=torch.long, device=rows.device)
    size = max(1, block // len(codes))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        centered = part - center
        with torch.autocast(rows.device.type, enabled=False):
            scores = torch.addmm(half_squares, centered, minus)
        smallest, argmin = scores.min(1)
        # A bound of the error of two scores: each is a sum of 2 D products.
        size_of_terms = (2 * largest * centered.square().sum(1)).sqrt() + largest
        rounding = (codes.shape[1] + 8) * torch.finfo(dtype).eps * size_of_terms
        close = scores <= (smallest + rounding).unsqueeze(1)
        if close.is_cuda or not has_values(close):  # how many there are would be waited for
            found = _first_or(argmin, close, part, codes)
        else:
            found = _nearest_of(close.nonzero(as_tuple=True), part, codes, argmin, block)
        indices[start : start + size] = found
    return indices.reshape(z.shape[:-1])


def _first_or(argmin: Tensor, close: Tensor, rows: Tensor, codes: Tensor) -> Tensor:
    """The first code that is close, unless the argmin is nearer by the distances themselves."""
    first = close.to(torch.uint8).argmax(1)
    a, b = ((rows - codes[k]).square().sum(1) for k in (first, argmin))
    return torch.where(a <= b, first, argmin)


def _nearest_of(pairs, rows: Tensor, codes: Tensor, otherwise: Tensor, block: int) -> Tensor:
    """The nearest of the codes that are paired with a row, by the distances themselves.

    :param pairs: indices of rows and of codes, two tensors of one shape (P,).
    :param otherwise: the result for rows without a pair.
    """
    i, k = pairs
    distance, step = rows.new_empty(len(i)), max(1, block // codes.shape[1])
    for part in (slice(start, start + step) for start in range(0, len(i), step)):
        distance[part] = (rows[i[part]] - codes[k[part]]).square().sum(1)
    smallest = distance.new_full((len(rows),), torch.inf).scatter_reduce(0, i, distance, "amin")
    best = distance == smallest[i]
    return otherwise.scatter_reduce(0, i[best], k[best], "amin", include_self=False)


@torch.no_grad()
def kmeans(z: Tensor, num_codes: int, num_iterations: int = 10) -> Tensor:
    """Centres of Lloyd's algorithm, started at random distinct rows; shape (num_codes, D).

    A centre without rows moves to a random row. If there are fewer rows than centres, the rest are
    copies of rows, moved by a hundredth of a standard deviation so that they can part.

    :param z: vectors, shape (N, D), N >= 1.
    """
    order = torch.randperm(len(z), device=z.device)
    rounds = -(-num_codes // len(z))
    centers = z[order.repeat(rounds)[:num_codes]].clone()
    if rounds > 1:
        spread = z.std(0, correction=0)
        centers[len(z) :] += 0.01 * spread * torch.randn_like(centers[len(z) :])
    for _ in range(num_iterations):
        indices = nearest_code(z, centers)
        counts = z.new_zeros(num_codes).index_add_(0, indices, z.new_ones(len(z)))
        sums = torch.zeros_like(centers).index_add_(0, indices, z)
        means = sums / counts.clamp(min=1).unsqueeze(1)
        other = z[torch.randint(len(z), (num_codes,), device=z.device)] if rounds == 1 else centers
        centers = torch.where((counts > 0).unsqueeze(1), means, other)
    return centers
