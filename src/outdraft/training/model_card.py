"""The model card of a trained drafter, `README.md` in its folder: contents, use, training and acceptance figures. It is
written from the provenance record and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from outdraft.methods.registry import method_called

CARD = "README.md"

NOT_SHOWN = {
    "data", "output_dir", "feature_cache_dir", "report_to", "logging_steps", "save_steps", "save_total_limit",
}  # fmt: skip
"""Settings that do not change how the drafter was trained."""


def model_card(record: Mapping[str, Any]) -> str:
    """Return the card as Markdown, with the Hub's metadata before it."""
    config, target = record["config"], str(record["target"])
    method = config["method"]
    settings = {name: value for name, value in config.items() if name not in NOT_SHOWN and value is not None}
    rows = "\n".join(f"| {name} | {_shown(value)} |" for name, value in settings.items())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    minutes = record["seconds"] / 60
    return f"""---
library_name: outdraft
{_base_model(target)}tags:
- speculative-decoding
- {method}
---

# Drafter for {target}

This is {method_called(method).card} with {record["parameters"]:,} parameters, made by outdraft for `{target}`.
It guesses tokens ahead and the model checks them, so that text comes faster and its output distribution
stays the model's own. It is of no use with another model.

## Use

```python
import outdraft

model = outdraft.load("{target}", draft_model="THIS_FOLDER_OR_REPOSITORY")
print(model.generate([{{"role": "user", "content": "Hello!"}}]).text)
```

`outdraft bench --model {target} --draft-model THIS_FOLDER_OR_REPOSITORY` measures whether it pays on your machine.

## How well it guesses

{_measured(record)}

## Training

{record["steps"]:,} steps on {record["examples"]:,} examples ({record["tokens"]:,} tokens) in {minutes:.1f} minutes.
Versions: {versions}. SHA-256 of the data: `{record["data_sha256"]}`.

| setting | value |
|---|---|
{rows}
"""


def _base_model(target: str) -> str:
    """Return the metadata's line on the target; empty for a target that is no repository, which the Hub refuses."""
    return f"base_model: {target}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", target) else ""


def _measured(record: Mapping[str, Any]) -> str:
    """Return the record's figures, with the remark that training's own are no promise for other text."""
    tau = record.get("tau") or {}
    lines = []
    if "tau" in tau:
        lines.append(f"- tau {tau['tau']:.2f} tokens a pass of the model in greedy decoding, at the end of training")
    shown = [f"{tau[name]:.0%}" for k in range(1, 17) if (name := f"held_out_top1_{k}") in tau]
    if shown:
        lines.append(f"- top-1 agreement on held-out answers, draft step by draft step: {', '.join(shown)}")
    if "acc" in record["metrics"]:
        lines.append(f"- top-1 agreement in training, at the end: {record['metrics']['acc']:.0%}")
    return "\n".join(lines) or "Nothing was measured."


def _shown(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) else str(value)
