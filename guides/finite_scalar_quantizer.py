r"""A grid instead of a codebook (Mentzer et al. 2023, arXiv:2309.15505).

.. math::

    f(z) = \big(\lfloor L/2 \rfloor - o\big) \tanh z - o, \qquad
    z_q = \mathrm{round}(f(z_e)) / \lfloor L/2 \rfloor, \qquad
    o = \begin{cases} 0 & L \text{ odd} \\ \tfrac12 & L \text{ even} \end{cases}

in each coordinate, with its own number of levels L: odd ones give :math:`-1, \ldots, 1`, even ones
:math:`-1, \ldots, 1 - 2/L`. The index of a latent is a number with one digit for each coordinate.

(The code in the paper's appendix also shifts z, to have f(0) near 0 for even L. A bias at the end
of the encoder is as good, and without the shift the levels are those of -z_e in reverse order.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vi_ext.code_sites import Quantizer, check_vectors, straight_through
from pyro_vi_ext.objective import positive_int

from .code_statistics import CodeUsage, totals
from .code_statistics import perplexity as _perplexity

__all__ = ["FiniteScalarQuantizer"]

COUNTED = 2**20  # largest number of codes of which usage is counted
USAGE_DECAY = 0.99


class FiniteScalarQuantizer(Quantizer):
    r"""Each coordinate is bounded and rounded to one of its levels; nothing is learned.

    The gradient is straight through the rounding only,

    .. math:: \frac{\partial z_q}{\partial z_e} =
        \frac{\lfloor L/2 \rfloor - o}{\lfloor L/2 \rfloor} (1 - \tanh^2 z_e),

    and there is neither codebook nor commitment loss: :class:`~pyro_vi_ext.VQELBO` is a negative
    ELBO, with :class:`CodePrior` in the model.

    :param levels: number of levels of each coordinate, integers >= 2; D of them. The paper
        recommends at least 5, [8, 5, 5, 5] for about 2^10 codes, [8, 8, 8, 6, 5] for 2^14.
    :ivar levels: the same, a tuple.
    :raises ValueError: for levels out of range, or 2^63 codes or more.

    Reference: F. Mentzer, D. Minnen, E. Agustsson and M. Tschannen, *Finite Scalar Quantization:
    VQ-VAE Made Simple*, ICLR 2024, arXiv:2309.15505.

    Example:

    >>> import torch
    >>> from pyro_vi_ext.guides import FiniteScalarQuantizer, VectorQuantized
    >>> quantizer = FiniteScalarQuantizer([3, 2])
    >>> quantizer.codebook.tolist()
    [[-1.0, -1.0], [0.0, -1.0], [1.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    >>> q = VectorQuantized(torch.tensor([[0.1, 3.0], [-2.0, -0.5]]), quantizer)
    >>> q.mean.tolist(), q.indices.tolist()
    ([[0.0, 0.0], [-1.0, -1.0]], [4, 0])
    """

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        if not isinstance(levels, Sequence) or not levels:
            raise ValueError(f"levels must be a list of one number per coordinate, got {levels!r}.")
        self.levels = tuple(positive_int("Each of levels", number, 2) for number in levels)
        if math.prod(self.levels) >= 2**63:
            raise ValueError(f"levels must have a product below 2^63, got {levels!r}.")
        self.code_dim, self.num_codes = len(self.levels), math.prod(self.levels)
        constants = {
            "_levels": list(self.levels),
            "_basis": [math.prod(self.levels[:d]) for d in range(self.code_dim)],
            "_half": [float(number // 2) for number in self.levels],
            "_offset": [0.0 if number % 2 else 0.5 for number in self.levels],
        }
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)
        counted = self.num_codes <= COUNTED
        self.usage = CodeUsage(self.num_codes, USAGE_DECAY) if counted else None

    def extra_repr(self) -> str:
        return f"{list(self.levels)}"

    @property
    def codebook(self) -> Tensor:
        """All codes in the order of their indices, shape (num_codes, D); computed."""
        return self.decode(torch.arange(self.num_codes, device=self._levels.device))

    # From vectors to codes and back.

    def encode(self, z_e: Tensor) -> Tensor:
        """Indices, int64, shape (...), of encoder outputs, unbounded, shape (..., D)."""
        check_vectors(z_e, self)
        return self._index(self._bounded(z_e.detach()).round())

    def decode(self, indices: Tensor) -> Tensor:
        """Codes in [-1, 1], shape (..., D), of int64 indices (...); NaN for what is no index."""
        inside = (indices >= 0) & (indices < self.num_codes)
        digits = indices.unsqueeze(-1) // self._basis % self._levels
        return torch.where(inside.unsqueeze(-1), (digits - self._half) / self._half, math.nan)

    def quantize(self, z_e: Tensor) -> tuple[Tensor, Tensor]:
        """The codes of encoder outputs and their indices.

        :param z_e: encoder outputs, unbounded, shape (..., D).
        :returns: codes in [-1, 1], shape (..., D), equal to ``decode(indices)``, with the gradient
            of f(z_e), bounded but not rounded; and int64 indices, shape (...). A coordinate that is
            not finite has the code NaN.
        :raises ValueError: if the last dimension of ``z_e`` is not D.
        """
        indices = self.encode(z_e)
        return straight_through(self._bounded(z_e) / self._half, self.decode(indices)), indices

    def indices_of(self, z_q: Tensor) -> Tensor:
        """Indices, int64, shape (...), of codes in [-1, 1], shape (..., D), up to rounding.

        :raises ValueError: if a value is not on the grid.
        """
        check_vectors(z_q, self)
        steps = z_q.detach() * self._half
        eps = max(torch.finfo(dtype).eps for dtype in (z_q.dtype, self._half.dtype))
        near = (steps - steps.round()).abs() <= 8 * eps * self._half
        inside = (steps.round() >= -self._half) & (steps.round() + self._half < self._levels)
        valid = (near & inside).all(-1)
        if not bool(valid.all()):
            raise ValueError(
                f"FiniteScalarQuantizer: {z_q[~valid][0].tolist()} is not a code (levels "
                f"{list(self.levels)}, scaled to [-1, 1]). encode(z_e) takes encoder outputs; "
                "values of CodePrior are those of quantize(z_e)[0] or decode(indices)."
            )
        return self._index(steps.round())

    def _bounded(self, z_e: Tensor) -> Tensor:
        """f(z_e), shape (..., D); NaN where z_e is not finite."""
        z_e = torch.where(z_e.isfinite(), z_e, math.nan)
        return (self._half - self._offset) * z_e.tanh() - self._offset

    def _index(self, steps: Tensor) -> Tensor:
        """Mixed radix, the first coordinate fastest; some index where a step is NaN."""
        digits = (steps.nan_to_num(0.0) + self._half).long()
        return (digits * self._basis).sum(-1)

    # What the objective counts.

    @property
    def perplexity(self) -> Tensor:
        """Perplexity of the moving average of code usage, a scalar from 1 to num_codes.

        NaN before the first gradient call.

        :raises NotImplementedError: with more than 2^20 codes, which are not counted.
        """
        if self.usage is None:
            raise NotImplementedError(
                f"FiniteScalarQuantizer does not count the usage of {self.num_codes} codes (at "
                f"most {COUNTED}). Take the perplexity of each coordinate from the codes."
            )
        return _perplexity(self.usage.count)

    @torch.no_grad()
    def update(self, z_e: Tensor, indices: Tensor, weights: Tensor) -> None:
        """Move the usage of codes by one batch: indices (N,) with weights (N,), in place."""
        if self.usage is not None:
            weights = weights.to(self.usage.count.dtype)
            self.usage.update(totals(indices, weights, self.num_codes)[0])
