"""Processes that share a target by tensor parallelism decode and train as one process does."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from safetensors.torch import load_file

import sharing
from cli_fixtures import make_folders
from outdraft.api.generation import load
from outdraft.api.loading import load_target
from outdraft.drafting.run_folder import RUN
from outdraft.errors import UserError
from outdraft.training.config import DrafterConfig
from outdraft.training.train import train
from serving.running import start
from training.tiny import byte_tokenizer, write_chats

SCRIPT = Path(sharing.__file__)


def together(processes: int, *arguments: str, module: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program in so many processes of torchrun, over gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", module] if module is not None else [str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600, env=environment)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharing.written(tmp_path_factory.mktemp("model"), byte_tokenizer())


def test_two_processes_decode_what_one_decodes(model: Path, tmp_path: Path) -> None:
    done = together(2, str(model), "decode", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2))
    assert first == second  # whatever a clock or the system's random numbers decided, too
    alone = sharing.decoded(model, backend="eager", device="cpu")
    for way in ("greedy", "sampled", "seed"):
        for name in ("none", "prompt-lookup", "fspad", "eesd"):
            assert first[f"{name} {way}"][0] == alone[f"{name} {way}"][0], f"{name} {way}"
    drafted = [name for name in first if name.startswith(("fspad", "eesd")) and any(map(any, first[name][1]))]
    assert len(drafted) >= 6
    assert first["none unseeded"] != alone["none unseeded"]


@pytest.mark.parametrize("processes", [2, 4])
def test_a_drafter_trains_on_a_shared_target_as_in_one_process(model: Path, tmp_path: Path, processes: int) -> None:
    if processes == 2:
        model = sharing.written(tmp_path / "tied", byte_tokenizer(), tied=True)
    data = write_chats(tmp_path / "chats.jsonl", 24)
    common: dict[str, Any] = {
        **{"data": str(data), "max_steps": 3, "learning_rate": 1e-2, "save_steps": 3, "logging_steps": 1},
        **{"precision": "fp32", "report_to": ["none"], "features": "online"},
    }
    methods: dict[str, dict[str, Any]] = {"fspad": {}, "eesd": {"method": "eesd", "exit_layer": 1}}
    runs = [
        {**common, **more, "output_dir": str(tmp_path / "many" / name), "batch_size": 8 // processes}
        for name, more in methods.items()
    ]
    done = together(processes, str(model), "train", *map(json.dumps, runs))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 3/3") == len(methods)  # one process speaks
    target = load_target(model, dtype="float32", backend="eager", device="cpu")
    for name, more in methods.items():
        one = {**common, **more, "output_dir": str(tmp_path / "one" / name), "batch_size": 8}
        train(target, DrafterConfig(**one), console=Console(file=io.StringIO()))
        folders = [tmp_path / run / name for run in ("many", "one")]
        states = [json.loads((folder / "checkpoint-3/trainer_state.json").read_text()) for folder in folders]
        logs = [[entry for entry in state["log_history"] if "loss" in entry] for state in states]
        assert len(logs[0]) == len(logs[1]) == 3
        for a, b in zip(*logs, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), name
        weights = [load_file(folder / "model.safetensors") for folder in folders]
        for key, weight in weights[1].items():  # AdamW makes whole steps of gradients that are rounding alone
            apart = (weights[0][key] - weight).norm() / weight.norm()
            assert apart < 2e-3, f"{name} {key}"
        begun = [json.loads((folder / RUN).read_text())["target"] for folder in folders]
        assert begun[0] == begun[1]  # weights in parts are those of the whole


def test_the_command_line_speaks_once(model: Path) -> None:
    flags = ("generate", "one two", "--raw", "--model", str(model), "--tp", "--max-new-tokens", "5", "--json")
    done = together(2, *flags, module="outdraft.cli")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["tokens"]) == 5


ASKED: list[dict[str, Any]] = [
    {"prompt": "red blue red blue red", "temperature": 0, "logprobs": 2},
    {"prompt": "a bird", "temperature": 0, "max_tokens": 40},
    {"prompt": ["one two", "green"], "temperature": 1, "seed": 5, "n": 2},
    {"prompt": "one two one two", "temperature": 1, "seed": 9, "presence_penalty": 0.5, "stop": ["e", "o"]},
    {"prompt": "dog", "temperature": 0.7, "seed": 1, "response_format": {"type": "regex", "regex": "(red|blue){9}"}},
    {"prompt": "cat", "temperature": 0, "speculative": False},
]


def answered(url: str) -> list[Any]:
    """Ask all at once, beside a client that leaves; return texts, reasons to end and logprobs."""
    with httpx.Client(base_url=url, timeout=None) as client, ThreadPoolExecutor(len(ASKED)) as pool:
        none: dict[str, Any] = {"token_logprobs": []}

        def ask(body: dict[str, Any]) -> Any:
            said = client.post("/v1/completions", json={"model": "m", "max_tokens": 24, **body}).json()
            return [[one["text"], one["finish_reason"], (one["logprobs"] or none)] for one in said["choices"]]

        leaving = {"model": "m", "prompt": "long", "max_tokens": 100, "stream": True}
        with client.stream("POST", "/v1/completions", json=leaving) as stream:
            next(stream.iter_lines())
            asked = [pool.submit(ask, body) for body in ASKED]
        unseeded = [ask({"prompt": "any", "temperature": 1}) for _ in range(2)]
        assert unseeded[0] != unseeded[1]
        return [one.result() for one in asked]


def test_two_processes_serve_what_one_serves(tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    folders = make_folders(tmp_path)
    alone = start(load(folders.target, folders.drafter, dtype="float32", backend="eager"), served_model_name=["m"])
    found = [answered(alone.url)]
    alone.stop()
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "outdraft.cli", "serve", "--tp"]
    command += ["--model", folders.target, "--draft-model", folders.drafter, "--served-model-name", "m"]
    command += ["--dtype", "float32", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = tmp_path / "log"
    with log.open("wb") as remarks:
        server = subprocess.Popen([sys.executable, "-m", *command], stderr=remarks, env=environment)
    try:
        while (said := re.search(r"listening on (http://127\.0\.0\.1:\d+)", log.read_text())) is None:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        found.append(answered(said[1]))
        server.terminate()
        server.wait(300)
        assert log.read_text().count("listening on") == 1
        assert "the engine has ended" not in log.read_text()
    finally:
        server.kill()
        server.wait()
    one, two = ([answer for answers in given for answer in answers] for given in found)
    assert len(one) == 3 + len(ASKED)
    for (text, reason, likely), (same_text, same_reason, as_likely) in zip(one, two, strict=True):
        assert (text, reason) == (same_text, same_reason)
        assert likely["token_logprobs"] == pytest.approx(as_likely["token_logprobs"], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "processes", "said"),
    [
        ({}, None, "torchrun"),
        ({"backend": "native"}, "2", "backend 'native'"),
        ({"device": "cpu"}, "2", "leave the device out"),
        ({"tp_plan": "rows"}, "2", "must be auto"),
        ({}, "3", "share 8 num_attention_heads"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], processes: str | None, said: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(UserError, match=said):
        load_target(model, **{"tp_plan": "auto", **settings})
