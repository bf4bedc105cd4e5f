"""The last step of building the reference target: pack it, measure what packing costs, and write the card's figures.

Reads the output folder of a finished ``build_target`` run; writes the package's ``target`` folder and the figures
between the markers of ``CARD.md``. Knows nothing about training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from build_target import bits_per_byte, prepare
from outdraft.reference import PACKAGED, load_prompts, unpack_folder
from pack_rows import pack_folder

CARD = PACKAGED.parent / "CARD.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


@torch.inference_mode()
def samples(folder: Path, count: int = 3, length: int = 80) -> list[tuple[str, str]]:
    """Greedy answers of the packed target to the first held-out prompts."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    pairs = []
    for messages in load_prompts("heldout")[:count]:
        prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": length, "do_sample": False}
        output = model.generate(ids, **options)  # type: ignore[misc]
        answer = str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        pairs.append((messages[-1]["content"], answer))
    return pairs


def figures(summary: dict, before: dict[str, float], after: dict[str, float], size: int, parameters: int) -> str:
    """The card's figures as Markdown."""
    rows = [f"| {s} | {before[s]:.4f} | {after[s]:.4f} | {after[s] - before[s]:+.4f} |" for s in before]
    return "\n".join(
        [
            f"{parameters:,} parameters, {summary['layers']} layers; {size / 1e6:.1f} MB packed. Trained for "
            f"{summary['minutes']:g} minutes: {summary['steps']:,} steps, {summary['tokens']:,} tokens.",
            "",
            "Held-out bits per byte (lower is better), before and after packing as int8 rows:",
            "",
            "| source | trained | packed | difference |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def finish(data: Path, output: Path, seed: int = 0, destination: Path = PACKAGED, card: Path = CARD) -> None:
    """Pack the trained model into ``destination``, measure both, and fill in ``card``."""
    _, held_out = prepare(data, output, seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "final")
    pack_folder(output / "final", destination)
    with tempfile.TemporaryDirectory() as folder:
        unpack_folder(destination, Path(folder))
        trained, packed = (
            bits_per_byte(LlamaForCausalLM.from_pretrained(path, dtype=torch.float32), held_out, tokenizer)
            for path in (output / "final", Path(folder))
        )
        answers = samples(Path(folder))
        parameters = LlamaForCausalLM.from_pretrained(folder).num_parameters()
    summary = json.loads((output / "summary.json").read_text())
    size = sum(path.stat().st_size for path in destination.iterdir())
    text = figures(summary, trained, packed, size, parameters)
    parts = [f"> {q}\n\n````text\n{a}\n````" for q, a in ((q.replace("\n", "\n> "), a) for q, a in answers)]
    text = f"{text}\n\nFirst held-out prompts, decoded greedily:\n\n" + "\n\n".join(parts)
    page = card.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN, 1)
    card.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
    report = {"summary": summary, "trained": trained, "packed": packed, "bytes": size}
    (output / "figures.json").write_text(json.dumps(report, indent=2) + "\n")
    print(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    finish(arguments.data, arguments.output, arguments.seed)


if __name__ == "__main__":
    main()
