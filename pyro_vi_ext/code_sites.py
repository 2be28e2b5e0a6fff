r"""Sites whose values are codes: what a guide samples, what a model samples, and what makes them.

.. math::

    q(z = e_k \mid x) = 1 \text{ for } k = \arg\min_j \lVert z_e(x) - e_j \rVert, \qquad
    p(z = e_k) = \pi_k, \qquad
    \mathrm{KL} = -\log \pi_k \;(= \log \text{num\_codes if } \pi \text{ is uniform}).

A vector-quantised posterior (van den Oord, Vinyals and Kavukcuoglu 2017, arXiv:1711.00937) puts all
its mass on one code; with an explicit prior over codes it has an ELBO like any other.
"""

from __future__ import annotations

import copy
import itertools
import math

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import Independent, constraints
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["CodePrior", "Quantizer", "VectorQuantized", "code_site", "codes_of"]


ENUMERATED = 2**20  # most codes that are enumerated


class Quantizer(nn.Module):
    r"""What turns vectors into codes: the interface of the quantisers of ``pyro_vi_ext.guides``.

    A latent has one index, or an array of indices of shape ``code_shape`` (one for each codebook of
    a residual quantiser). Every index is in 0, ..., ``num_codes`` - 1, all combinations are codes.

    :ivar num_codes: number of values of an index.
    :ivar code_dim: D, the dimension of codes.
    :ivar code_shape: shape of the indices of one latent; ``()`` for a single index.
    """

    num_codes: int
    code_dim: int
    code_shape: tuple[int, ...] = ()

    @property
    def log_num_codes(self) -> float:
        """Logarithm of the number of codes of one latent: the KL to a uniform prior, nats."""
        return math.prod(self.code_shape) * math.log(self.num_codes)

    def encode(self, z_e: Tensor) -> Tensor:
        """Indices, shape (..., \\*code_shape), of the codes of encoder outputs, shape (..., D)."""
        raise NotImplementedError

    def decode(self, indices: Tensor) -> Tensor:
        """Codes, shape (..., D), from their indices, shape (..., \\*code_shape)."""
        raise NotImplementedError

    def quantize(self, z_e: Tensor) -> tuple[Tensor, Tensor]:
        r"""The codes of encoder outputs and their indices.

        :param z_e: encoder outputs, shape (..., D).
        :returns: codes, shape (..., D), equal to ``decode(indices)``, whose gradient passes to
            ``z_e`` only, by :meth:`pass_gradient`; and int64 indices, shape (..., \*code_shape).
            Where ``z_e`` is not finite, the code is NaN.
        :raises ValueError: if the last dimension of ``z_e`` is not D.
        """
        indices = self.encode(z_e)
        with torch.no_grad():
            codes = self.decode(indices)
        return self.pass_gradient(z_e, codes), indices

    def pass_gradient(self, z_e: Tensor, codes: Tensor) -> Tensor:
        """The value of the codes, with a gradient to ``z_e``: straight through."""
        return straight_through(z_e, codes)

    def indices_of(self, z_q: Tensor) -> Tensor:
        """Indices of values, shape (..., D), that are codes (up to rounding)."""
        return self.encode(z_q)

    # What VQELBO asks for.

    def penalties(self, z_e: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Codebook loss and commitment loss of each latent, shapes (...); zero by default."""
        zero = z_e.new_zeros(z_e.shape[:-1])
        return zero, zero

    @property
    def needs_initialization(self) -> bool:
        """Whether :meth:`initialize` is to be called with the first batch."""
        return False

    def initialize(self, z_e: Tensor, weights: Tensor) -> None:
        """Set the codes from vectors (N, D) with weights (N,), in place."""

    def update(self, z_e: Tensor, indices: Tensor, weights: Tensor) -> None:
        """Move running statistics, in place.

        :param z_e: encoder outputs, shape (N, D).
        :param indices: their indices, shape (N, \\*code_shape).
        :param weights: how often each counts, shape (N,).
        """


class VectorQuantized(TorchDistribution):
    r"""All mass on the code of an encoder's output: the site of a vector-quantised guide.

    .. math:: z = e_k, \qquad \frac{\partial z}{\partial z_e} = I
        \text{ (straight through)}, \qquad \log q(z) = 0.

    The value is exactly a code; the quantiser decides how the gradient passes. The mass of the
    value is not compared with the code again, since rounding would make it zero: ``log_prob`` is 0
    for every value. The search for codes is done once, however often the site is expanded.

    Its counterpart in the model is :class:`CodePrior`. Train with
    :class:`~pyro_vi_ext.VQELBO`: other objectives accept the site, but nothing in them trains the
    codebook. As q has no mass elsewhere, importance weights cannot reach other codes:
    ``log_evidence`` of such a guide is its ELBO, a valid lower bound, however many particles.

    :param z_e: encoder outputs, shape (..., D); batch shape is (...), event shape (D,).
    :param quantizer: a :class:`Quantizer` with ``code_dim`` D.
    :ivar z_q: codes with their gradient, shape (..., D), not expanded.
    :ivar indices: their indices, shape (..., \*code_shape), not expanded.
    :raises ValueError: if the last dimension of ``z_e`` is not ``code_dim``; for NaN, while Pyro's
        validation is on (otherwise the value is NaN too).

    Reference: A. van den Oord, O. Vinyals and K. Kavukcuoglu, *Neural Discrete Representation
    Learning*, NeurIPS 2017, arXiv:1711.00937.

    Example:

    >>> import torch
    >>> from pyro_vi_ext.guides import VectorQuantized, VectorQuantizer
    >>> quantizer = VectorQuantizer(2, 1)
    >>> with torch.no_grad():
    ...     _ = quantizer.codebook.copy_(torch.tensor([[-1.0], [1.0]]))
    >>> z_e = torch.tensor([[0.3], [-0.2]], requires_grad=True)
    >>> q = VectorQuantized(z_e, quantizer)
    >>> z = q.rsample()
    >>> z.flatten().tolist(), q.indices.tolist(), q.log_prob(z).tolist()
    ([1.0, -1.0], [1, 0], [0.0, 0.0])
    >>> torch.autograd.grad(z.sum(), z_e)[0].flatten().tolist()
    [1.0, 1.0]
    """

    arg_constraints = {"z_e": constraints.real_vector}
    has_rsample = True

    def __init__(self, z_e: Tensor, quantizer: Quantizer, validate_args=None):
        check_quantizer(quantizer)
        check_vectors(z_e, quantizer)
        self.z_e, self.quantizer = z_e, quantizer
        self.z_q, self.indices = quantizer.quantize(z_e)
        super().__init__(z_e.shape[:-1], z_e.shape[-1:], validate_args=validate_args)

    @property
    def support(self):
        return _Codes()

    @property
    def mean(self) -> Tensor:
        return self.z_q.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.mean)

    def expand(self, batch_shape, _instance=None):
        return expanded(self, batch_shape)

    def rsample(self, sample_shape=()) -> Tensor:
        batch_shape = torch.Size(sample_shape) + self.batch_shape
        # A view made without gradients would still say that it requires one.
        z_q = self.z_q if torch.is_grad_enabled() else self.z_q.detach()
        value = z_q.expand(batch_shape + self.event_shape)
        indices = self.indices.expand(batch_shape + self.quantizer.code_shape)
        remember_codes(value, self.quantizer, indices)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self.z_q.new_zeros(shape)

    def entropy(self) -> Tensor:
        return self.z_q.new_zeros(self.batch_shape)


class CodePrior(TorchDistribution):
    r"""A categorical distribution over codes: the site of a model, for a vector-quantised guide.

    .. math:: p(z = e_k) = \pi_k, \qquad \pi = \mathrm{softmax}(\mathrm{logits}),
        \quad \text{or } \pi_k = 1 / \text{num\_codes}.

    A value is scored at its code: at the indices with which :class:`VectorQuantized` drew it, or at
    those of the code that it is (of a :class:`VectorQuantizer`, the nearest). No gradient passes
    from the score to the value or to the codebook; logits have theirs. With several indices for a
    latent (``code_shape``), they are independent.

    Draws are codes, without gradient. The site can be enumerated (``infer={"enumerate":
    "parallel"}`` with ``TraceEnum_ELBO``), which gives the exact evidence of a small codebook.

    :param quantizer: the quantiser of the guide.
    :param logits: shape (..., \*code_shape, num_codes), or ``None`` for a uniform prior. Batch
        shape is (...), event shape (D,); make a grid with ``.expand([H, W]).to_event(2)``.
    :raises ValueError: if logits have another shape.

    Example: the 4 x 4 codes of each of ten data.

    >>> import pyro, torch
    >>> from pyro_vi_ext.guides import CodePrior, VectorQuantizer
    >>> quantizer = VectorQuantizer(8, 3)
    >>> with pyro.plate("data", 10):
    ...     z = pyro.sample("z", CodePrior(quantizer).expand([4, 4]).to_event(2))
    >>> z.shape
    torch.Size([10, 4, 4, 3])
    >>> prior = CodePrior(quantizer, logits=torch.arange(8.0))
    >>> float(prior.log_prob(quantizer.codebook).exp().sum().round(decimals=4))
    1.0
    """

    arg_constraints = {}
    has_enumerate_support = True

    def __init__(self, quantizer: Quantizer, logits: Tensor | None = None, validate_args=None):
        check_quantizer(quantizer)
        self.quantizer, self.logits = quantizer, logits
        batch_shape = torch.Size()
        if logits is not None:
            tail = (*quantizer.code_shape, quantizer.num_codes)
            if logits.shape[-len(tail) :] != tail:
                raise ValueError(
                    f"CodePrior needs logits of shape (..., {', '.join(map(str, tail))}), one for "
                    f"each code of the quantizer, found {tuple(logits.shape)}."
                )
            batch_shape = logits.shape[: -len(tail)]
        event_shape = torch.Size([quantizer.code_dim])
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def support(self):
        return _Codes()

    def expand(self, batch_shape, _instance=None):
        return expanded(self, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        check_vectors(value, self.quantizer)
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        if self.logits is None:
            return value.new_full(shape, -self.quantizer.log_num_codes)
        indices = codes_of(value, self.quantizer)
        log_probs = self.logits.log_softmax(-1)
        indices, log_probs = torch.broadcast_tensors(indices.unsqueeze(-1), log_probs)
        scores = log_probs.gather(-1, indices[..., :1]).squeeze(-1)
        return sum_rightmost(scores, len(self.quantizer.code_shape)).expand(shape)

    def sample(self, sample_shape=()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape + self.quantizer.code_shape
        num_codes = self.quantizer.num_codes
        with torch.no_grad():
            if self.logits is None:
                indices = torch.randint(num_codes, shape, device=self._zero().device)
            else:
                logits = self.logits.expand(shape + (num_codes,))
                indices = torch.distributions.Categorical(logits=logits).sample()
            value = self.quantizer.decode(indices)
        remember_codes(value, self.quantizer, indices)
        return value

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All codes, shape (number of codes, \\*batch_shape or ones, D).

        :raises NotImplementedError: with logits, if a code does not tell its indices (two are
            equal): its value would be scored with the logits of others.
        """
        with torch.no_grad():
            num_indices = math.prod(self.quantizer.code_shape)
            if self.quantizer.num_codes**num_indices > ENUMERATED:
                raise NotImplementedError(
                    f"CodePrior has {self.quantizer.num_codes}^{num_indices} codes, too many to be "
                    f"enumerated (at most {ENUMERATED})."
                )
            rows = itertools.product(range(self.quantizer.num_codes), repeat=num_indices)
            rows = torch.tensor(list(rows), device=self._zero().device)
            indices = rows.reshape((-1,) + self.quantizer.code_shape)
            codes = self.quantizer.decode(indices)
            if self.logits is not None and not self.quantizer.indices_of(codes).equal(indices):
                raise NotImplementedError(
                    "CodePrior with logits cannot be enumerated: codes of the "
                    f"{type(self.quantizer).__name__} are equal, or are not nearest to themselves, "
                    "so that a value does not tell its logit. Move the codes apart, or enumerate "
                    "indices: quantizer.decode(pyro.sample('k', dist.Categorical(logits=...)))."
                )
        ones = (1,) * len(self.batch_shape)
        codes = codes.reshape((len(codes),) + ones + self.event_shape)
        return codes.expand((-1,) + self.batch_shape + (-1,)) if expand else codes

    def _zero(self) -> Tensor:
        """The first indices, on the device of the quantiser."""
        state = itertools.chain(self.quantizer.parameters(), self.quantizer.buffers())
        device = next((tensor.device for tensor in state), None)
        return torch.zeros(self.quantizer.code_shape, dtype=torch.long, device=device)


# Values drawn as codes -> quantiser and indices, for as long as they live. Not an attribute of the
# value, which would be saved to disk with it.
_drawn = WeakTensorKeyDictionary()


def remember_codes(value: Tensor, quantizer: Quantizer, indices: Tensor) -> None:
    """Note the indices (..., \\*code_shape) of a value, for :func:`codes_of`."""
    _drawn[value] = (quantizer, indices, _version(value))


def codes_of(value: Tensor, quantizer: Quantizer) -> Tensor:
    """Indices of a value, (..., \\*code_shape): those it was drawn with, or of the nearest code."""
    drawn, indices, version = _drawn.get(value, (None, None, None))
    if drawn is quantizer and version == _version(value):  # not written to since
        return indices
    with torch.no_grad():
        return quantizer.indices_of(value.detach())


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def code_site(fn):
    """The distribution over codes inside ``.to_event()`` and ``.mask()``, or ``None``."""
    while not hasattr(fn, "quantizer"):
        if not hasattr(fn, "base_dist"):
            return None
        fn = fn.base_dist
    return fn


def code_event_dims(fn) -> int:
    """Batch dimensions of the distribution over codes that ``.to_event()`` has claimed."""
    claimed = 0
    while not hasattr(fn, "quantizer"):
        if isinstance(fn, Independent):
            claimed += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    return claimed


def straight_through(z_e: Tensor, z_q: Tensor) -> Tensor:
    """The value of ``z_q``, exactly, with the gradient of ``z_e``; NaN where z_e is not finite."""
    return z_q.detach() + (z_e - z_e.detach())


def check_quantizer(quantizer) -> None:
    """:raises ValueError: if it is none."""
    if not isinstance(quantizer, Quantizer):
        raise ValueError(
            "quantizer must be a quantizer of pyro_vi_ext.guides, such as a VectorQuantizer, got "
            f"{type(quantizer).__name__}."
        )


def expanded(fn, batch_shape):
    """A copy of a distribution whose values do not depend on its batch shape, with another one."""
    new = copy.copy(fn)
    new._batch_shape = torch.Size(batch_shape)
    return new


def check_vectors(z: Tensor, quantizer: Quantizer) -> None:
    """:raises ValueError: if the last dimension of z is not that of the codes."""
    if not torch.is_tensor(z) or z.dim() < 1 or z.shape[-1] != quantizer.code_dim:
        raise ValueError(
            f"Expected vectors of shape (..., {quantizer.code_dim}), the code_dim of the "
            f"{type(quantizer).__name__}, found {_shape(z)}. Put channels last: "
            "z_e.movedim(1, -1) for the output of a convolution."
        )


def _shape(z) -> str:
    return f"shape {tuple(z.shape)}" if torch.is_tensor(z) else f"a {type(z).__name__}"


class _Codes(constraints.Constraint):
    """The codes of a quantiser: discrete, so that no automatic guide puts a density there."""

    is_discrete = True
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value == value).all(-1)
