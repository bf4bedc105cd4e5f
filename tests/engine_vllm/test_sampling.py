"""At temperature 1 vLLM's samples follow the target's law with a drafter, and on a CPU only because of the guard.

Greedy tests cannot see the defect that is guarded against (vllm-project/vllm#55005): it makes temperatures of drafted
positions garbage. The law is computed exactly by transformers over the first three tokens jointly; the first comes out
of the prefill, the others out of rejection sampling.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM
from vllm_engine import Engine

SAMPLES = 1000
TOKENS = 3
LEAST_EXPECTED = 8
"""Cells that fewer samples are expected in are counted together."""


pytestmark = pytest.mark.parametrize("engine", ["fspad"], indirect=True)


@pytest.fixture
def fspad(engine: Any) -> Engine:
    """The engine that other tests of this drafter use, too."""
    return engine[0]


@pytest.fixture(scope="module")
def cells(target_folder: str, prompts: list[list[int]]) -> tuple[list[int], dict[tuple[int, ...], float]]:
    """A short prompt, and the exact probabilities of what likely follows: of many prompts, the one where most does."""
    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def likely(prompt: list[int]) -> dict[tuple[int, ...], float]:
        found: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(TOKENS):
            ids = torch.tensor([[*prompt, *beginning] for beginning in found])
            laws = model(ids).logits[:, -1].double().softmax(-1)
            found = {
                (*beginning, token): probability * float(law[token])
                for (beginning, probability), law in zip(found.items(), laws, strict=True)
                for token in (law * probability * SAMPLES >= LEAST_EXPECTED).nonzero().flatten().tolist()
            }
            if not found:
                break
        return found

    beginnings = [prompt[:length] for prompt in prompts for length in (6, 8, 10, 12)]
    return max(((prompt, likely(prompt)) for prompt in beginnings), key=lambda one: len(one[1]))


def p_value(samples: list[list[int]], cells: dict[tuple[int, ...], float]) -> float:
    """Of Pearson's test; all beginnings that are no cell of their own are one."""
    seen = Counter(tuple(sample) for sample in samples)
    observed = [seen[cell] for cell in cells]
    expected = [probability * len(samples) for probability in cells.values()]
    observed.append(len(samples) - sum(observed))
    expected.append(len(samples) - sum(expected))
    return float(chisquare(observed, expected).pvalue)


def draw(engine: Engine, prompt: list[int], count: int) -> list[list[int]]:
    """Beginnings of the answer; the engine's dice are torch's own (a seed for every request ends vLLM on a CPU)."""
    from vllm import SamplingParams

    torch.manual_seed(0)
    return engine.run([prompt] * count, [SamplingParams(temperature=1.0, max_tokens=TOKENS, ignore_eos=True)] * count)


def test_samples_follow_the_targets_law(fspad: Engine, cells: Any) -> None:
    prompt, law = cells
    assert len(law) >= 8, "the prompt is too certain for a test of its law"
    before = fspad.counts()
    samples = draw(fspad, prompt, SAMPLES)
    after = fspad.counts()
    drafted = after["num_draft_tokens"] - before.get("num_draft_tokens", 0)
    accepted = after["num_accepted_tokens"] - before.get("num_accepted_tokens", 0)
    assert 0 < accepted < drafted
    assert p_value(samples, law) > 1e-4


def test_without_the_guard_they_would_not(fspad: Engine, cells: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM itself has in that place, in this version and on a CPU, is wrong: when this fails, drop the guard."""
    from vllm.v1.sample import rejection_sampler

    from outdraft.export import vllm_plugin

    assert rejection_sampler.expand_batch_to_tokens is vllm_plugin.expand_batch_to_tokens
    values = torch.tensor([0.5, 2.0])
    ends = torch.tensor([1, 4], dtype=torch.int32)
    written = torch.full((4,), -7.0)
    rejection_sampler._expand(written, values, ends, 0, 1)
    assert written.tolist() == [-7.0] * 4, "vLLM's own function writes its result here"
    ours = rejection_sampler.expand_batch_to_tokens(values, ends, 4, 0, 1)
    assert ours.tolist() == [0.5, 2.0, 2.0, 2.0]

    def theirs(x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Any:
        """As in vLLM, on memory that holds a number that is not the temperature."""
        out = x.new_full((num_tokens,), 3.0)
        rejection_sampler._expand(out, x, cu_num_tokens, replace_from, replace_to)
        return out

    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", theirs)
    prompt, law = cells
    assert p_value(draw(fspad, prompt, SAMPLES // 4), law) < 1e-6
