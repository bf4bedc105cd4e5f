"""The tokenizer that a GGUF file describes, where the one that `transformers` builds from it differs.

Two things are mended: how text is split before merging (`transformers` splits kinds that it does not know as GPT-2
does), and whether a first or last token is added to plain text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

Metadata = dict[str, Any]
"""A GGUF file's fields by key."""

SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Kinds of splitting (`tokenizer.ggml.pre`) in which every digit is separate and the rest is split as GPT-2 does."""
AS_GPT2 = {
    *("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "mellum", "modern-bert"),
    *("mpt", "olmo", "jais", "trillion"),
}
"""Kinds that split as GPT-2, which `transformers` does with all kinds that it does not know."""


def tokenizer_of(file: Path, metadata: Metadata) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Return the tokenizer with its chat template, and warnings about it.

    Args:
        file: the GGUF file.
        metadata: its fields.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.name_or_path = file.name  # no path of this machine goes into what is saved
    notes = []
    kind = metadata.get("tokenizer.ggml.pre", "default")
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        if kind in SINGLE_DIGITS:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            )
        elif kind not in AS_GPT2 and kind not in _known_to_transformers():
            notes.append(f"its text splitting '{kind}' is unknown here; text is split as GPT-2 does, tokens may differ")
    for which in ("bos", "eos"):
        told = metadata.get(f"tokenizer.ggml.add_{which}_token")
        if told is not None:  # else as `transformers` does
            setattr(tokenizer, f"add_{which}_token", bool(told))
    return tokenizer, notes


def _known_to_transformers() -> set[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # the table is not part of the library's promises
        return set()
    return set(GGUF_PRE_TOKENIZER_SPLITS)
