"""How far to draft: one controller a row, asked before every level and told every verdict.

Knows confidences, counts and seconds; nothing of models, trees or tokens.
"""

from __future__ import annotations

from outdraft.control.base import Controller
from outdraft.control.costs import Costs
from outdraft.control.experience import Experience
from outdraft.control.settings import CONTROLLERS, ControlSettings

__all__ = ["CONTROLLERS", "ControlSettings", "Controller", "Costs", "Experience"]
