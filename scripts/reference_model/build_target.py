"""Train the small chat model that the package ships as its reference target, from text to weights, on a CPU.

``python build_target.py --data DIR --output DIR --minutes N`` trains (resumable with ``--resume``);
``finish.py`` then packs the result, measures it and writes the shipped files.
Knows the recipe only: what is read is decided in ``corpus``, how weights are packed in ``outdraft.reference``.
It knows nothing about speculative decoding.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corpus import split

MIXTURE = {"gsm8k": 0.30, "gpteacher": 0.25, "instruct": 0.15, "books": 0.18, "stdlib": 0.12}
SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
VOCABULARY = 4096
LAYERS = 24
TOKENS_PER_STEP = 2048
PEAK_LR, FLOOR = 1.5e-3, 0.05
WARM_UP, REWARM_UP = 100, 40
CHECKPOINT_SECONDS = 300.0
LONG = 2048


@dataclass(frozen=True)
class Stage:
    """From the share ``begin`` of the time budget on, train ``layers`` layers on windows of ``window`` tokens."""

    begin: float
    layers: int
    window: int


STAGES = (Stage(0.0, 12, 256), Stage(0.42, 24, 512), Stage(0.90, 24, LONG))


def config(layers: int = LAYERS) -> LlamaConfig:
    """The architecture of the reference target."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LONG,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|end|>"),
        pad_token_id=SPECIAL.index("<|endoftext|>"),
    )


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits and the chat markers as special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:4],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=LONG,
    )


@dataclass(frozen=True)
class Stream:
    """The tokens of one source, documents separated by ``<|endoftext|>``, and where each document starts."""

    tokens: np.ndarray
    starts: np.ndarray

    def window(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """``length + 1`` tokens, beginning at a document start three times out of four."""
        last = len(self.tokens) - length - 1
        begin = int(rng.choice(self.starts)) if rng.random() < 0.75 else int(rng.integers(last + 1))
        begin = min(begin, last)
        return self.tokens[begin : begin + length + 1]


def prepare(data: Path, output: Path, seed: int) -> tuple[dict[str, Stream], dict[str, Stream]]:
    """Train the tokenizer, tokenise every source once, and return the (train, held-out) streams."""
    folder = output / "streams"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        documents = {source: split(data, source, seed) for source in MIXTURE}
        texts = [d.text for train, _ in documents.values() for d in train]
        tokenizer = train_tokenizer(texts)
        tokenizer.save_pretrained(output / "tokenizer")
        for source, sides in documents.items():
            for side, docs in zip(("train", "held_out"), sides, strict=True):
                rows = [[*e.ids, 0] for e in tokenizer.backend_tokenizer.encode_batch([d.text for d in docs])]
                starts = np.cumsum([0, *map(len, rows)])[:-1]
                np.save(folder / f"{source}.{side}.npy", np.concatenate(rows).astype(np.uint16))
                np.save(folder / f"{source}.{side}.starts.npy", starts)
        (folder / "done").touch()

    def load(side: str) -> dict[str, Stream]:
        return {
            s: Stream(np.load(folder / f"{s}.{side}.npy"), np.load(folder / f"{s}.{side}.starts.npy")) for s in MIXTURE
        }

    return load("train"), load("held_out")


def batch(streams: dict[str, Stream], window: int, rng: np.random.Generator) -> Tensor:
    """Packed windows, each from a source drawn by the mixture weights."""
    names = rng.choice(list(MIXTURE), p=list(MIXTURE.values()), size=TOKENS_PER_STEP // window)
    return torch.from_numpy(np.stack([streams[str(n)].window(window, rng) for n in names]).astype(np.int64))


def new_model(layers: int) -> LlamaForCausalLM:
    """Fresh weights; the layers' output projections start smaller with depth, as in GPT-2."""
    model = LlamaForCausalLM(config(layers))
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data.mul_((2 * layers) ** -0.5)
    return model


def grow(model: LlamaForCausalLM, layers: int) -> LlamaForCausalLM:
    """Split each layer into equal copies that each add their share: nearly the same function, with more depth."""
    factor = layers // model.config.num_hidden_layers
    grown = LlamaForCausalLM(config(layers))
    state = {k: v for k, v in model.state_dict().items() if ".layers." not in k}
    grown.load_state_dict(state, strict=False)
    for index, layer in enumerate(grown.model.layers):
        layer.load_state_dict(model.model.layers[index // factor].state_dict())
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data.div_(factor)
    return grown


def optimizer_for(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def loss_of(model: LlamaForCausalLM, windows: Tensor, reduction: str = "mean") -> Tensor:
    """Next-token cross-entropy in bfloat16 autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction=reduction)


@torch.inference_mode()
def bits_per_byte(
    model: LlamaForCausalLM,
    streams: dict[str, Stream],
    tokenizer: PreTrainedTokenizerFast,
    window: int = 512,
    limit: int = 40,
) -> dict[str, float]:
    """Held-out bits per byte of each source; markers cost bits and count as no bytes."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(VOCABULARY)))
    width = torch.tensor([0 if t in SPECIAL else len(t) for t in tokens])
    result = {}
    for source, stream in streams.items():
        ids = torch.from_numpy(stream.tokens.astype(np.int64))
        nats, size = 0.0, 0
        for begin in range(0, min(len(ids) - window, limit * window), window):
            piece = ids[None, begin : begin + window + 1]
            nats += loss_of(model, piece, "sum").item()
            size += int(width[piece[:, 1:]].sum())
        result[source] = nats / math.log(2) / size
    return result


def stage_at(progress: float) -> Stage:
    """The stage that the share ``progress`` of the budget falls in."""
    return [s for s in STAGES if s.begin <= progress][-1]


def train(data: Path, output: Path, minutes: float, seed: int, resume: bool) -> None:
    """Train for ``minutes`` of wall-clock time (the time of earlier runs included when resuming)."""
    torch.manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    streams, _ = prepare(data, output, seed)
    checkpoint, log = output / "checkpoint.pt", (output / "train.log").open("a", buffering=1)
    stage = STAGES[0]
    step = tokens = since_growth = 0
    spent = 0.0
    model = new_model(stage.layers)
    optimizer = optimizer_for(model)
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        spent, step, tokens, since_growth = (saved[k] for k in ("elapsed", "step", "tokens", "since_growth"))
        stage = Stage(*saved["stage"])
        model = LlamaForCausalLM(config(stage.layers))
        model.load_state_dict(saved["model"])
        optimizer = optimizer_for(model)
        optimizer.load_state_dict(saved["optimizer"])

    def save(elapsed: float) -> None:
        position = {"elapsed": elapsed, "step": step, "tokens": tokens, "since_growth": since_growth}
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        shape = (stage.begin, stage.layers, stage.window)
        torch.save({**position, **state, "stage": shape}, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    def compiled() -> None:
        for layer in model.model.layers:
            layer.compile(dynamic=False)

    compiled()
    budget, origin, saved_at = minutes * 60, time.monotonic() - spent, time.monotonic()
    mark, losses = (time.monotonic(), tokens), []
    while (elapsed := time.monotonic() - origin) < budget:
        progress = elapsed / budget
        if (current := stage_at(progress)) != stage:
            if current.layers != stage.layers:
                model = grow(model, current.layers)
                optimizer, since_growth = optimizer_for(model), 0
                compiled()
            stage = current
            log.write(f"stage {stage}\n")
        first = step == since_growth
        warm = min(1.0, (since_growth + 1) / (WARM_UP if first else REWARM_UP))
        rate = PEAK_LR * warm * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, batch(streams, stage.window, np.random.default_rng([seed, step])))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step, tokens, since_growth = step + 1, tokens + TOKENS_PER_STEP, since_growth + 1
        now = time.monotonic()
        if step % 20 == 0:
            speed = (tokens - mark[1]) / (now - mark[0])
            log.write(
                f"elapsed {now - origin:.0f}s step {step} tokens {tokens} loss {np.mean(losses):.4f} "
                f"lr {rate:.2e} tokens/s {speed:.0f}\n"
            )
            mark, losses = (now, tokens), []
        if now - saved_at > CHECKPOINT_SECONDS:
            save(now - origin)
            saved_at = now
    save(time.monotonic() - origin)
    model.save_pretrained(output / "final")
    PreTrainedTokenizerFast.from_pretrained(output / "tokenizer").save_pretrained(output / "final")
    summary = {"minutes": minutes, "steps": step, "tokens": tokens, "layers": stage.layers}
    (output / "summary.json").write_text(json.dumps(summary))
    log.write(f"done {summary}\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=65.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    train(arguments.data, arguments.output, arguments.minutes, arguments.seed, arguments.resume)


if __name__ == "__main__":
    main()
