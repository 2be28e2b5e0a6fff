r"""Distributions of sequences by the chain rule, with a causal transformer (arXiv:1706.03762).

.. math:: p(s_1, \ldots, s_T \mid c) = \prod_{t=1}^T p(s_t \mid s_{<t}, c)

for tokens :math:`s_t \in \{0, \ldots, K - 1\}` and a context c. A masked attention (Vaswani et al.
2017) gives all T factors of a given sequence in one pass; drawing a sequence takes T passes.

It is a prior over grids of codes (:mod:`.code_prior`), and a decoder of binary images that is
strong enough to do without the context (Chen et al. 2017, arXiv:1611.02731).
"""

from __future__ import annotations

import math

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Categorical, constraints

from pyro_vi_ext.code_sites import expanded
from pyro_vi_ext.objective import positive_int

__all__ = ["Autoregressive", "CausalTransformer"]


class Autoregressive(TorchDistribution):
    r"""A distribution of T tokens whose every factor sees the tokens before it.

    .. math:: \log p(s \mid c) = \sum_{t=1}^T \log p(s_t \mid s_{<t}, c)

    The batch shape is that of the context, event shape (T,). Tokens are whole numbers from 0 to
    K - 1, of an integer or a floating-point dtype. The gradient reaches the network and the
    context. Along dimensions in which values and context are only expanded, as codes are among
    particles, the network runs once.

    Args:
        network: a :class:`CausalTransformer`, or any module with its attributes.
        context: c, shape (..., \*network.context_shape); None if the network takes none.
        dtype: type of draws: ``torch.long`` for indices, that of the data for binary images.

    Raises:
        ValueError: if the context is not what the network takes; from `log_prob`, if values are
            not sequences of T tokens, or (while validation is on) not whole numbers in range.

    References:
        Vaswani et al. 2017, Attention is all you need, arXiv:1706.03762.

    Example: a decoder of images with 3 pixels; 2 data, 5 particles.
        >>> import pyro
        >>> pyro.set_rng_seed(0)
        >>> network = CausalTransformer(2, 3, width=8, context_dim=4)
        >>> z, x = torch.randn(5, 2, 4), torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
        >>> p = Autoregressive(network, z, dtype=z.dtype)
        >>> p.batch_shape, p.event_shape, p.log_prob(x).shape
        (torch.Size([5, 2]), torch.Size([3]), torch.Size([5, 2]))
        >>> states = torch.cartesian_prod(*3 * [torch.arange(2)]).reshape(8, 1, 1, 3)
        >>> total = p.log_prob(states).exp().sum(0)
        >>> bool(torch.allclose(total, torch.ones(5, 2)))
        True
        >>> p.sample().shape, p.sample().dtype
        (torch.Size([5, 2, 3]), torch.float32)
    """

    arg_constraints = {}

    def __init__(
        self,
        network: CausalTransformer,
        context: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.long,
        validate_args=None,
    ):
        self.network, self.context, self.dtype = network, context, dtype
        batch_shape = _context_batch(network, context)
        super().__init__(batch_shape, torch.Size([network.length]), validate_args=validate_args)

    @property
    def support(self):
        return constraints.independent(
            constraints.integer_interval(0, self.network.num_values - 1), 1
        )

    def expand(self, batch_shape, _instance=None):
        return expanded(self, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if value.dim() < 1 or value.shape[-1:] != self.event_shape:
            raise ValueError(
                f"Autoregressive: expected sequences of {self.network.length} tokens in the last "
                f"dimension, found shape {tuple(value.shape)}; flatten grids."
            )
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value, context = _once(value, 1), self.context
        if self._validate_args:
            self._check_range(value)
        if context is not None:
            context = _once(context, len(self.network.context_shape))
        tokens = value.long()
        log_p = self.network(tokens, context).log_softmax(-1)
        tokens = tokens.unsqueeze(-1).expand(log_p.shape[:-1] + (1,))
        return log_p.gather(-1, tokens).squeeze(-1).sum(-1).expand(shape)

    @torch.no_grad()
    def sample(self, sample_shape=()) -> Tensor:
        """Draws, shape (\\*sample_shape, \\*batch_shape, T), by T passes; without gradient."""
        shape = self._extended_shape(torch.Size(sample_shape))
        device = next(self.network.parameters()).device
        tokens = torch.zeros(shape, dtype=torch.long, device=device)
        for t in range(shape[-1]):
            logits = self.network(tokens[..., : t + 1], self.context)[..., -1, :]
            tokens[..., t] = Categorical(logits=logits).sample()
        return tokens.to(self.dtype)

    def _check_range(self, value: Tensor) -> None:
        last = self.network.num_values - 1
        bad = ~((value >= 0) & (value <= last) & (value == value.long()))  # NaN is bad too
        if bad.any():
            first = bad.nonzero()[0].tolist()
            raise ValueError(
                f"Autoregressive: expected whole numbers from 0 to {last}, found "
                f"{value[tuple(first)].item():g} at position {first} ({int(bad.sum())} of "
                f"{bad.numel()} values are not such)."
            )


class CausalTransformer(nn.Module):
    r"""Logits of each token given those before it: a transformer with causal attention.

    .. math:: \text{logits}_t = f\big(b, s_1, \ldots, s_{t-1};\, c\big)

    Position t sees the embedding of token t - 1 (the first, a learned start b) plus a learned
    embedding of the position, plus a linear map of the context. A context may differ between
    positions: token t then depends on its context at positions 1 to t, and on no later one.

    Args:
        num_values: K, the number of values of a token.
        length: T, the number of tokens.
        width: of the embeddings; hidden layers have 4 times as much.
        num_layers: number of blocks of attention and hidden layer.
        num_heads: number of heads of attention, a divisor of `width`.
        context_dim: C, the dimension of contexts; 0 for none.
        context_per_position: whether a context has shape (..., T, C) rather than (..., C).

    Attributes:
        context_shape: shape of a context without batch dimensions; ``()`` if there is none.

    Raises:
        ValueError: for arguments out of range; on a call, if tokens or context have another shape.

    References:
        Vaswani et al. 2017, Attention is all you need, arXiv:1706.03762.

    Example:
        >>> import pyro
        >>> pyro.set_rng_seed(0)
        >>> network = CausalTransformer(5, 4, width=8)
        >>> tokens = torch.tensor([[3, 1, 4, 1], [3, 1, 0, 2]])
        >>> logits = network(tokens)
        >>> logits.shape
        torch.Size([2, 4, 5])
        >>> same = (logits[0] == logits[1]).all(-1)  # up to and with the third token's
        >>> same.tolist()
        [True, True, True, False]
    """

    def __init__(
        self,
        num_values: int,
        length: int,
        *,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        context_dim: int = 0,
        context_per_position: bool = False,
    ):
        super().__init__()
        self.num_values = positive_int("num_values", num_values, 2)
        self.length = positive_int("length", length)
        positive_int("width", width)
        positive_int("num_layers", num_layers)
        positive_int("context_dim", context_dim, 0)
        if width % positive_int("num_heads", num_heads):
            raise ValueError(f"num_heads={num_heads} does not divide width={width}.")
        if context_per_position and not context_dim:
            raise ValueError("context_per_position needs context_dim >= 1, found 0.")
        tail = (length, context_dim) if context_per_position else (context_dim,)
        self.context_shape = tail if context_dim else ()
        self.embedding = nn.Embedding(num_values, width)
        self.start = nn.Parameter(torch.randn(width))
        self.positions = nn.Parameter(torch.randn(length, width))
        self.context_map = nn.Linear(context_dim, width, bias=False) if context_dim else None
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                *(width, num_heads, 4 * width),
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(num_layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_values))

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Logits, shape (..., t, K), of the first t tokens.

        Args:
            tokens: int64, shape (..., t), 1 <= t <= T; the last one is not read.
            context: shape (..., \*context_shape). Batch dimensions broadcast with those of tokens.
        """
        _context_batch(self, context)
        steps = tokens.shape[-1] if tokens.dim() else 0
        if not 1 <= steps <= self.length:
            raise ValueError(
                f"CausalTransformer: expected 1 to {self.length} tokens in the last dimension, "
                f"found shape {tuple(tokens.shape)}."
            )
        start = self.start.expand(tokens.shape[:-1] + (1, -1))
        h = torch.cat([start, self.embedding(tokens[..., :-1])], -2) + self.positions[:steps]
        if context is not None:
            shift = self.context_map(context)
            h = h + (shift[..., :steps, :] if len(self.context_shape) == 2 else shift[..., None, :])
        batch = h.shape[:-2]
        mask = nn.Transformer.generate_square_subsequent_mask(steps, device=h.device, dtype=h.dtype)
        h = h.reshape(math.prod(batch), *h.shape[-2:])
        for layer in self.layers:
            h = layer(h, src_mask=mask, is_causal=True)
        return self.head(h).reshape(batch + (steps, self.num_values))


# --- helpers -------------------------------------------------------------------------------------


def _context_batch(network: CausalTransformer, context: Tensor | None) -> torch.Size:
    """The batch shape of a context; ValueError if it is not one that the network takes."""
    tail = network.context_shape
    if context is None and not tail:
        return torch.Size()
    if context is None or not tail or context.shape[-len(tail) :] != tail:
        found = "none" if context is None else f"shape {tuple(context.shape)}"
        needs = f"a context of shape (..., {', '.join(map(str, tail))})" if tail else "no context"
        raise ValueError(
            f"The network takes {needs}, found {found}. Its arguments context_dim and "
            "context_per_position say which."
        )
    return context.shape[: -len(tail)]


def _once(tensor: Tensor, event_dims: int) -> Tensor:
    """One entry along each batch dimension in which a tensor is expanded from one."""
    for dim in range(tensor.dim() - event_dims):
        if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
