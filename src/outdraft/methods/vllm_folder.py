"""What the folders of one-layer drafters for vLLM share: config, shapes, and a forward from the files alone.

Exports check what they have written with it. It shares no code with the networks with which it is compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import outdraft
from outdraft.drafting.folder import CONFIG, WEIGHTS, shape_of, some
from outdraft.errors import UserError
from outdraft.methods.checkpoint import Checkpoint, refuse_another
from outdraft.methods.tapped import SHAPES

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""The target families with plain embedding and head, whose vLLM model gives features after the final norm."""


COMPARED_TOKENS = 48
"""The number of tokens on which an export is compared with the drafter's own forward."""


def refuse_target(config: Any, target: Any) -> None:
    """Raise UserError for targets of families that vLLM does not run with such heads, and for another's drafter."""
    if target.model_type not in FAMILIES:
        raise UserError(
            f"vLLM's EAGLE heads are right for targets of the families {', '.join(FAMILIES)}, not "
            f"'{target.model_type}'; serve this one with `outdraft serve`"
        )
    refuse_another({name: getattr(config, name) for name in ("hidden_size", "vocab_size")}, target)


def llama_config(config: Any, target: Any, dtype: torch.dtype, name: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Make the Llama config of a drafter of one layer.

    Args:
        target: the target's text config.
        name: the class that the engine runs.
    """
    ends = {name: getattr(target, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "architectures": [name],
        "model_type": "llama",
        **{name: getattr(config, name) for name in (*SHAPES, "rms_norm_eps", "max_position_embeddings")},
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rope_theta": rope["rope_theta"],
        "rope_parameters": dict(rope),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        **ends,
    }


def written_and_read(
    folder: Path,
    checkpoint: Checkpoint[Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shapes: Callable[[dict[str, Any], dict[str, Tensor]], dict[str, tuple[int, ...]]],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write an engine's folder, with what it was made of; return what its files hold.

    Args:
        shapes: lists the tensors that the engine's loader asks for, from the folder's config and tensors.

    Raises:
        UserError: other tensors are there.
    """
    about = {"version": outdraft.__version__, "method": checkpoint.network.method, "target": checkpoint.target_id}
    config = {**config, "outdraft_export": about}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    written, read = json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
    check_tensors(shapes(written, read), read)
    return written, read


def layer_shapes(config: Mapping[str, Any], layer: str, width: int) -> dict[str, tuple[int, ...]]:
    """List the tensors of a decoder layer without input norm, whose attention reads `width` values."""
    d, i, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return {
        f"{layer}self_attn.q_proj.weight": (query, width),
        f"{layer}self_attn.k_proj.weight": (key, width),
        f"{layer}self_attn.v_proj.weight": (key, width),
        f"{layer}self_attn.o_proj.weight": (d, query),
        f"{layer}post_attention_layernorm.weight": (d,),
        f"{layer}mlp.gate_proj.weight": (i, d),
        f"{layer}mlp.up_proj.weight": (i, d),
        f"{layer}mlp.down_proj.weight": (d, i),
    }


def check_tensors(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError unless these are exactly the tensors that the engine's loader asks for.

    Args:
        shapes: shapes of what it asks for, by name.
    """
    if missing := [name for name in shapes if name not in tensors]:
        raise UserError(f"the drafter lacks {some(missing)}, which vLLM asks for; copy or train it again")
    if unknown := [name for name in tensors if name not in shapes]:
        raise UserError(f"the drafter holds {some(unknown)}, which vLLM has no place for; train one without")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            wanted = "x".join(map(str, shape))
            raise UserError(
                f"the drafter's {name} is {shape_of(tensors[name])} where vLLM asks for {wanted}; train it again"
            )
        if not torch.isfinite(tensors[name].float()).all():
            raise UserError(f"the drafter's {name} holds values that are no numbers; train it again")


class Files:
    """The parts of a forward, in float32, from exported files alone.

    Args:
        rope: the rotary frequencies and the factor of cosines and sines, where the config scales them.
    """

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], rope: tuple[Tensor, float] | None = None
    ):
        self.config, self.weights = config, {name: tensor.float() for name, tensor in tensors.items()}
        halves = torch.arange(0, config["head_dim"], 2, dtype=torch.float64) / config["head_dim"]
        plain: Tensor = config["rope_parameters"]["rope_theta"] ** -halves
        self.rates, self.turn_scale = rope or (plain, 1.0)

    def norm(self, x: Tensor, at: str) -> Tensor:
        """Return the RMSNorm of `(tokens, width)` with the weight of this prefix."""
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.weights[f"{at}weight"]

    def gated(self, gate: Tensor, up: Tensor, at: str) -> Tensor:
        """Return the gated MLP of this prefix, which may have different inputs for gate and up."""
        inner = F.silu(gate @ self.weights[f"{at}gate_proj.weight"].T) * (up @ self.weights[f"{at}up_proj.weight"].T)
        return inner @ self.weights[f"{at}down_proj.weight"].T

    def attention(self, x: Tensor, at: str) -> Tensor:
        """Return the causal attention of this prefix over `(tokens, width)` at positions 0, 1, ..."""
        config, w = self.config, self.weights
        size, heads, kv_heads = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]

        def projected(name: str) -> Tensor:
            out = x @ w[f"{at}{name}_proj.weight"].T + w.get(f"{at}{name}_proj.bias", torch.zeros(()))
            return out.view(len(x), -1, size)

        order = torch.arange(len(x), dtype=torch.float64)[:, None]
        turn = torch.polar(torch.tensor(self.turn_scale).double(), order * self.rates).to(torch.complex64)[:, None]

        def turned(x: Tensor) -> Tensor:
            pairs = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
            return torch.cat([pairs.real, pairs.imag], -1)

        q = turned(projected("q"))
        k = turned(projected("k")).repeat_interleave(heads // kv_heads, 1)
        v = projected("v").repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        dist = scores.masked_fill(later, -torch.inf).softmax(-1)
        read = torch.einsum("hqk,khd->qhd", dist, v).reshape(len(x), heads * size)
        return read @ w[f"{at}o_proj.weight"].T
