"""Answers to decode in simulated time, for the tests of controllers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from simulation import Answer, Draft, Run, decode

from outdraft.control import Controller, ControlSettings, Costs, Experience

PLAIN_PASS = 0.02  # seconds


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fixed_costs(begin: float = 0.1, step: float = 0.08, slope: float = 0.02) -> Costs:
    """Shares of a one-node pass, as seconds."""
    return Costs.fixed(PLAIN_PASS * begin, PLAIN_PASS * step, PLAIN_PASS, PLAIN_PASS * slope, 0.0)


def answer(chances: Sequence[float], tokens: int = 128, levels: int = 16, seed: int = 0) -> Answer:
    """Every level is accepted with the chance at its token position (the last one goes on); confidences say as much."""
    rng = random.Random(seed)
    chance = [chances[min(position, len(chances) - 1)] for position in range(tokens + levels)]
    drafts = []
    for position in range(tokens):
        accepted = 0
        while accepted < levels and rng.random() < chance[position + accepted]:
            accepted += 1
        drafts.append(Draft(chance[position : position + levels], accepted))
    return drafts


def make(name: str, costs: Costs, limit: int = 8, seed: int = 0, experience: Experience | None = None, **options: Any):
    controller: Controller = ControlSettings(name, **options).make(costs, limit, generator(seed), experience)
    return controller


def decode_many(name: str, answers: Sequence[Answer], costs: Costs, limit: int = 8, **options: Any) -> Run:
    """Row after row, each starting from the experience of those before."""
    total, experience = Run(), Experience()
    for seed, one in enumerate(answers):
        total.add(decode(make(name, costs, limit, seed, experience, **options), one, costs))
    return total
