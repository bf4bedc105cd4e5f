"""A Llama's Hugging Face folder as a GGUF file in bfloat16, weight for weight, for llama.cpp.

    .venv-llama/bin/python benchmarks/peer_gguf.py FOLDER FILE.gguf [--words]

Matrices keep their bits (float32 is rounded to bfloat16), norms are float32, queries and keys stand in the order in
which llama.cpp rotates them. Whoever asks gives token ids, so the file holds no tokenizer; `--words` adds the tokens of
a byte-level BPE, with which llama.cpp's server spells its answers. Needs the packages `gguf` and `numpy`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, file: Path, words: bool = False) -> None:
    """Write the folder's model to `file`, with its tokens if `words`.

    Raises:
        ValueError: it is no plain Llama, or has a tensor that llama.cpp's Llama does not know.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config["model_type"] != "llama" or rope.get("rope_type", "default") != "default":
        raise ValueError(f"only a Llama without rope scaling can be written as GGUF, not {config['model_type']} {rope}")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    pairs = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or width // heads
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(pairs)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_rope_dimension_count(head)
    if words:
        add_words(writer, folder)
    else:
        writer.add_tokenizer_model("none")
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in tensors(path):
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            if re.search(r"[qk]_proj\.", name):
                tensor = turned(tensor, heads if "q_proj" in name else pairs)
            if tensor.ndim == 1:
                writer.add_tensor(llama_name(name), tensor)
            else:
                kind = gguf.GGMLQuantizationType.BF16
                writer.add_tensor(llama_name(name), gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_words(writer: gguf.GGUFWriter, folder: Path) -> None:
    """Add the tokens of the folder's tokenizer, which must be a byte-level BPE.

    llama.cpp splits texts otherwise than this tokenizer, so it is for spelling answers and not for reading prompts.

    Raises:
        ValueError: it is another kind of tokenizer.
    """
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model["type"] != "BPE" or "ByteLevel" not in json.dumps(tokenizer["decoder"]):
        raise ValueError("only the tokens of a byte-level BPE can be written as GGUF")
    special = {one["id"]: one["content"] for one in tokenizer["added_tokens"]}
    tokens = {**{place: token for token, place in model["vocab"].items()}, **special}
    kinds = [gguf.TokenType.CONTROL if place in special else gguf.TokenType.NORMAL for place in sorted(tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens[place] for place in sorted(tokens)])
    writer.add_token_types(kinds)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in model["merges"]])


def llama_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    if name in NAMES:
        return NAMES[name]
    found = LAYER.fullmatch(name)
    if found is None or found[2] not in PARTS:
        raise ValueError(f"llama.cpp's Llama has no place for the tensor {name}")
    return f"blk.{found[1]}.{PARTS[found[2]]}.{found[3]}"


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of every head from halves, as Hugging Face rotates them, to neighbours, as llama.cpp does."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a safetensors file as float32, which holds bfloat16 and float16 without loss."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        begin = file.tell()
        for name, about in header.items():
            if name == "__metadata__":
                continue
            start, end = about["data_offsets"]
            file.seek(begin + start)
            data, shape = file.read(end - start), about["shape"]
            if about["dtype"] == "BF16":
                bits = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
                yield name, bits.view(np.float32).reshape(shape)
            else:
                kind = {"F32": np.float32, "F16": np.float16}[about["dtype"]]
                yield name, np.frombuffer(data, kind).astype(np.float32).reshape(shape)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["--words"]):
        sys.exit(__doc__)
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), bool(sys.argv[3:]))
