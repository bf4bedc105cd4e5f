"""Milliseconds of a draft level at 1, 3 and 10 nodes against a step of the target, with the parts of the level.

Run it with nothing else running:

    OMP_NUM_THREADS=2 python benchmarks/draft_step.py [--methods fspad,eagle,eesd] [--layers 12 --width 768]

A repetition is one step of the target, so that caches hold what they hold in decoding, then a proposal of four levels
of so many nodes through the drafter's own state, without the choice of candidates, which is not the drafter's. Medians
over levels and repetitions. Parts are timed in repetitions of their own, as the clock between them costs something.
With `--against FOLDER` the sources there take turns with these, in processes that wait for each other; with `--layers`
and `--width` target and drafter have random weights (fspad and eagle only).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

PARTS = {
    "fusion": ["FeatureDrafter.embed", "Fusion.forward", "DraftStep._state", "DraftStep._fuse"],
    "attention": ["Attention.forward", "DraftStep._attend"],
    "head": ["Target.head", "BoundExit.head", "FeatureDrafter.logits"],
    "masks": ["RunAhead.place", "attention_mask", "Target.inputs", "Sight.level", "DraftStep.angles"],
    "layers": ["Reader.lower", "BoundExit.features", "EarlyExitState._features"],
}
"""Where each part is computed, in any version of the sources; the rest of a level is the MLP, norms and Python."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="fspad,eagle,eesd")
    parser.add_argument("--nodes", default="1,3,10")
    parser.add_argument("--layers", type=int, help="a target of random weights, so deep")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--draft-vocab", type=int, default=0, help="tokens kept by a random drafter; 0 keeps all")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--repetitions", type=int, default=12, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--against", type=Path, help="a source folder to compare with")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given)
    sides = {"here": None} if given.against is None else {"there": given.against, "here": None}
    children = {name: started(folder) for name, folder in sides.items()}
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(given.turns):
        for name, child in children.items():
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("go\n")
            child.stdin.flush()
            found[name].append(json.loads(child.stdout.readline()))
    for child in children.values():
        child.communicate("end\n")
    show(found)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1))


def started(folder: Path | None) -> subprocess.Popen[str]:
    """The same program as a server of turns, on other sources where a folder is given."""
    environment = dict(os.environ)
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, __file__, *sys.argv[1:], "--serve"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    """A table of medians over turns."""
    cases = list(found["here"][0])
    print("| method, nodes | sources | target step ms | level ms | of a target step | take-in ms | parts, ms |")
    print("|---" * 7 + "|")
    for case in cases:
        for name, turns in found.items():
            of = {key: statistics.median(turn[case][key] for turn in turns) for key in ("target", "level", "first")}
            share = statistics.median(turn[case]["level"] / turn[case]["target"] for turn in turns)
            parts = {part: statistics.median(turn[case]["parts"].get(part, 0) for turn in turns) for part in PARTS}
            told = ", ".join(f"{part} {ms:.2f}" for part, ms in parts.items() if ms)
            cells = [case, name, f"{of['target']:.2f}", f"{of['level']:.3f}", f"{share:.1%}", f"{of['first']:.2f}"]
            print("| " + " | ".join([*cells, told]) + " |")


# --- one side ----------------------------------------------------------------------------------------------------


def serve(given: argparse.Namespace) -> None:
    import torch

    from outdraft.api.loading import load_target

    torch.set_grad_enabled(False)
    if given.layers is None:
        target = load_target("reference", dtype=given.dtype, backend=given.backend)
    else:
        target = random_target(given)
    sides = {method: Bench(target, method, given) for method in given.methods.split(",")}
    for line in sys.stdin:
        if line.strip() != "go":
            break
        found = {
            f"{method}, {nodes}": bench.turn(int(nodes), given.repetitions)
            for method, bench in sides.items()
            for nodes in given.nodes.split(",")
        }
        print(json.dumps(found), flush=True)


def random_target(given: argparse.Namespace) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from outdraft.api.loading import load_target, resolve_dtype

    width = given.width
    config = LlamaConfig(
        vocab_size=given.vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=given.layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    dtype = resolve_dtype(given.dtype, torch.device("cpu"))
    return load_target(LlamaForCausalLM(config).to(dtype), backend=given.backend)


def drafter_of(target: Any, method: str, given: argparse.Namespace) -> Any:
    import torch

    from outdraft.api.loading import load_drafter_for
    from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
    from outdraft.reference import reference_drafter_path

    if given.layers is None:
        return load_drafter_for(target, str(reference_drafter_path(method)), backend=given.backend)
    d, full = target.hidden_size, method == "fspad"
    config = FeatureHeadConfig(d, 4 * d, d // 64, max(1, d // 128), 64, target.vocab_size, full, full)
    torch.manual_seed(1)
    if given.draft_vocab:
        config.draft_vocab_size = given.draft_vocab
    return load_drafter_for(target, FeatureHead(config).eval(), backend=given.backend)


class Bench:
    """A drafter at work, whose levels are timed instead of a tree being grown."""

    def __init__(self, target: Any, method: str, given: argparse.Namespace):
        import torch

        self.target, self.drafter = target, drafter_of(target, method, given)
        self.nodes, self.spent, self.seconds = 1, defaultdict(float), list[float]()
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(10, target.vocab_size, (120,), generator=generator)

    def levels(self, roots: Any, logits: Any, step: Any, shape: Any, rows: Any) -> Any:
        import torch

        from outdraft.core.tree import Tree

        self.first = time.perf_counter() - self.began
        tokens = torch.arange(self.nodes)[None] + 7
        parents = torch.zeros(1, self.nodes, dtype=torch.long)
        for level in range(4):
            before = time.perf_counter()
            step(tokens, parents if level == 0 else torch.arange(self.nodes)[None])
            self.seconds.append(time.perf_counter() - before)
            self.after_level()
        return Tree.roots(roots)

    def after_level(self) -> None:
        pass

    def turn(self, nodes: int, repetitions: int) -> dict[str, Any]:
        import torch

        self.nodes = nodes
        with torch.inference_mode():
            plain = self.repeat(repetitions)
            parts: dict[str, list[float]] = defaultdict(list)
            with Spans() as spans:
                self.after_level = lambda: [parts[p].append(s) for p, s in spans.take().items()]  # type: ignore
                self.repeat(max(2, repetitions // 3))
                self.after_level = lambda: None  # type: ignore[method-assign]
        plain["parts"] = {part: 1000 * statistics.median(seconds) for part, seconds in parts.items()}
        return plain

    def repeat(self, repetitions: int) -> dict[str, Any]:
        import torch

        from outdraft.core.dice import Dice
        from outdraft.core.sampling import Warper
        from outdraft.core.sampling_settings import SamplingSettings
        from outdraft.core.shape import TreeShape
        from outdraft.core.tree import Tree
        from outdraft.drafting.base import RowContext, Update
        from outdraft.methods.eesd import drafter as early_exit
        from outdraft.methods.fspad import drafter as feature_drafting

        for module in (early_exit, feature_drafting, sys.modules.get("outdraft.drafting.vocabulary")):
            if module is not None:
                module.grow = self.levels  # type: ignore[attr-defined]
        target, drafter = self.target, self.drafter
        cache = target.new_cache(1, 512)
        run = drafter.start(target, cache)
        _, taps = run.prefill([self.prompt])
        state = drafter.begin([self.prompt], run)
        roots = torch.tensor([11])
        update = Update(torch.cat([self.prompt[1:], roots])[None], taps, [len(self.prompt)])
        warper = Warper(SamplingSettings(), len(self.prompt), target.vocab_size)
        context = RowContext([self.prompt], [warper], [Dice(0)])
        shape = TreeShape(4, self.nodes, 1 + 4 * self.nodes)
        steps, firsts = [], []
        for repetition in range(repetitions + 2):
            if repetition == 2:
                self.seconds, steps, firsts = [], [], []
            self.began = time.perf_counter()
            state.propose(update, shape, context)
            firsts.append(self.first)
            if hasattr(run, "_levels"):
                run._levels = []
            cache.rollback()
            before = time.perf_counter()
            tree = Tree.roots(roots)
            features, taps = run.tree(tree)
            target.head(features)
            steps.append(time.perf_counter() - before)
            cache.commit([range(1)])
            update = Update(roots[None], taps, [1])
        median = statistics.median
        return {"target": 1000 * median(steps), "level": 1000 * median(self.seconds), "first": 1000 * median(firsts)}


class Spans:
    """Seconds of every part since they were taken last; parts inside parts count for the outer one."""

    def __enter__(self) -> Spans:
        from outdraft.core import tree
        from outdraft.drafting import expand as growth
        from outdraft.methods.eesd import network as exit_layer
        from outdraft.methods.fspad import drafter as feature_drafting
        from outdraft.methods.fspad import network as feature_head
        from outdraft.target import target
        from outdraft.target import views as layers

        owners = [layers, target, tree, exit_layer, feature_drafting, feature_head, growth]
        try:
            from outdraft.drafting import draft_cache as sight
            from outdraft.methods.fspad import drafter as draft_step

            owners += [draft_step, sight]
        except ImportError:
            pass
        self.spent: dict[str, float] = defaultdict(float)
        self.inside = 0
        self.before: list[tuple[Any, str, Any]] = []
        for part, names in PARTS.items():
            for name in names:
                for owner in owners:
                    *outer, last = name.split(".")
                    place = getattr(owner, outer[0], None) if outer else owner
                    if place is not None and last in vars(place) and (place, last) not in [b[:2] for b in self.before]:
                        self.before.append((place, last, vars(place)[last]))
                        setattr(place, last, self.timed(vars(place)[last], part))
        return self

    def __exit__(self, *_: object) -> None:
        for place, name, function in self.before:
            setattr(place, name, function)

    def timed(self, function: Any, part: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.inside += 1
            before = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside -= 1
                if not self.inside:
                    self.spent[part] += time.perf_counter() - before

        return call

    def take(self) -> dict[str, float]:
        spent, self.spent = dict(self.spent), defaultdict(float)
        return spent


if __name__ == "__main__":
    main()
