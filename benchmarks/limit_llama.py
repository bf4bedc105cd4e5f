"""llama.cpp as a worker of `limit.py`: seconds of a forward over some tokens after a context, with all their logits.

Runs in an environment of its own, with llama-cpp-python, gguf and numpy. Every line `{"context", "tokens"}` is answered
by a line `{"seconds"}`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from peer_worker import own_stdout

answers = own_stdout()  # before a library prints anything

import llama_cpp  # noqa: E402
from peer_gguf import write_gguf  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the model in Hugging Face's format")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kind", choices=["bf16", "Q8_0"], required=True)
    given = parser.parse_args()
    file = given.folder.parent / f"{given.kind}.gguf"
    plain = file if given.kind == "bf16" else file.with_suffix(".source")
    write_gguf(given.folder, plain)
    if given.kind != "bf16":
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
        llama_cpp.llama_model_quantize(str(plain).encode(), str(file).encode(), how)
    threads = {"n_threads": given.threads, "n_threads_batch": given.threads}
    llama = llama_cpp.Llama(str(file), n_ctx=4096, logits_all=True, verbose=False, **threads)
    print(json.dumps({"facts": {"llama_cpp": llama_cpp.__version__}}), file=answers, flush=True)
    context = -1
    for line in sys.stdin:
        request = json.loads(line)
        if request["context"] != context:
            context = request["context"]
            llama.reset()
            llama.eval([10 + i % 1000 for i in range(context)])
        llama.n_tokens = context
        tokens = [20 + i for i in range(request["tokens"])]
        start = time.perf_counter()
        llama.eval(tokens)
        print(json.dumps({"seconds": time.perf_counter() - start}), file=answers, flush=True)


if __name__ == "__main__":
    main()
