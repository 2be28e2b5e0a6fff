"""Variational families, shipped as `pyro_vi_ext.guides`."""

from .negative_binomial import NegativeBinomialSemiImplicit, gamma_beta_guide

__all__ = ["NegativeBinomialSemiImplicit", "gamma_beta_guide"]
