"""What a person asked (`Run`), what was solved (`Plan`), and how both are read and written.

recipe() ──▶ Run ──key=value──▶ Run ──plan.solve──▶ Plan ──▶ run.json, plan.json
"""

from tuppence.config.documents import from_json, to_json
from tuppence.config.plan import (
    CadencePlan,
    DataPlan,
    GroupPlan,
    InitPlan,
    Interval,
    LoopPlan,
    MachinePlan,
    ModelPlan,
    OptimizerPlan,
    Plan,
    Predicted,
    SchedulePlan,
    StepPlan,
    SuitePlan,
    TasksPlan,
    TrackPlan,
    Warning,
)
from tuppence.config.run import Budget, Data, Machine, Model, Run, Train
from tuppence.config.words import FOR_NEW_WEIGHTS, asked, keys, nearest, override, parse_value

__all__ = [
    "FOR_NEW_WEIGHTS",
    "Budget",
    "CadencePlan",
    "Data",
    "DataPlan",
    "GroupPlan",
    "InitPlan",
    "Interval",
    "LoopPlan",
    "Machine",
    "MachinePlan",
    "Model",
    "ModelPlan",
    "OptimizerPlan",
    "Plan",
    "Predicted",
    "Run",
    "SchedulePlan",
    "StepPlan",
    "SuitePlan",
    "TasksPlan",
    "TrackPlan",
    "Train",
    "Warning",
    "asked",
    "from_json",
    "keys",
    "nearest",
    "override",
    "parse_value",
    "to_json",
]
