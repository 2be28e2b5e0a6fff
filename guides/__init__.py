"""Variational families, shipped as `pyro_vi_ext.guides`."""

from .auto_semi_implicit import AutoSemiImplicit
from .negative_binomial import NegativeBinomialSemiImplicit, gamma_beta_guide

__all__ = ["AutoSemiImplicit", "NegativeBinomialSemiImplicit", "gamma_beta_guide"]
