"""How far to draft: a controller a row, asked before every level (alone or together)
and told every verdict, or one chooser for all rows,
which picks every round's whole shape (`by_machine.py`).

Controllers know confidences, counts and seconds; nothing of models, trees or tokens.
"""

from __future__ import annotations

from outdraft.control.base import Controller
from outdraft.control.costs import Costs
from outdraft.control.experience import Experience
from outdraft.control.settings import CONTROLLERS, ControlSettings

__all__ = ["CONTROLLERS", "ControlSettings", "Controller", "Costs", "Experience"]
