"""vLLM as a worker of `peers.py`, one request at a time: plain, or with a drafter that `outdraft export` wrote.

Runs in the environment that `make .venv-vllm/.vllm` makes, with outdraft installed beside it for FSPAD's head. No
prompt is kept for the next one; everything else is vLLM's default, but for `--eager`. Speaks the protocol of
`peer_worker.py`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from itertools import count
from typing import Any

from peer_worker import own_stdout, serve

answers = own_stdout()  # before a library prints anything

# before vLLM is imported: one process, nothing from outside, no thread bound to a core, as for the others
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_HOST_IP="127.0.0.1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch  # noqa: E402
import vllm  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--draft-model", help="an exported drafter")
    parser.add_argument("--method", default="eagle", help="of the drafter, in vLLM's words: eagle or draft_model")
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    drafting = None
    if given.draft_model:
        length = given.num_speculative_tokens
        drafting = {"method": given.method, "model": given.draft_model, "num_speculative_tokens": length}
    engine = vllm.LLM(
        model=given.model,
        dtype="bfloat16",
        max_model_len=given.context,
        max_num_seqs=1,
        enable_prefix_caching=False,
        enforce_eager=given.eager,
        speculative_config=drafting,
    ).llm_engine
    names = count()

    def decode(request: dict[str, Any]) -> Iterator[tuple[int, int]]:
        settings = vllm.SamplingParams(
            temperature=request["temperature"],
            max_tokens=request["max_new_tokens"],
            seed=request["seed"] if request["temperature"] else None,
            stop_token_ids=request["ends"],
            ignore_eos=True,  # its end is among those
            detokenize=False,
        )
        engine.add_request(f"{next(names)}", {"prompt_token_ids": request["prompt"]}, settings)
        seen, step = 0, 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens = list(output.outputs[0].token_ids)
                yield from ((step, token) for token in tokens[seen:])
                step, seen = step + (len(tokens) > seen), len(tokens)

    facts = {
        "speculative": json.dumps(drafting),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
    }
    serve(answers, decode, {**facts, **vars(given)})


if __name__ == "__main__":
    main()
