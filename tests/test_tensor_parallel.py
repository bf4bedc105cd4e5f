"""Processes that share a target by tensor parallelism decode and train as one process does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

import sharing
from outdraft.api.loading import load_target
from outdraft.drafting.run_folder import RUN
from outdraft.errors import UserError
from outdraft.training.config import DrafterConfig
from outdraft.training.train import train
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
