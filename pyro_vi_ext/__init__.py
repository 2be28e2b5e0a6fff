"""ELBOs for Pyro beyond `Trace_ELBO`: swap the objective, keep the model and the guide."""

from pyro_vi_ext.antithetic import TraceARM_ELBO, TraceDisARM_ELBO
from pyro_vi_ext.arviz_export import from_pyro_svi
from pyro_vi_ext.comparison import Comparison, compare
from pyro_vi_ext.compiled import CannotCompile, CompiledSVI, compile_objective
from pyro_vi_ext.concrete import TraceConcrete_ELBO
from pyro_vi_ext.diagnostics import GuideReport, guide_report
from pyro_vi_ext.elbo_readings import ElboTerms, elbo_terms
from pyro_vi_ext.evidence import Evidence, log_evidence
from pyro_vi_ext.gradient_comparison import GradientReport, gradient_report
from pyro_vi_ext.importance_weighted import ImportanceWeightedELBO
from pyro_vi_ext.inference_methods import Outcome, by_pyro_svi
from pyro_vi_ext.lax import TraceLAX_ELBO
from pyro_vi_ext.leave_one_out import TraceRLOO_ELBO
from pyro_vi_ext.muprop import TraceMuProp_ELBO
from pyro_vi_ext.nvil import TraceNVIL_ELBO
from pyro_vi_ext.pareto import effective_sample_size, pareto_smooth
from pyro_vi_ext.rebar import TraceREBAR_ELBO
from pyro_vi_ext.relax import TraceRELAX_ELBO
from pyro_vi_ext.semi_implicit import SemiImplicitELBO
from pyro_vi_ext.sticking_the_landing import TraceSTL_ELBO
from pyro_vi_ext.trace_score import TraceScore_ELBO
from pyro_vi_ext.training import FitResult, fit
from pyro_vi_ext.vector_quantized import VQELBO, VQParts

__all__ = [
    "CannotCompile",
    "Comparison",
    "CompiledSVI",
    "ElboTerms",
    "Evidence",
    "FitResult",
    "GradientReport",
    "GuideReport",
    "ImportanceWeightedELBO",
    "Outcome",
    "SemiImplicitELBO",
    "TraceARM_ELBO",
    "TraceConcrete_ELBO",
    "TraceDisARM_ELBO",
    "TraceLAX_ELBO",
    "TraceMuProp_ELBO",
    "TraceNVIL_ELBO",
    "TraceREBAR_ELBO",
    "TraceRELAX_ELBO",
    "TraceRLOO_ELBO",
    "TraceSTL_ELBO",
    "TraceScore_ELBO",
    "VQELBO",
    "VQParts",
    "__version__",
    "by_pyro_svi",
    "compare",
    "compile_objective",
    "effective_sample_size",
    "elbo_terms",
    "fit",
    "from_pyro_svi",
    "gradient_report",
    "guide_report",
    "log_evidence",
    "pareto_smooth",
]

__version__ = "0.1.0"
