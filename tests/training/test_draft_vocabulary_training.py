"""A run with a reduced draft vocabulary keeps the tokens of its responses, resumes with them and leaves them."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console

from outdraft.methods.fspad.beginning import most_frequent
from outdraft.methods.fspad.folder import load_drafter
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.preparation import prepare
from outdraft.training.train import train


def test_the_drafter_of_a_run_proposes_the_most_frequent_tokens(target: Target, chats: Path, tmp_path: Path) -> None:
    quiet = Console(file=io.StringIO())
    config = DrafterConfig(
        data=chats, output_dir=tmp_path / "run", draft_vocab_size=12, max_steps=2, save_steps=1, precision="fp32",
        report_to=["none"],
    )  # fmt: skip
    train(target, config, console=quiet)
    kept = load_drafter(tmp_path / "run").head.draft_tokens
    examples = prepare(target, config).examples
    assert kept is not None and torch.equal(kept, most_frequent(examples, target.vocab_size, 12))
    assert kept.tolist() != list(range(12))
    responses = torch.cat([example.input_ids[example.loss_mask.bool()] for example in examples.examples])
    assert set(kept.tolist()) <= set(responses.tolist())
    longer = DrafterConfig(**{**config.model_dump(exclude_unset=True), "max_steps": 2})
    train(target, longer, resume=True, console=quiet)
    again = load_drafter(tmp_path / "run").head.draft_tokens
    assert again is not None and torch.equal(kept, again)
