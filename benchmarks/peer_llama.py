"""llama.cpp as a worker of `peers.py`, through llama-cpp-python's own loop: greedy or sampled, plain or with its prompt
lookup.

Runs in an environment of its own, which `peers.py` says how to make. Nothing is kept from one prompt to the next, and
the library's defaults hold, but for the filters of its sampling, which are off as they are for the others. Speaks the
protocol of `peer_worker.py`; knows nothing of outdraft.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from peer_worker import own_stdout, serve

answers = own_stdout()  # before a library prints anything

import llama_cpp  # noqa: E402
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # noqa: E402


class Counting(llama_cpp.Llama):
    """The library's model, which knows how many forwards there were."""

    forwards = 0

    def eval(self, tokens: Sequence[int]) -> None:
        self.forwards += 1
        super().eval(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="tokens of prompt and answer together")
    parser.add_argument("--lookup-tokens", type=int, default=0, help="candidates of its prompt lookup; 0 is plain")
    given = parser.parse_args()
    drafting: dict[str, Any] = {}
    if given.lookup_tokens:
        # it asks for the logits of all tokens by itself, but makes no room for them unless it is told so
        draft = LlamaPromptLookupDecoding(num_pred_tokens=given.lookup_tokens)
        drafting = {"draft_model": draft, "logits_all": True}
    threads = {"n_threads": given.threads, "n_threads_batch": given.threads}
    llama = Counting(given.model, n_ctx=given.context, verbose=False, **threads, **drafting)

    def decode(request: dict[str, Any]) -> Iterator[tuple[int, int]]:
        llama.reset()  # or it would reuse what this prompt shares with the one before
        llama.set_seed(request["seed"])
        filters_off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        for token in llama.generate(request["prompt"], temp=float(request["temperature"]), **filters_off):
            yield llama.forwards, token

    system = llama_cpp.llama_print_system_info().decode()
    serve(answers, decode, {"llama_cpp": llama_cpp.__version__, "system": system, **vars(given)})


if __name__ == "__main__":
    main()
