"""Variational families, shipped as `pyro_vi_ext.guides`."""

from pyro_vi_ext.code_sites import CodePrior, VectorQuantized

from .auto_semi_implicit import AutoSemiImplicit
from .finite_scalar_quantizer import FiniteScalarQuantizer
from .negative_binomial import NegativeBinomialSemiImplicit, gamma_beta_guide
from .residual_quantizer import ResidualQuantizer
from .vector_quantizer import VectorQuantizer

__all__ = [
    "AutoSemiImplicit",
    "CodePrior",
    "FiniteScalarQuantizer",
    "NegativeBinomialSemiImplicit",
    "ResidualQuantizer",
    "VectorQuantized",
    "VectorQuantizer",
    "gamma_beta_guide",
]
