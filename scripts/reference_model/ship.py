"""Puts a trained drafter into the package: weights in bfloat16 or, for larger targets, as int8 rows; its record without
the paths of the machine that it was trained on. Knows drafter folders as files only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from outdraft.data.provenance import portable
from outdraft.reference import PACKED
from outdraft.target.named import DRAFTERS, NAMED, REFERENCE
from pack_rows import pack

LOCAL = {"data", "output_dir", "feature_cache_dir", "platform", "report_to"}
"""Settings and facts that belong to one machine."""


def ship(folder: Path, destination: Path, model: str) -> None:
    """Write `folder`'s drafter to `destination` as one for a named model."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", PACKED):
        (destination / name).unlink(missing_ok=True)
    weights = load_file(folder / "model.safetensors")
    if model == REFERENCE:
        file = destination / "model.safetensors"
        stored = {
            name: weight.to(torch.bfloat16) if weight.is_floating_point() else weight
            for name, weight in weights.items()
        }
    else:
        file, stored = destination / PACKED, pack(weights)
    save_file(stored, file, metadata={"format": "pt"})
    file.chmod(0o644)
    shown = NAMED[model].shown_as
    for name in ("config.json", "provenance.json"):
        record = portable(json.loads((folder / name).read_text(encoding="utf-8")), LOCAL)
        if name == "config.json":
            record["target"]["id"] = shown
        elif "target" in record:
            record["target"] = shown
        (destination / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the trained drafter")
    parser.add_argument("method", choices=("fspad", "eagle", "eesd"))
    parser.add_argument("--model", choices=tuple(NAMED), default=REFERENCE, help="that it drafts for")
    arguments = parser.parse_args()
    ship(arguments.folder, DRAFTERS / NAMED[arguments.model].drafters[arguments.method], arguments.model)


if __name__ == "__main__":
    main()
