"""Train an FSPAD drafter from Python: the target answers some questions itself, the drafter learns from the answers.

python examples/train_drafter.py [TARGET [QUESTIONS [OUTPUT [STEPS]]]]
"""

import sys
from pathlib import Path

import outdraft
from outdraft.reference import DATA
from outdraft.training.regenerate import regenerate

defaults = ["reference", str(DATA / "train_prompts.jsonl"), "runs/example", "200"]
name, questions, output, steps = sys.argv[1:] + defaults[len(sys.argv) - 1 :]

answers = regenerate(outdraft.load(name), questions, Path(output) / "answers.jsonl", max_new_tokens=64).output

config = outdraft.DrafterConfig(output_dir=Path(output) / "drafter", max_steps=int(steps), max_length=384)
trainer = outdraft.DrafterTrainer(name, config, train_dataset=answers)
result = trainer.train()
print(f"{result.folder}: {result.steps} steps, loss {result.metrics['loss']:.3f}, accuracy {result.metrics['acc']:.3f}")

model = outdraft.load(name, draft_model=trainer.drafter)
print(f"tau {model.generate([{'role': 'user', 'content': 'Hello!'}], max_new_tokens=48).tau:.2f}")
