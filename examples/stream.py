"""Print an answer as it is decided; tokens that the drafter had guessed stand in brackets.

python examples/stream.py [TARGET [DRAFTER]]
"""

import sys

import outdraft

names = sys.argv[1:] or ["reference", "reference"]
model = outdraft.load(names[0], draft_model=names[1] if len(names) > 1 else None)
question = [{"role": "user", "content": "Write a short poem about the sea."}]

for piece in model.stream(question, max_new_tokens=64, temperature=0.8, top_p=0.95, seed=0):
    print(f"[{piece.text}]" if piece.accepted else piece.text, end="", flush=True)
    if piece.finish_reason is not None:
        print(f"\n(ended by: {piece.finish_reason})")
