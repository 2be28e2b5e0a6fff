"""Variational families, shipped as `pyro_vi_ext.guides`."""

from .negative_binomial import NegativeBinomialSemiImplicit
