"""Train an FSPAD drafter from Python: the target answers some questions itself, the drafter learns from the answers.

python examples/train_drafter.py [TARGET [QUESTIONS [OUTPUT [STEPS]]]]
"""

import sys
from pathlib import Path

import outdraft
from outdraft.loading import load_target
from outdraft.reference.prompts import DATA
from outdraft.training.config import DrafterConfig
from outdraft.training.regenerate import regenerate
from outdraft.training.train import train

defaults = ["reference", str(DATA / "train_prompts.jsonl"), "runs/example", "200"]
name, questions, output, steps = sys.argv[1:] + defaults[len(sys.argv) - 1 :]

answers = regenerate(outdraft.load(name), questions, Path(output) / "answers.jsonl", max_new_tokens=64).output

target = load_target(name, backend="eager")  # gradients go through its head
config = DrafterConfig(data=answers, output_dir=Path(output) / "drafter", max_steps=int(steps), max_length=384)
result = train(target, config)
print(f"{result.folder}: {result.steps} steps, loss {result.metrics['loss']:.3f}, accuracy {result.metrics['acc']:.3f}")

model = outdraft.load(name, draft_model=result.folder)
print(f"tau {model.generate([{'role': 'user', 'content': 'Hello!'}], max_new_tokens=48).tau:.2f}")
