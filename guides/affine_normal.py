r"""The conditional of :class:`~pyro_vi_ext.guides.AutoSemiImplicit`: many Gaussians, one L.

.. math::

    z = c + L\, (\mu + \sigma \odot u), \qquad u \sim \mathcal N(0, I).
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.distributions import constraints

__all__ = ["AffineNormal"]


class AffineNormal(dist.TorchDistribution):
    r"""The Gaussian :math:`c + L\,(\mu + \sigma \odot u)`, with one L for the whole batch.

    ``log_prob`` undoes L on the value, before the value meets the batch: for values (J, 1, D) and
    a batch of K the triangular solve is done J times and only products are of size J x K x D.
    ``MultivariateNormal`` would solve J x K systems.

    :param loc: c, shape (D,).
    :param scale: diagonal of L, shape (D,).
    :param unit_tril: ``L = diag(scale) @ unit_tril``, shape (D, D), or None for the identity.
    :param shift: mu, shape (*batch, D).
    :param log_sigma: shape broadcastable to (*batch, D).
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "shift": constraints.real_vector,
        "log_sigma": constraints.real_vector,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc, scale, unit_tril, shift, log_sigma, validate_args=None):
        self.loc, self.scale, self.unit_tril = loc, scale, unit_tril
        self.shift, self.log_sigma = shift, log_sigma
        super().__init__(shift.shape[:-1], shift.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(AffineNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc, new.scale, new.unit_tril = self.loc, self.scale, self.unit_tril
        new.shift = self.shift.expand(batch_shape + self.event_shape)
        new.log_sigma = self.log_sigma
        super(AffineNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(torch.Size(sample_shape))
        u = torch.randn(shape, dtype=self.shift.dtype, device=self.shift.device)
        return self._color(torch.addcmul(self.shift, self.log_sigma.exp(), u))

    def log_prob(self, value):
        if self._validate_args:
            self._validate_sample(value)
        inverse = (-self.log_sigma).exp()
        u = torch.addcmul(-self.shift * inverse, self._whiten(value), inverse)
        log_det = self.scale.log().sum(-1) + self.log_sigma.sum(-1)
        constant = 0.5 * math.log(2 * math.pi) * self.event_shape[0]
        return -0.5 * u.square().sum(-1) - log_det - constant

    def _color(self, y):
        if self.unit_tril is not None:
            y = y @ self.unit_tril.mT
        return self.loc + self.scale * y

    def _whiten(self, value):
        y = (value - self.loc) / self.scale
        if self.unit_tril is None:
            return y
        rows = y.reshape(-1, y.shape[-1])
        rows = torch.linalg.solve_triangular(
            self.unit_tril.mT, rows, upper=True, left=False, unitriangular=True
        )
        return rows.reshape(y.shape)

    @property
    def mean(self):
        return self._color(self.shift)

    @property
    def variance(self):
        variance = (2 * self.log_sigma).exp()
        if self.unit_tril is not None:
            variance = variance @ self.unit_tril.square().mT
        return (self.scale.square() * variance).expand(self.batch_shape + self.event_shape)
