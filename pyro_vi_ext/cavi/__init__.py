"""Coordinate-ascent variational inference, derived from an ordinary NumPyro model.

Needs the extra ``numpyro``.
"""

try:
    import jax  # noqa: F401
    import numpyro  # noqa: F401
except ImportError as error:
    raise ImportError(
        "pyro_vi_ext.cavi needs JAX and NumPyro: pip install pyro_vi_ext[numpyro]"
    ) from error

from pyro_vi_ext.cavi.augmentations import CRTReparam, PolyaGammaReparam
from pyro_vi_ext.cavi.auxiliaries import ChineseRestaurantTable, PolyaGamma
from pyro_vi_ext.cavi.coordinate_ascent import CAVI
from pyro_vi_ext.cavi.derivation import NotConjugateError
from pyro_vi_ext.cavi.result import CAVIResult, MeanField
from pyro_vi_ext.cavi.stochastic import StochasticCAVI, StochasticResult

__all__ = [
    "CAVI",
    "CAVIResult",
    "CRTReparam",
    "ChineseRestaurantTable",
    "MeanField",
    "NotConjugateError",
    "PolyaGamma",
    "PolyaGammaReparam",
    "StochasticCAVI",
    "StochasticResult",
]
