"""The reach of a model by its configuration: the context of its positions, and its layers' windows.

`trial.py` tests what a family makes of its configuration.
"""

from __future__ import annotations

from typing import Any


def context_of(config: Any) -> int:
    """Return the largest number of tokens of a text, by the shortest of the layers' kinds."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    written = next((int(found) for name in names if (found := getattr(config, name, None))), 1 << 30)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(one, dict) for one in rope.values()) else [rope]
    return min((_reach(one, config, written) for one in kinds), default=written)


def windows_of(config: Any) -> dict[str, int | None]:
    """Return the sliding window of each kind of layer; models with several kinds take a dictionary of masks."""
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}
    return {"full_attention": window}


def _reach(rope: dict[str, Any], config: Any, written: int) -> int:
    """Return the tokens that rotations reach over, for one kind of layers; `written` is the configuration's own limit.

    Extended rotations reach `factor` times as far as the original ones. Some configurations contain the product, others
    the original length alone, which the larger of the two tells apart.
    """
    kind, factor = rope.get("rope_type", "default"), float(rope.get("factor") or 1.0)
    original = rope.get("original_max_position_embeddings")
    if kind == "longrope":
        # Past this a forward rotates all of its positions by other frequencies, so a tree that crosses it would
        # change what its root sees.
        return int(original or config.original_max_position_embeddings)
    if kind in ("yarn", "llama3", "linear"):
        return max(written, int(factor * (original or written)))
    # `dynamic`, too: past it stock decoding rotates every token by frequencies of the length at that moment, and keeps
    # those of earlier, longer texts. So its texts depend on where the prompt ended, on the batch and on earlier calls,
    # and a forward over a tree, whose nodes have one length, gives none of them.
    return written
