"""Answer a question with a drafter, and see what the drafting did.

python examples/generate.py [TARGET [DRAFTER]]
"""

import sys

import outdraft

names = sys.argv[1:] or ["reference", "reference"]
model = outdraft.load(names[0], draft_model=names[1] if len(names) > 1 else None)
question = [{"role": "user", "content": "Why is the sky blue?"}]

output = model.generate(question, max_new_tokens=64)
print(output.text)

counts = output.statistics
print(f"tau {output.tau:.2f}, {output.tokens_per_second:.1f} tokens/s")
print(f"{counts.accepted} of {counts.drafted} drafted tokens accepted in {counts.rounds} rounds")
