"""What a user would take instead: outdraft, transformers, llama.cpp and vLLM on the same questions, the same weights
and the same machine, in rotating order, in one run.

Ours run on outdraft's default backend, transformers' own ways on the model as it loads it. llama.cpp and vLLM are no
dependencies of outdraft; each runs in an environment of its own as a process that gets token ids and gives token ids
and seconds (`peer_worker.py`):

    python -m venv .venv-llama && .venv-llama/bin/pip install llama-cpp-python numpy gguf    # compiles for 5-20 minutes
    make .venv-vllm/.vllm && .venv-vllm/bin/pip install --no-deps --no-build-isolation --editable .           # optional

llama.cpp gets the target's weights in bfloat16 as a GGUF file that is written here (`peer_gguf.py`), and any other file
of the same model by `--gguf NAME=FILE`; vLLM gets them as a folder. Drafters for transformers and vLLM are what
`outdraft export` writes. Run it with nothing else running; what was interrupted goes on from the output folder:

    OMP_NUM_THREADS=2 python benchmarks/peers.py --model M --draft-model FSPAD --draft-model EAGLE --draft-model EESD \\
        --data question.jsonl --per-task 5 --temperatures 0,1 --assistant EESD_AS_HF \\
        --llama-python .venv-llama/bin/python --gguf Q4_1=FILE.gguf --llama-lookup --output-dir OUT

Writes OUT/peers.md, OUT/peers.json and every answer. Seconds of an answer include its prefill, and are given apart from
it too; engines' seconds are their own, without the pipe. The tables are made in `peer_report.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peer_report import LLAMA, as_json, markdown
from peer_worker import Worker, WorkerError
from rich.console import Console
from safetensors.torch import save_file

from outdraft.api.loading import quantised_backend
from outdraft.console.app import quiet_libraries
from outdraft.errors import UserError
from outdraft.evaluation.bench.baselines import counted
from outdraft.evaluation.bench.bench import run_bench
from outdraft.evaluation.bench.measure import Answer, Contender
from outdraft.evaluation.bench.methods import BenchSettings
from outdraft.output import plain, remarks
from outdraft.target.target import Target

HERE = Path(__file__).resolve().parent


class Engines:
    """The processes of llama.cpp and vLLM, and the contenders that they make.

    Args:
        given: the command line.
        folder: where models, logs and facts go.
        stack: what ends the processes.
        console: for remarks.
    """

    def __init__(self, given: argparse.Namespace, folder: Path, stack: ExitStack, console: Console):
        self._given, self._folder, self._stack, self._console = given, folder, stack, console
        self.facts: dict[str, Any] = {}

    def __call__(self, target: Target) -> list[Contender]:
        """All that were asked for.

        Raises:
            UserError: an environment, a file or an engine that is not there or does not work.
        """
        given, found = self._given, []
        if not given.llama_python and not given.vllm_python:
            return []
        weights = self._folder / "target"
        write_folder(target, weights)
        if given.llama_python:
            file = self._folder / "target-bf16.gguf"
            self._convert(weights, file)
            files = {LLAMA: file} | {f"llama.cpp {name}": path for name, path in map(named, given.gguf)}
            for name, path in files.items():
                found.append(self._llama(name, path, target))
                if given.llama_lookup:
                    found.append(self._llama(f"{name} prompt-lookup", path, target, "--lookup-tokens", "10"))
        if given.vllm_python:
            more = ["--eager"] if given.vllm_eager else []
            found.append(self._vllm("vLLM", weights, target, *more))
            for name, path in map(named, given.vllm_drafter):
                method = "draft_model" if any(path.glob("tokenizer*")) else "eagle"
                options = ["--draft-model", str(path), "--method", method, *more]
                found.append(self._vllm(f"vLLM {name}", weights, target, *options))
        self._agree()
        return found

    def _llama(self, name: str, file: Path, target: Target, *more: str) -> Contender:
        if not file.is_file():
            raise UserError(f"no such file: {file}; give a GGUF file with --gguf NAME=FILE")
        return self._started(name, self._given.llama_python, "peer_llama.py", file, target, *more)

    def _vllm(self, name: str, folder: Path, target: Target, *more: str) -> Contender:
        return self._started(name, self._given.vllm_python, "peer_vllm.py", folder, target, *more)

    def _started(self, name: str, python: str, script: str, model: Path, target: Target, *more: str) -> Contender:
        self._console.print(f"{name}: starting", highlight=False)
        threads, context = str(torch.get_num_threads()), min(self._given.context, target.context_length)
        sizes = ["--model", str(model), "--threads", threads, "--context", str(context)]
        log = self._folder / f"{name.replace(' ', '-')}.log"
        try:
            command = [python, str(HERE / script), *sizes, *more]
            worker = Worker(command, log, {"OMP_NUM_THREADS": threads})
        except (OSError, WorkerError) as problem:
            raise UserError(f"{name} does not start: {problem}; see the head of {Path(__file__).name}") from None
        self._stack.callback(worker.close)
        self.facts[name] = worker.facts
        return contender(name, worker, context, target.eos_token_ids)

    def _convert(self, folder: Path, file: Path) -> None:
        command = [self._given.llama_python, str(HERE / "peer_gguf.py"), str(folder), str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as problem:
            raise UserError(f"--llama-python: {problem}; see the head of {Path(__file__).name}") from None
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"the target cannot be written as GGUF: {said}")

    def _agree(self) -> None:
        """Figures of other engines than those of an earlier sitting do not go into one table."""
        file, facts = self._folder / "engines.json", json.loads(json.dumps(self.facts))
        if file.exists() and json.loads(file.read_text(encoding="utf-8")) != facts:
            raise UserError(f"{file} names other engines or versions than this run; give another --output-dir")
        file.write_text(json.dumps(facts, indent=1), encoding="utf-8")


def contender(name: str, worker: Worker, context: int, ends: Sequence[int]) -> Contender:
    """An engine's process as a way of decoding."""

    def decode(prompt: list[int], settings: dict[str, Any]) -> Answer:
        room = context - len(prompt)
        if room < 1:
            raise UserError(f"a prompt has {len(prompt)} tokens and --context is {context}; give more")
        request = {
            "prompt": prompt,
            "max_new_tokens": min(settings["max_new_tokens"], room),
            "temperature": settings.get("temperature", 0),
            "seed": settings.get("seed", 0),
            "ends": list(ends),
        }
        try:
            said = worker.ask(request)
        except WorkerError as problem:
            raise UserError(f"{name}: {problem}") from None
        tokens, seconds = said["tokens"], said["seconds"]
        return Answer(tokens, seconds, *counted(said["emitted"], len(tokens), said["prefill_seconds"], seconds))

    return Contender(name, decode, "none")


def write_folder(target: Target, folder: Path) -> None:
    """The weights that all others run on, as an ordinary folder for the engines, wherever they came from."""
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = target.model
    config = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if target.tokenizer is not None:
        target.tokenizer.save_pretrained(folder)


def named(text: str) -> tuple[str, Path]:
    """NAME=PATH."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UserError(f"'{text}' must be NAME=PATH, such as Q4_1=model.gguf")
    return name, Path(path).expanduser()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--draft-model", action="append", default=[], help="PATH or NAME=PATH; may be repeated")
    parser.add_argument("--methods", help="as of `outdraft bench`, with commas; all of them if left out")
    parser.add_argument("--controllers", default="fixed", help="with commas; every drafter of ours runs with each")
    parser.add_argument("--data", type=Path, help="Spec-Bench's question.jsonl; the shipped held-out ones if left out")
    parser.add_argument("--quantize", help="as of `outdraft bench`, for ours; others get what it stands for")
    parser.add_argument("--per-task", type=int, help="questions of each task")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperatures", default="0")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--assistant", help="transformers' assisted generation with this folder, such as EESD's export")
    parser.add_argument("--llama-python", help="of the environment with llama-cpp-python; no llama.cpp if left out")
    parser.add_argument("--gguf", action="append", default=[], help="NAME=FILE of the same model; may be repeated")
    parser.add_argument("--llama-lookup", action="store_true", help="llama-cpp-python's prompt lookup too")
    parser.add_argument("--vllm-python", help="of the environment with vLLM; no vLLM if left out")
    parser.add_argument("--vllm-drafter", action="append", default=[], help="NAME=FOLDER that `outdraft export` wrote")
    parser.add_argument("--vllm-eager", action="store_true", help="vLLM does not compile")
    parser.add_argument("--context", type=int, default=8192, help="of llama.cpp and vLLM, the model's at most")
    parser.add_argument("--output-dir", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    quiet_libraries()
    console, folder = remarks(), given.output_dir
    try:
        settings = BenchSettings(
            model=given.model,
            draft_models=given.draft_model,
            methods=given.methods.split(",") if given.methods else None,
            data=given.data,
            limit=given.per_task,
            on_bad_line="skip",
            temperatures=[float(part) for part in given.temperatures.split(",")],
            repetitions=given.repetitions,
            max_new_tokens=given.max_new_tokens,
            seed=given.seed,
            controllers=given.controllers.split(","),
            peers=["generate", "prompt-lookup", *([f"assistant={given.assistant}"] if given.assistant else [])],
            output_dir=folder,
            dtype="bfloat16",
            backend=quantised_backend(None, given.quantize),
        )
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            engines = Engines(given, folder, stack, console)
            result = run_bench(settings, console, engines)
    except UserError as error:
        sys.exit(f"peers: {error}")
    text = markdown(result)
    (folder / "peers.md").write_text(text, encoding="utf-8")
    (folder / "peers.json").write_text(json.dumps(plain(as_json(result, engines.facts)), indent=1), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
