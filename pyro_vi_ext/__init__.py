"""ELBOs for Pyro beyond `Trace_ELBO`: swap the objective, keep the model and the guide."""

from pyro_vi_ext.arviz_export import from_pyro_svi
from pyro_vi_ext.diagnostics import GuideReport, guide_report
from pyro_vi_ext.elbo_readings import ElboTerms, elbo_terms
from pyro_vi_ext.evidence import Evidence, log_evidence
from pyro_vi_ext.importance_weighted import ImportanceWeightedELBO
from pyro_vi_ext.pareto import effective_sample_size, pareto_smooth
from pyro_vi_ext.semi_implicit import SemiImplicitELBO
from pyro_vi_ext.sticking_the_landing import TraceSTL_ELBO
from pyro_vi_ext.training import FitResult, fit

__all__ = [
    "ElboTerms",
    "Evidence",
    "FitResult",
    "GuideReport",
    "ImportanceWeightedELBO",
    "SemiImplicitELBO",
    "TraceSTL_ELBO",
    "__version__",
    "effective_sample_size",
    "elbo_terms",
    "fit",
    "from_pyro_svi",
    "guide_report",
    "log_evidence",
    "pareto_smooth",
]

__version__ = "0.1.0"
