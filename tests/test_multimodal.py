"""Folders of multimodal models are targets for texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import outdraft
from outdraft.training.plan import described

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.25,
}
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **IMAGES},
        "image_token_index": 63,
    },
    "smolvlm": {"text_config": {"model_type": "llama", **TEXT}, "vision_config": IMAGES, "image_token_id": 63},
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
        "image_token_id": 63,
        "video_token_id": 62,
        "vision_start_token_id": 61,
        "vision_end_token_id": 60,
    },
}


@pytest.mark.parametrize("family", MULTIMODAL)
def test_a_multimodal_folder_is_a_target_for_texts(family: str, tmp_path: Path) -> None:
    """Also where `transformers` does not list its class among the language models."""
    config = AutoConfig.for_model(family, **MULTIMODAL[family])
    torch.manual_seed(0)
    stock = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(stock.generation_config, name, None)
    stock.save_pretrained(tmp_path)
    given = torch.tensor([IDS])
    expected = stock.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=8, pad_token_id=0
    )
    settings = {"dtype": "float32", "device": "cpu", "method": "prompt-lookup", "generation_config": "vllm"}
    found = outdraft.load(tmp_path, **settings).generate(IDS, max_new_tokens=8)
    assert found.tokens[0] == expected[0, len(IDS) :].tolist()
    assert type(described(str(tmp_path))) is type(stock)
