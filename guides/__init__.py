"""Variational families, shipped as `pyro_vi_ext.guides`."""

from pyro_vi_ext.code_sites import CodePrior, VectorQuantized

from .auto_semi_implicit import AutoSemiImplicit
from .negative_binomial import NegativeBinomialSemiImplicit, gamma_beta_guide
from .vector_quantizer import VectorQuantizer

__all__ = [
    "AutoSemiImplicit",
    "CodePrior",
    "NegativeBinomialSemiImplicit",
    "VectorQuantized",
    "VectorQuantizer",
    "gamma_beta_guide",
]
