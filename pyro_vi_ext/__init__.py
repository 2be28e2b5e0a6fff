"""ELBOs for Pyro beyond `Trace_ELBO`: swap the objective, keep the model and the guide."""

from pyro_vi_ext.arviz_export import from_pyro_svi
from pyro_vi_ext.importance_weighted import ImportanceWeightedELBO
from pyro_vi_ext.semi_implicit import SemiImplicitELBO
from pyro_vi_ext.sticking_the_landing import TraceSTL_ELBO
from pyro_vi_ext.training import FitResult, fit

__all__ = [
    "FitResult",
    "ImportanceWeightedELBO",
    "SemiImplicitELBO",
    "TraceSTL_ELBO",
    "__version__",
    "fit",
    "from_pyro_svi",
]

__version__ = "0.1.0"
