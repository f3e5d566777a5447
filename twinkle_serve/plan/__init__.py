"""How much memory a configuration takes, told from numbers alone: nothing is loaded, torch is not imported.

Knows config.json's names, our settings and the arithmetic. Does not know Ray or how the engine does it; the
tests compare it with what the engine really takes.
"""

from twinkle_serve.plan.budget import Budget, Line, budget_of
from twinkle_serve.plan.report import report, verdict
from twinkle_serve.plan.shapes import ModelShapes, UnknownArchitecture, find_shapes

__all__ = [
    "Budget",
    "Line",
    "ModelShapes",
    "UnknownArchitecture",
    "budget_of",
    "find_shapes",
    "report",
    "verdict",
]
