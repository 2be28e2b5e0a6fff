"""ELBOs for Pyro beyond `Trace_ELBO`: swap the objective, keep the model and the guide."""

from pyro_vi_ext.semi_implicit import SemiImplicitELBO

__all__ = ["SemiImplicitELBO", "__version__"]

__version__ = "0.1.0"
