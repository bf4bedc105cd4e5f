"""Several prompts at once, of any lengths: each row keeps its own pace and says what it would say alone.

python examples/batch.py [TARGET [DRAFTER]]
"""

import sys

import outdraft

names = sys.argv[1:] or ["reference", "reference"]
model = outdraft.load(names[0], draft_model=names[1] if len(names) > 1 else None, dtype="float32")
questions = ["Name three colours.", "What is 7 times 8?", "Tell me a story about a clever fox and a proud crow."]
prompts = [[{"role": "user", "content": question}] for question in questions]

output = model.generate(prompts, max_new_tokens=32)
assert output.texts is not None
for question, text, counts in zip(questions, output.texts, output.row_statistics, strict=True):
    print(f"{question}\n  {text!r} (tau {counts.tau:.2f})")

alone = [model.generate(prompt, max_new_tokens=32).tokens[0] for prompt in prompts]
print("same as one by one:", output.tokens == alone)
