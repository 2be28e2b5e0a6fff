r"""The codebook of a vector-quantised posterior (van den Oord et al. 2017, arXiv:1711.00937).

.. math::

    k = \arg\min_j \lVert z_e - e_j \rVert, \qquad
    \text{codebook loss } \lVert \mathrm{sg}[z_e] - e_k \rVert^2, \qquad
    \text{commitment loss } \lVert z_e - \mathrm{sg}[e_k] \rVert^2,

sg: no gradient. Instead of the codebook loss, codes may follow exponential moving averages of what
is assigned to them (appendix A.1 of the paper):

.. math::

    N_k \leftarrow \gamma N_k + (1 - \gamma) n_k, \qquad
    m_k \leftarrow \gamma m_k + (1 - \gamma) \sum_{i: k_i = k} z_{e,i}, \qquad
    e_k = m_k / N_k.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_vi_ext.code_sites import Quantizer, check_vectors
from pyro_vi_ext.objective import positive_int

from .code_statistics import CodeUsage, draw_rows, from_first_process, gather_rows, totals
from .code_statistics import perplexity as _perplexity
from .nearest_code import kmeans, nearest_code
from .rotation_trick import rotate

__all__ = ["VectorQuantizer"]


class VectorQuantizer(Quantizer):
    r"""A codebook of K vectors; a vector is quantised to the nearest one.

    Use it in the guide through :class:`VectorQuantized`, in the model through :class:`CodePrior`,
    and train with :class:`~pyro_vi_ext.VQELBO`, which adds the losses of the module docstring and
    drives the moving averages. Calling :meth:`quantize`, or sampling, changes nothing; nor does
    anything under ``torch.no_grad()``, or in evaluation mode (``quantizer.eval()``), in which the
    codebook has no gradient either.

    What runs by moving averages (codes with ``ema_decay``, :attr:`perplexity`, restarts) moves once
    in each gradient call of the objective. Under ``torch.distributed`` the sums run over all
    processes. All of it is in the ``state_dict``.

    :param num_codes: K, an integer >= 2.
    :param code_dim: D, an integer >= 1.
    :param ema_decay: :math:`\gamma` in [0, 1) (the paper: 0.99), or ``None`` for a codebook trained
        by gradients of the codebook loss. Averages start at zero, without a memory of the
        initial codes: at its first use a code becomes the mean of what is assigned to it. (So
        :math:`e_k` is exactly the weighted mean of past assignments; no smoothing of counts.)
    :param kmeans_init: whether the first gradient call starts the codes at k-means centres of its
        batch. Otherwise they are uniform in :math:`[-1/K, 1/K]`.
    :param restart_threshold: a code whose average number of uses in a batch falls below it moves to
        a random encoder output of the batch (as in Jukebox, arXiv:2005.00341, where it is 1).
        ``None`` for no restarts. Moments that an optimizer keeps of a code are not reset.
    :param usage_decay: decay of the counts behind :attr:`perplexity` and restarts; ``ema_decay``
        if there is one, and else 0.99.
    :param rotation_trick: pass gradients by rotation instead of straight through, see
        :mod:`.rotation_trick` (arXiv:2410.06424).
    :ivar codebook: shape (K, D): a parameter, or a buffer with ``ema_decay``.
    :raises ValueError: for arguments out of range.

    Reference: A. van den Oord, O. Vinyals and K. Kavukcuoglu, *Neural Discrete Representation
    Learning*, NeurIPS 2017, arXiv:1711.00937.

    Example: a codebook of 4 learns the corners of a square.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro.infer import SVI
    >>> from pyro_vi_ext import VQELBO
    >>> from pyro_vi_ext.guides import CodePrior, VectorQuantized, VectorQuantizer
    >>> pyro.clear_param_store(); pyro.set_rng_seed(0)
    >>> corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> x = corners.repeat(25, 1) + 0.05 * torch.randn(100, 2)
    >>> quantizer = VectorQuantizer(4, 2, ema_decay=0.9, kmeans_init=True, restart_threshold=1.0)
    >>> scale = torch.tensor(0.1)
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", CodePrior(quantizer))
    ...         pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", VectorQuantized(x, quantizer))
    >>> svi = SVI(model, guide, pyro.optim.Adam({}), VQELBO())
    >>> losses = [svi.step(x) for _ in range(20)]
    >>> sorted(quantizer.codebook.round().abs().tolist())
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    >>> round(float(quantizer.perplexity), 2)
    4.0
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        ema_decay: float | None = None,
        *,
        kmeans_init: bool = False,
        restart_threshold: float | None = None,
        usage_decay: float | None = None,
        rotation_trick: bool = False,
    ):
        super().__init__()
        self.num_codes = positive_int("num_codes", num_codes, 2)
        self.code_dim = positive_int("code_dim", code_dim)
        for name, decay in (("ema_decay", ema_decay), ("usage_decay", usage_decay)):
            if decay is not None and not 0 <= decay < 1:
                raise ValueError(f"{name} must be in [0, 1), or None; got {decay!r}.")
        if restart_threshold is not None and not 0 < restart_threshold < float("inf"):
            raise ValueError(
                "restart_threshold must be a positive number of uses per batch, or None; got "
                f"{restart_threshold!r}."
            )
        self.ema_decay, self.rotation_trick = ema_decay, rotation_trick
        self.kmeans_init, self.restart_threshold = kmeans_init, restart_threshold
        codes = (2 * torch.rand(num_codes, code_dim) - 1) / num_codes
        if ema_decay is None:
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
            self.register_buffer("code_sum", torch.zeros(num_codes, code_dim))
        decays = (usage_decay, ema_decay, 0.99)
        if None not in decays[:2] and usage_decay != ema_decay:
            raise ValueError(
                "With ema_decay the counts of codes are those of the moving averages: leave "
                f"usage_decay={usage_decay!r} out."
            )
        self.usage = CodeUsage(num_codes, next(decay for decay in decays if decay is not None))
        # N_k: as the counts of usage, but with the uses that a code is given when it restarts.
        self.register_buffer("code_count", torch.zeros(num_codes))
        self.register_buffer("_initialized", torch.tensor(not kmeans_init))
        self._read: tuple = ()

    def extra_repr(self) -> str:
        decay = "" if self.ema_decay is None else f", ema_decay={self.ema_decay}"
        return f"{self.num_codes}, {self.code_dim}{decay}"

    # From vectors to codes and back.

    def encode(self, z_e: Tensor) -> Tensor:
        """Index of the nearest code, int64, shape (...), of vectors of shape (..., D)."""
        check_vectors(z_e, self)
        return nearest_code(z_e.detach(), self.codebook.detach())

    def decode(self, indices: Tensor) -> Tensor:
        """Codes, shape (..., D), of int64 indices, shape (...); differentiable in the codebook."""
        return F.embedding(indices, self.codebook)

    def pass_gradient(self, z_e: Tensor, codes: Tensor) -> Tensor:
        return rotate(z_e, codes) if self.rotation_trick else super().pass_gradient(z_e, codes)

    # What the objective trains.

    @property
    def perplexity(self) -> Tensor:
        """Perplexity of the moving average of code usage, a scalar from 1 to K; restarts are none.

        NaN before the first gradient call. For given indices:
        ``perplexity(torch.bincount(indices, minlength=K))`` of :mod:`.code_statistics`.
        """
        return _perplexity(self.usage.count)

    def penalties(self, z_e: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Codebook and commitment loss of each latent: squared errors summed over D, shape (...).

        The first is zero with ``ema_decay``, and has no gradient in evaluation mode.
        """
        codes = self.decode(indices)
        commitment = (z_e - codes.detach()).square().sum(-1)
        if self.ema_decay is not None:
            return torch.zeros_like(commitment), commitment
        codes = codes if self.training else codes.detach()
        return (z_e.detach() - codes).square().sum(-1), commitment

    @property
    def needs_initialization(self) -> bool:
        if not self.training:
            return False
        flag = self._initialized  # read from the device when it has changed, not at every step
        if not self._read or self._read[0] is not flag or self._read[1] != flag._version:
            self._read = (flag, flag._version, bool(flag))
        return not self._read[2]

    @torch.no_grad()
    def initialize(self, z_e: Tensor, weights: Tensor) -> None:
        """Start the codes at k-means centres of vectors (N, D) with positive weights (N,)."""
        rows = gather_rows(z_e[weights > 0].to(self.codebook.dtype))
        if not len(rows) or not bool(rows.isfinite().all()):
            return  # the objective names the site
        self.codebook.copy_(from_first_process(kmeans(rows, self.num_codes)))
        self._initialized.fill_(True)

    @torch.no_grad()
    def update(self, z_e: Tensor, indices: Tensor, weights: Tensor) -> None:
        """Move usage, codes (with ``ema_decay``) and unused codes by one batch, in place.

        :param z_e: encoder outputs, shape (N, D).
        :param indices: their codes, shape (N,).
        :param weights: how often each counts, shape (N,); 0 for what is masked.
        """
        dtype = self.code_count.dtype
        z_e, weights = z_e.detach().to(dtype), weights.to(dtype)
        moving = self.ema_decay is not None
        counts, sums = totals(indices, weights, self.num_codes, z_e if moving else None)
        rate = self.usage.update(counts)
        self.code_count.lerp_(counts, rate)
        if moving:
            self.code_sum.lerp_(sums, rate)
            means = self.code_sum / self.code_count.unsqueeze(1)
            used = (counts > 0).unsqueeze(1)  # the others' means have not changed
            self.codebook.copy_(torch.where(used, means, self.codebook))
        if self.restart_threshold is not None:
            self._restart(z_e, weights, rate > 0)

    def _restart(self, z_e: Tensor, weights: Tensor, allowed: Tensor) -> None:
        """Codes that are hardly used become random vectors, and count as used often enough."""
        rows = draw_rows(z_e, weights, self.num_codes)
        enough = self.restart_threshold * self.usage.weight
        rounding = torch.finfo(enough.dtype).eps ** 0.5
        dead = (self.code_count < enough * (1 - rounding)) & allowed
        self.code_count.copy_(torch.where(dead, enough, self.code_count))
        self.codebook.copy_(torch.where(dead.unsqueeze(1), rows, self.codebook))
        if self.ema_decay is not None:
            fresh = rows * enough
            self.code_sum.copy_(torch.where(dead.unsqueeze(1), fresh, self.code_sum))
