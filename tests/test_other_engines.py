"""The comparison with other engines: the line protocol, weights as GGUF, and a run whose llama.cpp is a stand-in."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cli_fixtures import Folders, make_folders
from training.tiny import write_chats

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = ("peer_worker", "peer_report", "peer_gguf", "peers")

ENGINE = """
import sys
from peer_worker import own_stdout, serve
answers = own_stdout()
print("a library's banner")
def decode(request):
    if request["prompt"] == [0]:
        raise ValueError("no such prompt\\nand more")
    if request["prompt"] == [9]:
        sys.exit("out of memory")
    for place in range(100):
        yield place // 2, request["prompt"][0] + place  # two tokens a forward
serve(answers, decode, {"version": "1"})
"""

LLAMA_CPP = '''
"""Counts on from the prompt's length; two tokens a forward where it drafts."""
import os
__version__ = os.environ["STAND_IN_VERSION"]
def llama_print_system_info():
    return b"none"
class Llama:
    def __init__(self, path, n_ctx, verbose, n_threads, n_threads_batch, draft_model=None, logits_all=False):
        assert open(path, "rb").read(4) == b"GGUF" and logits_all == (draft_model is not None)
        self.drafts, self.fresh = draft_model is not None, False
    def reset(self):
        self.fresh = True
    def set_seed(self, seed):
        pass
    def eval(self, tokens):
        pass
    def generate(self, tokens, temp, top_k, top_p, min_p):
        assert self.fresh and (top_k, top_p, min_p) == (0, 1.0, 0.0)
        self.fresh = False
        place = 0
        while True:
            self.eval(tokens)
            for _ in range(2 if self.drafts and place else 1):
                yield 10 + (len(tokens) + place) % 200
                place += 1
'''


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    pytest.importorskip("gguf")
    sys.path.insert(0, str(BENCHMARKS))  # as when they are run
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(BENCHMARKS))


def request(prompt: list[int], most: int = 5, ends: tuple[int, ...] = ()) -> dict[str, Any]:
    return {"prompt": prompt, "max_new_tokens": most, "temperature": 0, "seed": 0, "ends": list(ends)}


@pytest.fixture
def worker(modules: dict[str, ModuleType], tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "engine.py").write_text(ENGINE)
    command = [sys.executable, str(tmp_path / "engine.py")]
    worker = modules["peer_worker"].Worker(command, tmp_path / "log", {"PYTHONPATH": str(BENCHMARKS)})
    yield worker
    worker.close()


def test_a_worker_says_tokens_by_forward_and_seconds_whatever_its_libraries_print(worker: Any, tmp_path: Path) -> None:
    assert worker.facts == {"version": "1"}
    said = worker.ask(request([20]))
    assert said["tokens"] == [20, 21, 22, 23, 24] and said["emitted"] == [2, 2, 1]
    assert 0 < said["prefill_seconds"] <= said["seconds"]
    assert worker.ask(request([30], ends=(31,)))["tokens"] == [30, 31]  # the end is part of the answer
    assert "a library's banner" in (tmp_path / "log").read_text()


def test_a_worker_that_fails_at_a_prompt_answers_the_next_and_one_that_dies_says_why(
    worker: Any, modules: dict[str, ModuleType]
) -> None:
    failure = modules["peer_worker"].WorkerError
    with pytest.raises(failure, match=r"^ValueError: no such prompt "):
        worker.ask(request([0]))
    assert worker.ask(request([20], most=1))["tokens"] == [20]
    with pytest.raises(failure, match="ended with status 1: out of memory"):
        worker.ask(request([9]))


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_holds_the_folders_weights_in_bfloat16(
    tied: bool, modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"vocab_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    modules["peer_gguf"].write_gguf(tmp_path, tmp_path / "own.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="own.gguf", dtype=torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        kept = weight.bfloat16().float() if weight.ndim == 2 else weight
        assert torch.equal(read[name], kept), name


def test_a_gguf_is_refused_for_what_llama_cpp_would_run_otherwise(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    config = {"model_type": "llama", "rope_parameters": {"rope_type": "llama3"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="only a Llama without rope scaling"):
        modules["peer_gguf"].write_gguf(tmp_path, tmp_path / "own.gguf")
    with pytest.raises(ValueError, match="no place for the tensor"):
        modules["peer_gguf"].llama_name("model.layers.0.self_attn.q_norm.weight")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture
def run(
    modules: dict[str, ModuleType], folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    package = tmp_path / "stand-in" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(LLAMA_CPP)
    drafting = "class LlamaPromptLookupDecoding:\n    def __init__(self, num_pred_tokens): pass\n"
    (package / "llama_speculative.py").write_text(drafting)
    write_chats(tmp_path / "prompts.jsonl", 2, seed=1)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))

    def run(*more: str, version: str = "1") -> None:
        monkeypatch.setenv("STAND_IN_VERSION", version)
        given = ["--model", folders.target, "--draft-model", folders.drafter, "--data", str(tmp_path / "prompts.jsonl")]
        sizes = ["--methods", "fspad", "--max-new-tokens", "6", "--output-dir", str(tmp_path / "out")]
        llama = ["--llama-python", sys.executable, "--llama-lookup"]
        monkeypatch.setattr(sys, "argv", ["peers.py", *given, *sizes, *llama, *more])
        modules["peers"].main()

    yield run


def test_all_engines_stand_in_one_table_and_a_second_run_measures_nothing_again(run: Any, tmp_path: Path) -> None:
    run()
    out = tmp_path / "out"
    table = (out / "peers.md").read_text()
    names = ["plain", "transformers generate", "transformers prompt-lookup", "fspad"]
    names += ["llama.cpp bf16", "llama.cpp bf16 prompt-lookup"]
    rows = {row[1].strip(): row for line in table.splitlines() if len(row := line.split("|")) == 10}
    assert list(rows)[2:] == names
    assert rows["plain"][6].strip() == rows["llama.cpp bf16"][7].strip() == "1.00x [1.00, 1.00]"
    assert rows["plain"][8].strip() == "2 of 2" and rows["llama.cpp bf16"][8].startswith(" 0 of 2; others part after")
    found = json.loads((out / "peers.json").read_text())
    methods = found["results"][0]["methods"]
    assert methods["llama.cpp bf16"]["tau"] == 1 and methods["llama.cpp bf16 prompt-lookup"]["tau"] == pytest.approx(
        5 / 3  # five tokens after the first, in forwards of 2, 2 and the one that is left
    )
    lines = [json.loads(line)["answers"] for line in (out / "runs.jsonl").read_text().splitlines()]
    seconds = [(pair["plain"][0]["seconds"], pair["llama.cpp bf16"][0]["seconds"]) for pair in lines]
    tokens = [(len(pair["plain"][0]["tokens"]), len(pair["llama.cpp bf16"][0]["tokens"])) for pair in lines]
    ratios = [n / m * theirs / own for (own, theirs), (n, m) in zip(seconds, tokens, strict=True)]
    assert methods["plain"]["speedup_over_llama"] == pytest.approx(sum(ratios) / 2)  # the median of two
    assert found["environment"]["engines"]["llama.cpp bf16"]["llama_cpp"] == "1"
    measured = (out / "runs.jsonl").read_text()
    run()
    assert (out / "runs.jsonl").read_text() == measured
    with pytest.raises(SystemExit, match="names other engines or versions"):
        run(version="2")


def test_what_is_missing_is_said_in_one_line(run: Any) -> None:
    with pytest.raises(
        SystemExit, match=r"^peers: no such file: nowhere.gguf; give a GGUF file with --gguf NAME=FILE$"
    ):
        run("--gguf", "Q4_1=nowhere.gguf")
    with pytest.raises(SystemExit, match=r"^peers: --llama-python: .*see the head of peers.py$"):
        run("--llama-python", "/nowhere/python")
