r"""Continuous relaxations of discrete distributions: H(z), z, and z given b.

A discrete draw is the image :math:`b = H(z)` of a continuous one, whose path can be differentiated.
Let :math:`\ell` be the logits (normalised, for categories), :math:`\sigma` the logistic function.

.. math::

    \text{Bernoulli:}\quad & z = \ell + \epsilon, & H(z) &= 1[z > 0], &
        z \mid b &= s \, \mathrm{softplus}(\epsilon + \mathrm{softplus}(s \ell)), \; s = 2b - 1 \\
    \text{categories:}\quad & z_i = \ell_i - \log E_i, & H(z) &= \arg\max_i z_i, &
        z_i \mid b &= -\log (E_b + 1[i \ne b] \, E_i e^{-\ell_i})

with :math:`\epsilon` logistic and :math:`E_i` exponential noise. The second formula is the law of
the first given :math:`H(z) = b` (Tucker et al. 2017, arXiv:1703.07370, appendix), and stays exact
in single precision. ``relax`` maps z into the interval or simplex at a temperature, where
:math:`H` is the limit of temperature zero (Maddison et al. 2017, arXiv:1611.00712).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
    TorchDistribution,
)
from torch.distributions import Independent, constraints

__all__ = ["BERNOULLI", "CATEGORICAL", "ONE_HOT", "LinearDensity", "Relaxation", "relaxation_of"]


class Relaxation:
    """What the estimators need to know of a discrete distribution.

    Tensors have the shape of the logits: (\\*batch, \\*event), and a last dimension of categories
    for :data:`ONE_HOT` and :data:`CATEGORICAL`.

    :cvar name: the distribution.
    :cvar event_dim: dimensions of one variable: 0, or 1 for categories.
    :cvar relaxes_value: whether a relaxed value can take the place of a hard one.
    """

    name = ""
    event_dim = 0
    relaxes_value = True

    def noise(self, logits: torch.Tensor) -> torch.Tensor:
        """What z is made of: logistic, or the logarithm of exponential, noise."""
        raise NotImplementedError

    def sample(self, logits, noise) -> torch.Tensor:
        """z, in logit space; its gradient is that of the path."""
        raise NotImplementedError

    def given(self, logits, b, noise) -> torch.Tensor:
        """z given b; its gradient is that of the path at fixed b."""
        raise NotImplementedError

    def hard(self, z) -> torch.Tensor:
        """H(z), as the distribution's own values."""
        raise NotImplementedError

    def relax(self, z, temperature) -> torch.Tensor:
        """z in the unit interval, or in the simplex."""
        raise NotImplementedError

    def linear_log_prob(self, logits, value) -> torch.Tensor:
        r""":math:`\sum_i v_i \log p_i`: the log-probability of hard values, linear in between.

        Event dimensions of the variable are summed out.
        """
        raise NotImplementedError

    def mean(self, logits) -> torch.Tensor:
        """The mean of the (one-hot) variable."""
        raise NotImplementedError

    def encode(self, b, logits) -> torch.Tensor:
        """Values of the distribution as vectors of the logits' shape."""
        return b


class _Bernoulli(Relaxation):
    name = "Bernoulli"

    def noise(self, logits):
        u = torch.rand_like(logits)
        tiny = torch.finfo(u.dtype).tiny
        return u.clamp(min=tiny).log() - (-u).log1p()

    def sample(self, logits, noise):
        return logits + noise

    def given(self, logits, b, noise):
        sign = 2 * b - 1
        size = F.softplus(noise + F.softplus(sign * logits))
        return sign * size.clamp(min=torch.finfo(size.dtype).tiny)

    def hard(self, z):
        return (z > 0).to(z.dtype)

    def relax(self, z, temperature):
        return torch.sigmoid(z / temperature)

    def linear_log_prob(self, logits, value):
        return value * F.logsigmoid(logits) + (1 - value) * F.logsigmoid(-logits)

    def mean(self, logits):
        return torch.sigmoid(logits)


class _Categories(Relaxation):
    event_dim = 1

    def noise(self, logits):
        exponential = torch.empty_like(logits).exponential_()
        return exponential.clamp(min=torch.finfo(logits.dtype).tiny).log()

    def sample(self, logits, noise):
        return logits - noise

    def given(self, logits, b, noise):
        hot = self.encode(b, logits)
        top = (hot * noise).sum(-1, keepdim=True)  # log E_b
        return torch.where(hot > 0.5, -top, -torch.logaddexp(noise - logits, top))

    def relax(self, z, temperature):
        return torch.softmax(z / temperature, -1)

    def mean(self, logits):
        return torch.softmax(logits, -1)


class _OneHot(_Categories):
    name = "OneHotCategorical"

    def hard(self, z):
        return F.one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype)

    def linear_log_prob(self, logits, value):
        return torch.where(value == 0, torch.zeros_like(value), value * logits).sum(-1)


class _Categorical(_Categories):
    name = "Categorical"
    relaxes_value = False  # an index is not a number

    def hard(self, z):
        return z.argmax(-1)

    def linear_log_prob(self, logits, value):
        return (self.encode(value, logits) * logits).sum(-1)

    def encode(self, b, logits):
        return F.one_hot(b.long(), logits.shape[-1]).to(logits.dtype)


BERNOULLI, ONE_HOT, CATEGORICAL = _Bernoulli(), _OneHot(), _Categorical()


def relaxation_of(fn) -> tuple[Relaxation | None, torch.Tensor | None]:
    """The relaxation of a (wrapped) distribution and its logits; ``(None, None)`` if it has none.

    :returns: logits of shape ``batch_shape + event_shape``, for integer categories with one more
        dimension on the right; normalised for categories.
    """
    base = fn
    while isinstance(base, Independent | MaskedDistribution | ExpandedDistribution):
        base = base.base_dist  # not of any other wrapper: a zero-inflated Bernoulli is not one
    shape = fn.batch_shape + fn.event_shape
    if isinstance(base, torch.distributions.Bernoulli):
        return BERNOULLI, base.logits.expand(shape)
    if getattr(base, "has_rsample", False):  # already relaxed, or straight-through
        return None, None
    if isinstance(base, torch.distributions.OneHotCategorical):
        return ONE_HOT, _finite(base.logits).expand(shape)
    if isinstance(base, torch.distributions.Categorical):
        return CATEGORICAL, _finite(base.logits).expand(shape + base.logits.shape[-1:])
    return None, None


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """Logits of categories that are excluded are -inf, whose multiples by 0 are NaN."""
    return logits.clamp(min=-1e30)


class LinearDensity(TorchDistribution):
    """A discrete distribution whose log-probability is extended linearly to relaxed values.

    At hard values it is the log-probability itself. Masks and event dimensions stay as they are.
    """

    arg_constraints: dict = {}
    support = constraints.real

    def __init__(self, relaxation: Relaxation, logits: torch.Tensor, event_dim: int):
        self.relaxation, self.logits = relaxation, logits
        self._summed = event_dim - (relaxation.event_dim if relaxation.relaxes_value else 0)
        split = logits.dim() - event_dim - (0 if relaxation.relaxes_value else 1)
        end = logits.dim() - (0 if relaxation.relaxes_value else 1)
        super().__init__(logits.shape[:split], logits.shape[split:end], validate_args=False)

    @staticmethod
    def of(fn) -> TorchDistribution:
        """The linear density of a distribution, with its mask.

        :raises ValueError: if the distribution has no relaxation.
        """
        mask = None
        while isinstance(fn, MaskedDistribution):
            mask = fn._mask if mask is None else mask & fn._mask
            fn = fn.base_dist
        relaxation, logits = relaxation_of(fn)
        if relaxation is None:
            raise ValueError(f"{type(fn).__name__} has no relaxation.")
        density = LinearDensity(relaxation, logits, len(fn.event_shape))
        return density if mask is None else density.mask(mask)

    def log_prob(self, value):
        log_prob = self.relaxation.linear_log_prob(self.logits, value)
        return log_prob.flatten(log_prob.dim() - self._summed).sum(-1) if self._summed else log_prob

    def sample(self, sample_shape=()):
        raise NotImplementedError("A linear density is for scoring only.")
