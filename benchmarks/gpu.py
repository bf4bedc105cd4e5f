"""What a round costs on a GPU: a target of a real model's shape and random weights, stock and as recorded graphs; and
what the drafters that ship gain there.

    python benchmarks/gpu.py --output-dir gpu [--stages correct,trained,rounds,forwards,attention] [--tiny]

Times of a round do not depend on weights; acceptance does, so none is reported of random ones. Every line is printed
and written to `OUTPUT_DIR/gpu.json` at once, so that a run that is cut short loses nothing. `--tiny` runs all of it on
a CPU in some minutes, to try the script itself. Results and what they mean: docs/measurements/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from outdraft import SpeculativeModel
from outdraft.api.loading import load_drafter_for, load_target
from outdraft.api.prompts import encode
from outdraft.core.tree import Tree
from outdraft.errors import UserError
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.reference import load_prompts
from outdraft.target.backends.tree_attention import tree_attention
from outdraft.target.named import shipped_drafters
from outdraft.target.runner import ModelRunner
from outdraft.target.target import Target

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
STAGES = ("correct", "trained", "rounds", "forwards", "attention")
BACKENDS = ("graphs", "eager")
DRAFTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, chain of 5": {"num_speculative_tokens": 5},
    "T=1": {"temperature": 1.0, "seed": 1},
}
NEVER = 10**6
"""An end token that no model gives."""


class Benchmark:
    """One run.

    Args:
        folder: for the results.
        tiny: on a CPU, with a small model.
    """

    def __init__(self, folder: Path, tiny: bool):
        self.folder, self.tiny = folder, tiny
        self.device = torch.device("cpu" if tiny else "cuda")
        self.found: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def note(self, stage: str, name: str, **values: Any) -> None:
        self.found.setdefault(stage, {})[name] = values
        print(f"{stage:10} {name:50} " + ", ".join(f"{key} {value}" for key, value in values.items()), flush=True)
        (self.folder / "gpu.json").write_text(json.dumps(self.found, indent=1))

    def milliseconds(self, work: Callable[[], Any], repeats: int = 10) -> float:
        """Median of what a caller waits for, launches included."""
        times = []
        for _ in range(3 + repeats):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return round(1e3 * statistics.median(times[3:]), 3)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def model(self, sizes: dict[str, int], dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
        """Of random weights, made where it lies."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=8192)).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    # --- stages ------------------------------------------------------------------------------------------------

    def correct(self) -> None:
        """In single precision every drafter gives on graphs what it gives on stock modules, to the token."""
        model = self.model(SMALL, torch.float32, torch.device("cpu")).to(self.device)
        prompts = [[(7 * i + 3 * row) % 2000 for i in range(20 + 5 * row)] for row in range(3)]
        targets = {backend: load_target(model, backend=backend) for backend in BACKENDS}
        for kind in ("plain", "fspad", "eesd", "lookup"):
            for name, settings in DRAFTS.items():
                texts = []
                for target in targets.values():
                    own = SpeculativeModel(target, drafter(kind, target, model))
                    texts.append(own.generate(prompts, max_new_tokens=64, eos_token_id=NEVER, **settings).tokens)
                same = sum(one == other for one, other in zip(*texts, strict=True))
                self.note("correct", f"{kind}, {name}", rows_alike=f"{same} of {len(prompts)}")

    def trained(self) -> None:
        """New tokens a second of models with the drafters that ship for them, in turn with plain decoding."""
        length = 16 if self.tiny else 128
        for name in ("reference", "smollm2"):
            try:
                target = load_target(name, dtype=torch.bfloat16, device=self.device, backend=BACKENDS[0])
            except UserError as error:  # smollm2 is a package of its own
                self.note("trained", name, left_out=str(error))
                continue
            prompts = encode(load_prompts("heldout")[:8], target)
            plain = SpeculativeModel(target, None)
            for method in shipped_drafters(name):
                drafted = plain.with_drafter(load_drafter_for(target, name, method=method))
                for way, settings in {"greedy": {}, "T=1": {"temperature": 1.0, "seed": 1}}.items():
                    for rows in (1, 8):
                        groups = [prompts[at : at + rows] for at in range(0, 8 if rows == 8 else 3, rows)]
                        given = {"max_new_tokens": length, **settings}
                        self._trained(f"{name}, {method}, {way}, rows {rows}", plain, drafted, groups, given)

    def _trained(
        self,
        name: str,
        plain: SpeculativeModel,
        drafted: SpeculativeModel,
        groups: list[list[list[int]]],
        settings: dict[str, Any],
    ) -> None:
        speeds: dict[str, list[float]] = {"plain": [], "drafted": []}
        tau = 0.0
        for turn in range(1 if self.tiny else 4):  # the first records and compiles
            for way, model in (("plain", plain), ("drafted", drafted)):
                self.wait()
                start = time.perf_counter()
                outputs = [model.generate(group, **settings) for group in groups]
                self.wait()
                took, count = time.perf_counter() - start, sum(len(row) for out in outputs for row in out.tokens)
                if turn or self.tiny:
                    speeds[way].append(count / took)
                if model is drafted:
                    tau = statistics.mean(out.statistics.tau for out in outputs)
        ratios = [after / before for before, after in zip(speeds["plain"], speeds["drafted"], strict=True)]
        found = {way: round(statistics.median(each), 1) for way, each in speeds.items()}
        self.note("trained", name, **found, ratio=round(statistics.median(ratios), 2), tau=round(tau, 2))

    def rounds(self) -> None:
        """Milliseconds of a round's parts."""
        model = self.model(SMALL if self.tiny else LLAMA_8B, torch.bfloat16, self.device)
        for backend in BACKENDS:
            target = load_target(model, backend=backend)
            for kind in ("plain", "fspad", "eagle", "eesd", "lookup"):
                own = SpeculativeModel(target, drafter(kind, target, model))
                for rows in (1, 8):
                    for name, settings in DRAFTS.items():
                        if kind != "plain" or "chain" not in name:
                            self._round(own, f"{backend}, {kind}, rows {rows}, {name}", rows, settings)

    def _round(self, own: SpeculativeModel, name: str, rows: int, settings: dict[str, Any]) -> None:
        prompts = [[(7 * i + row) % 500 for i in range(256)] for row in range(rows)]
        if own.drafter is not None and not own.drafter.limits.looks_back:
            settings = {**settings, "prompt_lookup_min": 0}  # the drafter's own rounds, no repetitions
        for tokens in (6, 24):  # the first records and compiles
            out = own.generate(prompts, max_new_tokens=tokens, eos_token_id=NEVER, **settings)
        counts = out.row_statistics[0]
        parts = {"draft": counts.draft_seconds, "target": counts.verify_seconds, "rest": counts.rest_seconds}
        self.note("rounds", name, **{part: round(1e3 * took / counts.rounds, 2) for part, took in parts.items()})

    @torch.inference_mode()
    def forwards(self) -> None:
        """Milliseconds of the target over a tree, its output layer included, by nodes, rows and context."""
        target = load_target(
            self.model(SMALL if self.tiny else LLAMA_8B, torch.bfloat16, self.device), backend="graphs"
        )
        for rows, context, sizes in ((1, 512, (1, 8, 60, 128)), (1, 4096, (1, 60)), (8, 1024, (1, 8, 16, 30))):
            cache = target.new_cache(rows, context + 300)
            run = ModelRunner(target, cache)
            run.prefill([torch.randint(5, 500, (context,)) for _ in range(rows)])
            for nodes in sizes:
                tree = Tree.chains(torch.randint(5, 500, (rows, nodes), device=self.device), 1)

                def once(run: ModelRunner = run, tree: Tree = tree) -> Tensor:
                    logits = run.target.logits(run.tree(tree).features, tree.counts)
                    run.cache.rollback()
                    return logits

                self.note("forwards", f"rows {rows}, context {context}, nodes {nodes}", ms=self.milliseconds(once))

    def attention(self) -> None:
        """Microseconds a call of attention over a tree, host included."""
        for rows, queries, keys in shapes():
            q = torch.randn(rows, 32, queries, 128, dtype=torch.bfloat16, device=self.device)
            k, v = torch.randn(2, rows, 8, keys, 128, dtype=torch.bfloat16, device=self.device)
            lengths = torch.full((rows,), keys - queries, dtype=torch.int32, device=self.device)
            seen = torch.ones(rows, queries, queries, dtype=torch.bool, device=self.device).tril()
            positions = lengths[:, None].long() + torch.arange(queries, device=self.device)

            def calls(given: tuple[Tensor, ...] = (q, k, v, lengths, seen, positions)) -> None:
                for _ in range(20):
                    tree_attention(*given, scale=128**-0.5)

            took = 1e3 * self.milliseconds(calls, 3) / 20
            self.note("attention", f"rows {rows}, queries {queries}, keys {keys}", us=round(took, 1))


def shapes() -> Iterator[tuple[int, int, int]]:
    for rows in (1, 8):
        for queries in (1, 8, 60):
            for keys in (1024, 4096):
                yield rows, queries, keys


def drafter(kind: str, target: Target, model: LlamaForCausalLM) -> Any:
    """A drafter of random weights, the same ones for every backend."""
    if kind == "plain":
        return None
    if kind == "lookup":
        return load_drafter_for(target, None, method="prompt-lookup")
    config = target.config
    if kind == "eesd":
        layer = ExitLayer.beginning(model, ExitLayerConfig(max(1, target.num_layers // 4)))
        return load_drafter_for(target, layer, backend=target.backend)
    names = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    switches = {"feature_sampling": False, "partial_alignment": False} if kind == "eagle" else {}
    torch.manual_seed(1)
    with target.device:
        head = FeatureHead(FeatureHeadConfig(**{name: getattr(config, name) for name in names}, **switches))
    return load_drafter_for(target, head.to(target.dtype).eval(), backend=target.backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of gpu.json")
    parser.add_argument("--stages", default=",".join(STAGES), help="separated by commas")
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU, to try the script")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        parser.error("no GPU here; --tiny tries the script on a CPU")
    benchmark = Benchmark(given.output_dir, given.tiny)
    device = "CPU" if given.tiny else torch.cuda.get_device_name()
    benchmark.note("machine", device, torch=torch.__version__)
    for stage in given.stages.split(","):
        if stage not in STAGES:
            parser.error(f"no stage '{stage}'; choose from {', '.join(STAGES)}")
        getattr(benchmark, stage)()


if __name__ == "__main__":
    main()
