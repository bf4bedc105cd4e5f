"""The presets of training: recipes by the target's size, which fill the settings that nobody set by hand."""

from __future__ import annotations

from typing import Any, Literal

Preset = Literal["auto", "tiny", "small", "base", "paper"]

PRESETS: dict[str, dict[str, Any]] = {
    # On a target of 0.26M, 300 steps at 1e-3 and 3e-3 ended at an agreement of 0.48 and 0.60.
    "tiny": {
        **{"learning_rate": 2e-3, "lr_schedule": "cosine", "warmup_steps": 50},
        **{"max_steps": 2000, "max_length": 512},
    },
    # On SmolLM2-135M-Instruct four examples a step learn more of each than sixteen (docs/measurements/training.md).
    "small": {
        **{"learning_rate": 1e-3, "lr_schedule": "cosine", "warmup_steps": 100},
        **{"epochs": 4.0, "batch_size": 4, "max_length": 1024},
        **{"w_cls": 1.0, "w_reg": 0.1, "unroll_steps": 3, "unroll_from": 0.6},
    },
    # The published optimiser with a quarter of its passes: set epochs for more.
    "base": {"epochs": 5.0},
    "paper": {
        **{"learning_rate": 5e-5, "lr_schedule": "linear", "warmup_steps": 2000, "max_steps": None, "epochs": 20.0},
        **{"max_length": 2048, "batch_size": 16, "clip_value": 0.5, "precision": "bf16", "feature_noise": True},
        **{"w_reg": 1.0, "w_reg_schedule": "constant", "w_cls": 0.1, "token_loss": "soft", "teacher_top_k": 0},
        **{"embedding_scale": 1.0, "draft_vocab_size": None, "unroll_steps": 1},
        **{"tap_layers": None, "state_norm": False},
    },
}
"""The values of each preset where the method has no other; every other setting keeps its default."""


def preset_for(target_parameters: int) -> Literal["tiny", "small", "base"]:
    """Return the preset that `auto` stands for: tiny below 30M parameters, small below 1B, else base."""
    return "tiny" if target_parameters < 30e6 else "small" if target_parameters < 1e9 else "base"
