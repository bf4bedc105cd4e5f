"""A stock `transformers` model whose own `generate` drafts: nothing else in the program changes.

python examples/custom_generate.py [TARGET [DRAFTER]]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import outdraft
from outdraft.target.named import place_of

names = sys.argv[1:] or ["reference", "reference"]
folder = place_of(names[0]).path  # of a model that ships under a name; a folder or hub id is itself
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

question = [{"role": "user", "content": "What is a prime number?"}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")

plain = model.generate(**inputs, max_new_tokens=48, do_sample=False)
if len(names) > 1:
    drafting = outdraft.custom_generate(names[1])
else:
    drafting = outdraft.custom_generate(None, method="prompt-lookup")
drafted = model.generate(**inputs, max_new_tokens=48, do_sample=False, custom_generate=drafting)

print(tokenizer.decode(drafted[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print("same as without drafting:", torch.equal(plain, drafted))
