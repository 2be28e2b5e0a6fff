"""ELBOs for Pyro beyond `Trace_ELBO`: swap the objective, keep the model and the guide."""

from pyro_vi_ext.arviz_export import from_pyro_svi
from pyro_vi_ext.semi_implicit import SemiImplicitELBO
from pyro_vi_ext.training import FitResult, fit

__all__ = ["FitResult", "SemiImplicitELBO", "__version__", "fit", "from_pyro_svi"]

__version__ = "0.1.0"
