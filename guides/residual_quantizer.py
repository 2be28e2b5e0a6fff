r"""Several codebooks in sequence: each quantises what the ones before have left over.

.. math::

    r_1 = z_e, \qquad k_l = \arg\min_j \lVert r_l - e_{l,j} \rVert, \qquad
    r_{l+1} = r_l - e_{l,k_l}, \qquad z_q = \sum_{l=1}^L e_{l,k_l}.

Residual vector quantisation (Zeghidour et al. 2021, arXiv:2107.03312; Lee et al. 2022,
arXiv:2203.01941): L codebooks of K vectors make :math:`K^L` codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_vi_ext.code_sites import Quantizer, check_vectors
from pyro_vi_ext.objective import positive_int

from .rotation_trick import rotate
from .vector_quantizer import VectorQuantizer

__all__ = ["ResidualQuantizer"]

SEARCHED = 2**14  # combinations of indices that are compared with a value one by one
BLOCK = 2**22  # elements of a block of distances


class ResidualQuantizer(Quantizer):
    r"""L codebooks of K vectors; a code is a sum with one vector of each, found one by one.

    .. math::

        \text{codebook loss } \sum_l \lVert \mathrm{sg}[r_l] - e_{l,k_l} \rVert^2, \qquad
        \text{commitment loss } \sum_l \lVert r_l - \mathrm{sg}[e_{l,k_l}] \rVert^2,

    where the residuals are those of the module docstring, with codes held constant: each codebook
    is trained by its own residuals only. A latent has L indices, and with :class:`CodePrior` a KL
    of L log K to the uniform prior; logits have shape (..., L, K).

    Use it as :class:`VectorQuantizer`, of which the stages are instances: what is said there of
    training, of evaluation mode and of moving averages holds for each of them. All stages move
    once in a gradient call, with residuals from the codes before it; k-means starts a stage on the
    residuals of the stages before, already started.

    :param num_quantizers: L, an integer >= 1.
    :param num_codes: K, an integer >= 2: the number of vectors of each codebook.
    :param code_dim: D, an integer >= 1.
    :param ema_decay: decay of moving averages, see :class:`VectorQuantizer`; ``None`` for codebooks
        trained by gradients.
    :param rotation_trick: pass the gradient from z_q to z_e by rotation (of the sum, not of each
        stage) instead of straight through, see :mod:`.rotation_trick`.
    :param options: other keywords of :class:`VectorQuantizer`, for each stage.
    :ivar stages: the L :class:`VectorQuantizer`, an ``nn.ModuleList``.
    :raises ValueError: for arguments out of range.

    References: N. Zeghidour, A. Luebs, A. Omran, J. Skoglund and M. Tagliasacchi, *SoundStream: An
    End-to-End Neural Audio Codec*, IEEE/ACM TASLP 2021, arXiv:2107.03312. D. Lee, C. Kim, S. Kim,
    M. Cho and W.-S. Han, *Autoregressive Image Generation using Residual Quantization*, CVPR 2022,
    arXiv:2203.01941.

    Example: tens and units.

    >>> import torch
    >>> from pyro_vi_ext.guides import ResidualQuantizer, VectorQuantized
    >>> quantizer = ResidualQuantizer(2, 10, 1)
    >>> units = torch.arange(10.0).unsqueeze(1)
    >>> with torch.no_grad():
    ...     for stage, codes in zip(quantizer.stages, (10 * units, units - 5)):
    ...         _ = stage.codebook.copy_(codes)
    >>> q = VectorQuantized(torch.tensor([[36.6], [52.2]]), quantizer)
    >>> q.mean.flatten().tolist(), q.indices.tolist()
    ([37.0, 52.0], [[4, 2], [5, 7]])
    >>> round(quantizer.log_num_codes, 4)  # 2 log 10
    4.6052
    """

    def __init__(
        self,
        num_quantizers: int,
        num_codes: int,
        code_dim: int,
        ema_decay: float | None = None,
        *,
        rotation_trick: bool = False,
        **options,
    ):
        super().__init__()
        self.code_shape = (positive_int("num_quantizers", num_quantizers),)
        self.num_codes, self.code_dim = num_codes, code_dim
        self.rotation_trick = rotation_trick
        self.stages = nn.ModuleList(
            VectorQuantizer(num_codes, code_dim, ema_decay, **options)
            for _ in range(num_quantizers)
        )

    @property
    def codebook(self) -> Tensor:
        """The codebooks of all stages, shape (L, K, D); a copy, differentiable."""
        return torch.stack([stage.codebook for stage in self.stages])

    # From vectors to codes and back.

    def encode(self, z_e: Tensor) -> Tensor:
        """Indices, int64, shape (..., L), of the nearest codes of the residuals of z_e (..., D)."""
        check_vectors(z_e, self)
        residual, indices = z_e.detach(), []
        for stage in self.stages:
            indices.append(stage.encode(residual))
            residual = residual - stage.decode(indices[-1]).detach()
        return torch.stack(indices, -1)

    def decode(self, indices: Tensor) -> Tensor:
        """Sums of codes, shape (..., D), of int64 indices (..., L); differentiable in codebooks."""
        return sum(stage.decode(k) for stage, k in self._split(indices))

    def pass_gradient(self, z_e: Tensor, codes: Tensor) -> Tensor:
        return rotate(z_e, codes) if self.rotation_trick else super().pass_gradient(z_e, codes)

    @torch.no_grad()
    def indices_of(self, z_q: Tensor) -> Tensor:
        r"""Indices whose codes have these sums.

        A sum does not tell its parts: :meth:`encode` of a sum may find others, with another sum.
        Up to 2^14 combinations are compared with each value. With more of them, the indices are
        those of :meth:`encode` if their sum is the value, and an error if not; that no other
        combination has the same sum is not checked then.

        Values that :class:`VectorQuantized` and :class:`CodePrior` draw carry their indices, and
        need none of this.

        :param z_q: values, shape (..., D), that are codes up to rounding.
        :returns: int64, shape (..., L).
        :raises ValueError: if a value is no code, or the code of several combinations, or not found
            among more than 2^14.
        """
        check_vectors(z_q, self)
        rounding = self._rounding(z_q)
        few = self.num_codes ** len(self.stages) <= SEARCHED
        indices = self._search(z_q, rounding) if few else self.encode(z_q)
        found = ((self.decode(indices) - z_q).abs() <= rounding).all(-1)
        if not bool(found.all()):
            value = z_q[~found][0].tolist()
            raise ValueError(
                f"ResidualQuantizer: {value} is not a sum of one code of each stage. Values of "
                "CodePrior must be codes: quantize(z_e)[0] or decode(indices)."
                if few
                else f"ResidualQuantizer: the indices of the value {value} cannot be recovered from"
                f" it ({self.num_codes} ** {len(self.stages)} combinations). Score the very tensor "
                "that VectorQuantized or CodePrior drew, which carries its indices (a copy does "
                "not), or leave out the logits of CodePrior."
            )
        return indices

    def _rounding(self, z_q: Tensor) -> Tensor:
        """By how much a sum of codes may be off in each coordinate, a scalar."""
        eps = max(torch.finfo(dtype).eps for dtype in (z_q.dtype, self.stages[0].codebook.dtype))
        return 8 * eps * self.codebook.abs().amax((1, 2)).sum()

    def _search(self, z_q: Tensor, rounding: Tensor) -> Tensor:
        """The combinations nearest to values (..., D) in the largest difference of a coordinate."""
        choices = torch.arange(self.num_codes, device=z_q.device)
        combinations = torch.cartesian_prod(*[choices] * len(self.stages))
        combinations = combinations.reshape(-1, len(self.stages))
        sums = self.decode(combinations)
        dtype = torch.promote_types(torch.promote_types(z_q.dtype, sums.dtype), torch.float32)
        sums = sums.to(dtype)
        rows = z_q.reshape(-1, self.code_dim).to(dtype).nan_to_num(torch.inf)  # far from all
        nearest = torch.empty(len(rows), dtype=torch.long, device=rows.device)
        size = max(1, BLOCK // len(sums))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            distances, positions = torch.cdist(part, sums, p=torch.inf).topk(2, largest=False)
            best, second = distances.unbind(1)
            several = second <= torch.where(best > 0, rounding, 0.0)
            if bool(several.any()):
                raise ValueError(
                    f"ResidualQuantizer: {part[several][0].tolist()} is the sum of several "
                    "combinations of codes, and does not tell which. Score the very tensor that "
                    "VectorQuantized or CodePrior drew, which carries its indices, or leave out "
                    "the logits of CodePrior."
                )
            nearest[start : start + size] = positions[:, 0]
        return combinations[nearest].reshape(z_q.shape[:-1] + self.code_shape)

    def _split(self, indices: Tensor) -> list[tuple[VectorQuantizer, Tensor]]:
        """Each stage with its indices.

        :raises ValueError: if the last dimension of ``indices`` is not L.
        """
        if indices.dim() < 1 or indices.shape[-1:] != self.code_shape:
            raise ValueError(
                f"Expected indices of shape (..., {self.code_shape[0]}), one for each stage of the "
                f"ResidualQuantizer, found shape {tuple(indices.shape)}."
            )
        return list(zip(self.stages, indices.unbind(-1), strict=True))

    # What the objective trains.

    def _assigned(
        self, z_e: Tensor, indices: Tensor
    ) -> list[tuple[VectorQuantizer, Tensor, Tensor]]:
        """Each stage with its residuals (..., D) and indices (...), as its codes are now."""
        assigned = []
        for stage, k in self._split(indices):
            assigned.append((stage, z_e, k))
            z_e = z_e - stage.decode(k).detach()
        return assigned

    @property
    def perplexity(self) -> Tensor:
        """Perplexity of the moving average of code usage of each stage, shape (L,), from 1 to K."""
        return torch.stack([stage.perplexity for stage in self.stages])

    def penalties(self, z_e: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Codebook and commitment loss of each latent, summed over stages and D, shape (...)."""
        parts = [stage.penalties(r, k) for stage, r, k in self._assigned(z_e, indices)]
        codebook, commitment = zip(*parts, strict=True)
        return sum(codebook), sum(commitment)

    @property
    def needs_initialization(self) -> bool:
        return any(stage.needs_initialization for stage in self.stages)

    @torch.no_grad()
    def initialize(self, z_e: Tensor, weights: Tensor) -> None:
        """Start each stage at k-means centres of its residuals, of vectors (N, D), weights (N,)."""
        for stage in self.stages:
            if stage.needs_initialization:
                stage.initialize(z_e, weights)
            z_e = z_e - stage.decode(stage.encode(z_e))

    @torch.no_grad()
    def update(self, z_e: Tensor, indices: Tensor, weights: Tensor) -> None:
        """Move the statistics of each stage by its residuals, in place.

        :param z_e: encoder outputs, shape (N, D).
        :param indices: their codes, shape (N, L).
        :param weights: how often each counts, shape (N,); 0 for what is masked.
        """
        for stage, residual, k in self._assigned(z_e, indices):
            stage.update(residual, k, weights)
