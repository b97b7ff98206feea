"""stabkit: will this unlearning run blow up?

report = stabkit.predict(model, forget, retain, algorithm="graddiff", lr=0.05, mix=0.5, steps=200)
check = stabkit.verify(report, model, forget, retain)
"""

from stabkit._errors import (
    BudgetWarning,
    ClassAxisWarning,
    ExponentWarning,
    FallbackWarning,
    LowConfidenceWarning,
    MemoryWarning,
    OverlapWarning,
    PrecisionWarning,
    ProbabilityWarning,
    ScheduleWarning,
    StabkitWarning,
    TargetWarning,
    TrainModeWarning,
    UnlabelledWarning,
    UntrainedModelWarning,
)
from stabkit._version import __version__
from stabkit.algorithms import (
    AGU,
    NPO,
    SCRUB,
    SRAGU,
    Algorithm,
    FineTune,
    GradDiff,
    GradientAscent,
    L1Sparse,
    RandomLabels,
    RemainNewton,
    SalUn,
    SFROn,
    StopRule,
    retrain,
)
from stabkit.frontier import Frontier
from stabkit.heavy_tail import layer_exponents
from stabkit.metrics import Audit, audit
from stabkit.monitor import Alert, Monitor
from stabkit.predict import predict, predict_cost
from stabkit.problem import UnlearningProblem
from stabkit.recommendations import Recommendations
from stabkit.report import Report
from stabkit.runner import RunResult, run
from stabkit.tune import tune
from stabkit.verify import Verification, verify

__all__ = [
    "AGU",
    "NPO",
    "SCRUB",
    "SRAGU",
    "Alert",
    "Algorithm",
    "Audit",
    "BudgetWarning",
    "ClassAxisWarning",
    "ExponentWarning",
    "FallbackWarning",
    "FineTune",
    "Frontier",
    "GradDiff",
    "GradientAscent",
    "L1Sparse",
    "LowConfidenceWarning",
    "MemoryWarning",
    "Monitor",
    "OverlapWarning",
    "PrecisionWarning",
    "ProbabilityWarning",
    "RandomLabels",
    "Recommendations",
    "RemainNewton",
    "Report",
    "RunResult",
    "SFROn",
    "SalUn",
    "ScheduleWarning",
    "StabkitWarning",
    "StopRule",
    "TargetWarning",
    "TrainModeWarning",
    "UnlabelledWarning",
    "UnlearningProblem",
    "UntrainedModelWarning",
    "Verification",
    "__version__",
    "audit",
    "layer_exponents",
    "predict",
    "predict_cost",
    "retrain",
    "run",
    "tune",
    "verify",
]
