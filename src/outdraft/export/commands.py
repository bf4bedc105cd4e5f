"""What starts an engine with an exported folder, to be printed. Knows no drafter."""

from __future__ import annotations

import json
import shlex


def vllm_server(target: str, folder: str, method: str, tokens: int) -> str:
    """A command line: vLLM's OpenAI server with the folder as its drafter, chains of so many tokens."""
    speculative = json.dumps({"method": method, "model": folder, "num_speculative_tokens": tokens})
    words = [
        "python",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        target,
        "--speculative-config",
        speculative,
    ]
    return shlex.join(words)


def assisted(target: str, folder: str, tokens: int) -> str:
    """Statements that decode with the folder as `assistant_model`."""
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"model = AutoModelForCausalLM.from_pretrained({target!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({target!r})",
            f"assistant = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=model.dtype)",
            f"assistant.generation_config.num_assistant_tokens = {tokens}",
            "prompt = tokenizer('Once upon a time', return_tensors='pt')",
            "print(tokenizer.decode(model.generate(**prompt, assistant_model=assistant, max_new_tokens=64)[0]))",
        ]
    )
