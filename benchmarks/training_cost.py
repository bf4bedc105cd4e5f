"""What training a drafter costs: seconds a step, tokens a second and peak memory, by method, vocabulary and settings.

Targets are random Llamas of a small width with the vocabulary that is asked for, conversations are random tokens of
spread lengths: nothing is learnt, every step does the work of a real one. Cases are measured in turns, several times
around; each step is compared with the same step (the same batch) of its rivals. `--against` adds another checkout of
the package, run in a process of its own, in the same turns.

OMP_NUM_THREADS=2 python benchmarks/training_cost.py [--vocabularies 4096,131072] [--unroll 1,3] [--against OTHER/src]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from outdraft.data.tokenization import Example, ExampleSet
from outdraft.losses.objective import TrainingExamples
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.preparation import objective_for
from outdraft.training.trainer import ObjectiveTrainer, training_arguments

METHODS: dict[str, dict[str, Any]] = {
    "fspad": {"method": "fspad"},
    "eagle": {"method": "eagle"},
    "eesd": {"method": "eesd", "exit_layer": 1},
    "eesd, own head": {"method": "eesd", "exit_layer": 1, "own_head": True},
    "medusa": {"method": "medusa"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", default="fspad", help=f"of: {'; '.join(METHODS)}", type=lambda text: text.split(";")
    )
    parser.add_argument("--vocabularies", default="4096,32768,131072")
    parser.add_argument("--unroll", default="1", help="draft steps trained (fspad and eagle)")
    parser.add_argument("--grouping", default="off,on", help="length_groups: off, on, or both")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--median-length", type=int, default=256)
    parser.add_argument("--spread", type=float, default=0.8, help="of the logarithm of lengths; 0 makes all alike")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn, after one that is not")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--against", help="src folder of another checkout")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work()
        return
    sides = {"this": Side(None)} | ({"other": Side(given.against)} if given.against else {})
    print(
        f"{torch.get_num_threads()} threads, {'cuda' if torch.cuda.is_available() else 'cpu'}; batch {given.batch_size}"
    )
    print("| method | vocabulary | unroll | side | length groups | s a step | tokens/s | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for method in given.methods:
        for vocabulary in map(int, given.vocabularies.split(",")):
            for unroll in map(int, given.unroll.split(",")):
                shape = {**vars(given), "method": METHODS[method.strip()], "vocabulary": vocabulary, "unroll": unroll}
                rivals = [(side, None) for side in sides if side == "other"]
                rivals += [("this", grouping == "on") for grouping in given.grouping.split(",")]
                runs: dict[Any, list[dict[str, Any]]] = {rival: [] for rival in rivals}
                for _ in range(given.turns):
                    for side, grouping in rivals:
                        runs[side, grouping].append(sides[side].ask({**shape, "length_groups": grouping}))
                for (side, grouping), found in runs.items():
                    show(method.strip(), vocabulary, unroll, side, grouping, found)


def show(
    method: str, vocabulary: int, unroll: int, side: str, grouping: bool | None, runs: list[dict[str, Any]]
) -> None:
    """A line of the table: the median turn of every step, summed over the steps."""
    steps = [median(times) for times in zip(*(run["seconds"] for run in runs), strict=True)]
    rate = sum(runs[0]["tokens"]) / sum(steps)
    peak = median(run["peak_bytes"] for run in runs) / 1e6
    groups = {None: "", False: "off", True: "on"}[grouping]
    seconds = sum(steps) / len(steps)
    print(
        f"| {method} | {vocabulary} | {unroll} | {side} | {groups} | {seconds:.3f} | {rate:.0f} | {peak:.0f} |",
        flush=True,
    )


class Side:
    """A process that measures, with the package of this checkout or another."""

    def __init__(self, source: str | None):
        environment = {**os.environ} | ({"PYTHONPATH": source} if source else {})
        command = [sys.executable, __file__, "--worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, case: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("a measuring process ended early; its message stands above")
        return dict(json.loads(answer))


# --- in the measuring process ----------------------------------------------------------------------------------


def work() -> None:
    """Cases in, a JSON line each; measurements out, likewise. What the Trainer prints goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    cases: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(cases,), daemon=True).start()
    while True:
        print(json.dumps(measure(json.loads(cases.get()))), file=answers, flush=True)


def _listen(cases: SimpleQueue[str]) -> None:
    """Take cases in until whoever asks is gone, finished or killed; then nothing goes on measuring for nobody."""
    for line in sys.stdin:
        cases.put(line)
    os._exit(0)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds and tokens of every timed step, and the most memory held beyond what was there before the first."""
    target, examples = random_target(case), random_examples(case)
    settings = case["method"] | ({"unroll_steps": case["unroll"]} if case["unroll"] > 1 else {})
    if case["length_groups"] is not None:
        settings["length_groups"] = case["length_groups"]
    steps = case["steps"] + 1
    with tempfile.TemporaryDirectory() as folder:
        config = DrafterConfig(
            data=Path(folder),
            output_dir=Path(folder) / "run",
            batch_size=case["batch_size"],
            max_length=case["max_length"],
            loss_chunk_size=case["chunk_size"],
            max_steps=steps,
            report_to=["none"],
            **settings,
        )
        objective = objective_for(target, config)
        clock = Clock(target.device)
        args = training_arguments(config, target.device, steps)
        args.save_strategy = "no"
        trainer = ObjectiveTrainer(objective, config, TrainingExamples(examples), args, callbacks=[clock])
        order = [int(i) for batch in trainer.get_train_dataloader().batch_sampler for i in batch]  # type: ignore[union-attr]
        trainer.train()
    per_batch = case["batch_size"]
    tokens = [sum(len(examples[i]) for i in order[at * per_batch : (at + 1) * per_batch]) for at in range(1, steps)]
    return {"seconds": clock.seconds[1:], "tokens": tokens, "peak_bytes": clock.peak()}


def random_target(case: dict[str, Any]) -> Target:
    width = case["width"]
    config = LlamaConfig(
        vocab_size=case["vocabulary"],
        hidden_size=width,
        intermediate_size=8 * width // 3 // 16 * 16,
        num_hidden_layers=case["layers"],
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=case["max_length"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    return Target(model.to("cuda" if cuda else "cpu", torch.bfloat16))


def random_examples(case: dict[str, Any]) -> ExampleSet:
    """As many as the steps take; the last 60% of every one is the answer."""
    rng, found = random.Random(0), ExampleSet()
    for _ in range(case["batch_size"] * (case["steps"] + 1)):
        length = int(case["median_length"] * 2.718 ** rng.gauss(0, case["spread"]))
        length = min(max(length, 16), case["max_length"])
        ids = torch.tensor(rng.choices(range(case["vocabulary"]), k=length), dtype=torch.int32)
        found.examples.append(Example(ids, torch.arange(length) >= 0.4 * length))
    return found


class Clock(TrainerCallback):
    """Seconds from the beginning to the end of every step, and the peak of memory between the first and the last."""

    def __init__(self, device: torch.device):
        self.device, self._began, self._before = device, 0.0, 0
        self.seconds: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what earlier cases have freed is given back first
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self._before = _status_bytes("VmRSS")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._wait()
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._wait()
        self.seconds.append(time.perf_counter() - self._began)

    def peak(self) -> int:
        now = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else _status_bytes("VmHWM")
        return now - self._before

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _status_bytes(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except OSError:  # not Linux: the highest of the process's life
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
