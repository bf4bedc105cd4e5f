"""The one-layer drafter in vLLM: FSPAD, and EAGLE's head with a bias in its fusion layer, as vLLM's method `eagle`.

The equations are those of `methods/fspad/network.py`, on vLLM's own layers: paged cache, tensor parallel, quantisation.
The config's `feature_sampling`, `partial_alignment` and `fc_bias` decide which parts exist. vLLM puts in the target's
embedding and head where the folder brings none. Importing this module needs vLLM; nothing else of outdraft does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM, LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    get_draft_quant_config,
    maybe_prefix,
    process_eagle_weight,
)

from outdraft.export.vllm_plugin import require_tested, vllm_version

require_tested(vllm_version())

FILE_NAMES = {
    "fc.fc.": "fc.",
    "fc.post_attention_layernorm.": "fusion_norm.",
    "fc.mlp.gate_proj.": "fusion_gate.",
    "fc.mlp.up_proj.": "fusion_up.",
    "fc.mlp.down_proj.": "fusion_down.",
}
"""The prefixes of tensor names in a folder, mapped to this module's, where they differ."""


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "hidden_states": 0})
class FeatureHeadModel(nn.Module):
    """The network: fusion, one Llama layer without input norm, two outputs.

    Args:
        vllm_config: config of the engine; the drafter's own config is in its speculative part.
        start_layer_id: number of the layer, past those of the target.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", start_layer_id: int = 0):
        super().__init__()
        config = self.config = vllm_config.speculative_config.draft_model_config.hf_config
        d, i = config.hidden_size, config.intermediate_size
        common: dict[str, Any] = {
            "quant_config": get_draft_quant_config(vllm_config),
            "params_dtype": vllm_config.model_config.dtype,
        }

        def named(name: str) -> dict[str, Any]:
            return {**common, "prefix": maybe_prefix(prefix, name)}

        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, d, prefix=maybe_prefix(prefix, "embed_tokens"))
        self.fc = ReplicatedLinear(2 * d, d, bias=config.fc_bias, return_bias=False, **named("fc"))
        if config.feature_sampling:
            self.fusion_norm = RMSNorm(d, eps=config.rms_norm_eps)
            self.fusion_gate = ColumnParallelLinear(d, i, bias=False, return_bias=False, **named("fusion_gate"))
            self.fusion_up = ColumnParallelLinear(d, i, bias=False, return_bias=False, **named("fusion_up"))
            self.fusion_down = RowParallelLinear(i, d, bias=False, return_bias=False, **named("fusion_down"))
        place = f"layers.{start_layer_id}"
        layer = LlamaDecoderLayer(vllm_config, True, prefix=maybe_prefix(prefix, place), config=config)
        if config.partial_alignment:
            layer.mlp.down_proj = RowParallelLinear(i, 2 * d, bias=False, **named(f"{place}.mlp.down_proj"))
        self.layers = nn.ModuleList([layer])

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return `(tokens, hidden)` embeddings."""
        return self.embed_tokens(input_ids)

    def forward(self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Run one draft step for every row of vLLM's flat batch.

        Args:
            input_ids: `(tokens,)` x_{t+1}.
            positions: `(tokens,)` t.
            hidden_states: `(tokens, hidden)` f_t of the target, or the second output of the step before.

        Returns:
            `(tokens, hidden)` p for the logits, and r for the next step; the same twice without partial alignment.
        """
        embeddings = self.embed_tokens(input_ids)
        h = self.fc(torch.cat((embeddings, hidden_states), dim=-1))
        if self.config.feature_sampling:
            gate = F.silu(self.fusion_gate(embeddings))
            h = h + self.fusion_down(gate * self.fusion_up(self.fusion_norm(h)))
        delta, a = self.layers[0](positions, h, None)
        if self.config.partial_alignment:
            p, r = delta.split(self.config.hidden_size, dim=-1)
            return a + p, a + r
        out = a + delta
        return out, out

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights by name; query, key and value, and gate and up, go into vLLM's joint matrices."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=LlamaModel.hf_to_vllm_mapper)


class FeatureHeadForCausalLM(EagleLlamaForCausalLM):
    """The model that vLLM's method `eagle` runs: `forward` gives the states (for the logits, for the next step), and
    `compute_logits` uses the head that vLLM puts in.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        nn.Module.__init__(self)
        self.config = vllm_config.speculative_config.draft_model_config.hf_config
        self.model = FeatureHeadModel(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            start_layer_id=vllm_config.model_config.get_total_num_hidden_layers(),
        )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load a folder that `outdraft export` wrote.

        Raises:
            ValueError: the folder lacks a weight of this drafter; an unknown weight is vLLM's own error.
        """
        loaded = AutoWeightsLoader(self).load_weights(self._named(name, weight) for name, weight in weights)
        # vLLM's loader takes what there is, and what is missing would stay as it was allocated.
        lent = () if self.has_own_embed_tokens else ("model.embed_tokens.weight",)
        if missing := sorted({name for name, _ in self.named_parameters()} - set(loaded) - set(lent)):
            raise ValueError(f"the drafter's folder lacks {', '.join(missing)}; export it again with `outdraft export`")

    def _named(self, name: str, weight: Tensor) -> tuple[str, Tensor]:
        for beginning, ours in FILE_NAMES.items():
            if name.startswith(beginning):
                name = ours + name[len(beginning) :]
        name = "model." + name
        process_eagle_weight(self, name)
        return name, weight
