"""A vLLM engine in the tests' own process, and what all of them decode with. Knows no test."""

from __future__ import annotations

import gc
from typing import Any

from outdraft.export.export import Exported

METHODS = ("fspad", "eagle", "eesd")
CHAIN = 4
NEW_TOKENS = 48


class Engine:
    """A vLLM engine in this process, ended with the block; one at a time, for vLLM keeps its groups in globals.

    Args:
        target: the target's folder.
        drafter: an exported one; none for plain decoding.
    """

    running = 0

    def __init__(self, target: str, drafter: Exported | None, **settings: Any):
        from vllm import LLM

        assert Engine.running == 0, "another engine is still running"
        speculative = None
        if drafter is not None:
            method = {"eesd": "draft_model", "eagle3": "eagle3"}.get(drafter.method, "eagle")
            speculative = {"method": method, "model": drafter.folder, "num_speculative_tokens": CHAIN}
        self.llm = LLM(
            model=target,
            dtype="float32",
            enforce_eager=True,
            speculative_config=speculative,
            disable_log_stats=False,
            max_model_len=512,
            max_num_seqs=64,
            **settings,
        )

    def __enter__(self) -> Engine:
        Engine.running += 1
        return self

    def __exit__(self, *error: object) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        Engine.running -= 1
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def greedy(self, prompts: list[list[int]], tokens: int = NEW_TOKENS) -> list[list[int]]:
        """New tokens at temperature 0."""
        from vllm import SamplingParams

        return self.run(prompts, [SamplingParams(temperature=0.0, max_tokens=tokens)] * len(prompts))

    def run(self, prompts: list[list[int]], settings: list[Any]) -> list[list[int]]:
        """New tokens of every prompt, with settings of its own."""
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(answer.outputs[0].token_ids) for answer in self.llm.generate(asked, settings, use_tqdm=False)]

    def counts(self) -> dict[str, Any]:
        """vLLM's own counters of speculative decoding since the engine began."""
        found: dict[str, Any] = {}
        for metric in self.llm.get_metrics():
            if metric.name.startswith("vllm:spec_decode_"):
                name = metric.name.removeprefix("vllm:spec_decode_")
                found[name] = metric.values if hasattr(metric, "values") else metric.value
        return found


def since(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What was counted between the two."""
    found: dict[str, Any] = {}
    for name, value in after.items():
        if isinstance(value, list):
            earlier = before.get(name) or [0] * len(value)
            found[name] = [new - old for new, old in zip(value, earlier, strict=True)]
        else:
            found[name] = value - before.get(name, 0)
    return found
