"""Draft lengths: one controller per row, asked before every level, or a tuner that chooses every round's shape."""

from __future__ import annotations

from outdraft.control.base import Controller, Experience
from outdraft.control.costs import Costs
from outdraft.control.settings import CONTROLLERS, ControlSettings, Pacer

__all__ = ["CONTROLLERS", "ControlSettings", "Controller", "Costs", "Experience", "Pacer"]
