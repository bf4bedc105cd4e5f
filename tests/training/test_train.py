"""Whole runs: what they leave, and that no interruption changes the weights they end in."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from outdraft.errors import UserError
from outdraft.methods.fspad.beginning import scale_of
from outdraft.methods.fspad.folder import load_drafter
from outdraft.methods.fspad.loss import noise_seed
from outdraft.methods.fspad.network import FeatureHead, scaled
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.preparation import use_bf16
from outdraft.training.train import TrainResult, train
from outdraft.training.trainer import ClipByValue, ObjectiveTrainer

from .tiny import tiny_target, write_chats

SCRIPT = Path(__file__).parent / "run_training.py"
STEPS = 11


def settings(data: Path, folder: Path, **values: Any) -> dict[str, Any]:
    """26 chats in batches of 4 as 2 pieces: an epoch is 7 steps, the last one short, and 11 steps cross its end."""
    return {
        "data": str(data),
        "output_dir": str(folder),
        "max_steps": STEPS,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "logging_steps": 1,
        "precision": "fp32",
        "report_to": ["none"],
        **values,
    }


def quiet(target: Target, values: dict[str, Any], resume: bool = False, **more: Any) -> TrainResult:
    return train(target, DrafterConfig(**values), resume=resume, console=Console(file=io.StringIO()), **more)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(left: Path, right: Path) -> None:
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def log(folder: Path) -> list[dict[str, float]]:
    """Entries of the training log of the last checkpoint."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def break_and_resume(build: Callable[[], Target], values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a new target, in the second piece of the last, short batch of the first epoch be broken off, and resume."""
    compute, calls = ObjectiveTrainer.compute_loss, []

    def breaking(self: ObjectiveTrainer, *args: Any, **more: Any) -> Any:
        calls.append(self.state.global_step)
        if len(calls) == 14:
            raise MemoryError
        return compute(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectiveTrainer, "compute_loss", breaking)
        with pytest.raises(MemoryError):
            quiet(build(), values)
    quiet(build(), values, resume=True)


def program(*values: dict[str, Any], processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(SCRIPT), *map(json.dumps, values)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data, and the folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_chats(folder / "chats.jsonl", 26)
    quiet(tiny_target(), settings(data, folder / "run"))
    return data, folder / "run"


def test_training_lowers_the_loss_and_agrees_more(target: Target, chats: Path, tmp_path: Path) -> None:
    result = quiet(target, settings(chats, tmp_path / "run", max_steps=60, logging_steps=10, save_steps=60))
    state = json.loads((tmp_path / "run" / "checkpoint-60" / "trainer_state.json").read_text())
    first, last = state["log_history"][0], result.metrics
    assert last["loss"] < 0.7 * first["loss"]
    assert last["loss_cls"] < first["loss_cls"] and last["acc"] > first["acc"] + 0.1
    assert result.steps == 60 and result.seconds > 0 and result.peak_memory_bytes > 0


def test_a_run_leaves_a_drafter_and_its_record_and_only_its_last_checkpoints(whole: tuple[Path, Path]) -> None:
    _, folder = whole
    assert {"config.json", "model.safetensors", "provenance.json", "checkpoint-9", "checkpoint-11"} <= set(
        os.listdir(folder)
    )
    assert not (folder / "checkpoint-6").exists() and not (folder / ".partial").exists()
    record = json.loads((folder / "provenance.json").read_text())
    assert record["steps"] == STEPS and record["examples"] == 26 and record["versions"]["torch"] == torch.__version__
    assert record["config"]["learning_rate"] == 1e-2 and len(record["data_sha256"]) == 64
    loaded = load_drafter(folder)
    trained = scaled(load_drafter(folder).head, 1 / scale_of(tiny_target())).state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in weights(folder / "checkpoint-11").items())
    assert loaded.training["config"]["max_steps"] == STEPS and loaded.training["metrics"]["acc"] >= 0
    assert not any("head" in name or "target" in name for name in weights(folder / "checkpoint-11"))


def test_the_logged_loss_is_the_weighted_sum_of_its_parts(whole: tuple[Path, Path]) -> None:
    for entry in log(whole[1]):
        assert entry["loss"] == pytest.approx(entry["loss_reg"] + 0.1 * entry["loss_cls"], rel=1e-5)


def test_the_target_is_never_changed(target: Target, chats: Path, tmp_path: Path) -> None:
    before = {name: weight.clone() for name, weight in target.model.state_dict().items()}
    quiet(target, settings(chats, tmp_path / "run", max_steps=3))
    assert all(torch.equal(before[name], weight) for name, weight in target.model.state_dict().items())
    assert all(weight.grad is None for weight in target.model.parameters())


def test_killed_training_resumes_to_the_same_weights(whole: tuple[Path, Path], tmp_path: Path) -> None:
    data, undisturbed = whole
    values = settings(data, tmp_path / "run")
    killed = program({**values, "kill": 9})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "run" / ".partial" / "checkpoint-9" / "optimizer.pt").read_bytes() == b"half"
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    quiet(tiny_target(), values, resume=True)
    assert_same_bits(undisturbed, tmp_path / "run")
    assert log(undisturbed)[-1]["loss"] == log(tmp_path / "run")[-1]["loss"]


def test_training_that_breaks_in_a_step_resumes_to_the_same_weights(
    whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, undisturbed = whole
    break_and_resume(tiny_target, settings(data, tmp_path / "run"), monkeypatch)
    assert_same_bits(undisturbed, tmp_path / "run")


def test_a_damaged_checkpoint_is_passed_over(whole: tuple[Path, Path], tmp_path: Path) -> None:
    data, undisturbed = whole
    values = settings(data, tmp_path / "run", save_total_limit=9)
    quiet(tiny_target(), values)
    (tmp_path / "run" / "model.safetensors").unlink()
    (tmp_path / "run" / "checkpoint-11" / "optimizer.pt").write_bytes(b"")
    (tmp_path / "run" / "checkpoint-9" / "trainer_state.json").unlink()
    quiet(tiny_target(), values, resume=True)
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["resumed_from"] == "checkpoint-6"
    assert_same_bits(undisturbed, tmp_path / "run")


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(whole: tuple[Path, Path], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored already where a script started the tests in the background
    data, undisturbed = whole
    values = settings(data, tmp_path / "run", eval_steps=5)

    def interrupting(drafter: FeatureHead) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return {"tau": 1.0}

    with pytest.raises(KeyboardInterrupt, match=r"step 5 of 11 is saved, .* --resume --output-dir"):
        train(tiny_target(), DrafterConfig(**values), measure_tau=interrupting, console=Console(quiet=True))
    assert (tmp_path / "run" / "checkpoint-5").is_dir()
    quiet(tiny_target(), values, resume=True)
    assert_same_bits(undisturbed, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_resumes_without_another_step(whole: tuple[Path, Path], tmp_path: Path) -> None:
    data, undisturbed = whole
    values = settings(data, tmp_path / "run")
    quiet(tiny_target(), values)
    (tmp_path / "run" / "model.safetensors").unlink()
    result = quiet(tiny_target(), values, resume=True)
    assert_same_bits(undisturbed, tmp_path / "run")
    assert result.metrics["loss"] == log(undisturbed)[-1]["loss"]


def test_a_folder_with_a_run_is_neither_overwritten_nor_mixed(whole: tuple[Path, Path]) -> None:
    data, folder = whole
    with pytest.raises(UserError, match=r"holds a run with checkpoint-11; go on with --resume"):
        quiet(tiny_target(), settings(data, folder))
    with pytest.raises(UserError, match=r"learning_rate was 0.01 in this run and is 0.02 now"):
        quiet(tiny_target(), settings(data, folder, learning_rate=0.02), resume=True)


def test_pieces_of_a_batch_give_the_same_training(whole: tuple[Path, Path], tmp_path: Path) -> None:
    data, in_two = whole
    quiet(tiny_target(), settings(data, tmp_path / "run", gradient_accumulation_steps=1))
    for a, b in zip(log(in_two), log(tmp_path / "run"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["acc"] == pytest.approx(b["acc"], abs=1e-6)


def test_two_processes_train_as_one_with_twice_the_batch(whole: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = whole
    common = {"gradient_accumulation_steps": 1, "max_steps": 5}
    # The whole distribution: a teacher that is kept in float16 moves some of Adam's first signs.
    exit_layer = {"method": "eesd", "exit_layer": 1, "own_head": True, "teacher_top_k": 0, "features": "online"}
    layers = 4  # of two, an exit layer after the first begins as the target itself, with nothing to learn
    runs: dict[str, dict[str, Any]] = {"fspad": {"features": "cached"}, "eesd": exit_layer}
    both = [settings(data, tmp_path / "both" / name, batch_size=2, **common, **more) for name, more in runs.items()]
    done = program(*({**values, "layers": layers} for values in both), processes=2)
    assert done.returncode == 0, done.stderr
    for name, more in runs.items():
        one = settings(data, tmp_path / "one" / name, batch_size=4, **common, **more)
        quiet(tiny_target(layers=layers), one)
        folders = [tmp_path / run / name for run in ("both", "one")]
        states = [json.loads((folder / "checkpoint-5/trainer_state.json").read_text()) for folder in folders]
        logs = [[entry for entry in state["log_history"] if "loss" in entry] for state in states]
        assert len(logs[0]) == len(logs[1]) == 5
        for a, b in zip(*logs, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["acc"] == pytest.approx(b["acc"], abs=1e-6)
        for key, weight in weights(folders[1]).items():
            torch.testing.assert_close(weights(folders[0])[key], weight, atol=1e-4, rtol=1e-3, msg=f"{name} {key}")
    assert done.stderr.count("step 5/5") == 2  # one process speaks
    assert done.stderr.count("reading the target: 26 of 26 examples") == 1  # and reads for both


def test_tau_is_measured_at_its_interval_and_at_the_end_and_changes_nothing(
    whole: tuple[Path, Path], target: Target, tmp_path: Path
) -> None:
    data, undisturbed = whole
    seen: list[bool] = []

    def measure(drafter: FeatureHead) -> dict[str, float]:
        torch.rand(7)  # global randomness is nobody's business here
        seen.append(drafter.training)
        return {"tau": 2.0 + len(seen)}

    said = io.StringIO()
    config = DrafterConfig(**settings(data, tmp_path / "run", eval_steps=4, report_to=["tensorboard"]))
    result = train(target, config, measure_tau=measure, console=Console(file=said, width=200))
    assert seen == [False, False, False] and result.tau == {"tau": 5.0}
    assert "step 4/11" in said.getvalue() and "tau 5.00" in said.getvalue()
    assert_same_bits(undisturbed, tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = {path.parent for path in (tmp_path / "run").rglob("events.*")}
    written = EventAccumulator(str(events)).Reload()
    assert [(e.step, e.value) for e in written.Scalars("train/tau")] == [(4, 3.0), (8, 4.0), (11, 5.0)]


def test_gradients_are_clipped_by_value() -> None:
    net = torch.nn.Linear(2, 1)
    net.weight.grad, net.bias.grad = torch.tensor([[3.0, -0.1]]), torch.tensor([-9.0])
    ClipByValue(0.5).on_pre_optimizer_step(None, None, None, model=net)
    assert net.weight.grad.tolist() == [[0.5, pytest.approx(-0.1)]] and net.bias.grad.tolist() == [-0.5]


def test_every_example_gets_its_own_noise_in_every_step_and_run() -> None:
    seeds = [noise_seed(seed, step, index) for seed in range(3) for step in range(20) for index in range(20)]
    assert len(set(seeds)) == 3 * 20 * 20 and min(seeds) >= 0 and max(seeds) < 2**63


def test_auto_precision_is_what_the_target_would_load_in(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DrafterConfig(**settings(chats, tmp_path / "run", precision="auto"))
    for amx, avx, bf16 in ((True, False, True), (False, True, True), (False, False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert use_bf16(config, torch.device("cpu")) is bf16


def test_bf16_training_keeps_float32_weights(target: Target, chats: Path, tmp_path: Path) -> None:
    result = quiet(target, settings(chats, tmp_path / "run", precision="bf16", max_steps=3))
    assert {weight.dtype for weight in weights(result.folder).values()} == {torch.float32}
    assert 0 < result.metrics["loss"] < 100


def test_a_bf16_target_trains(chats: Path, tmp_path: Path) -> None:
    result = quiet(tiny_target(torch.bfloat16), settings(chats, tmp_path / "run", max_steps=3))
    assert 0 < result.metrics["loss"] < 100


def test_settings_that_cannot_work_are_refused(target: Target, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="load it with backend eager"):
        quiet(Target(target.model, target.tokenizer, backend="packed"), settings(chats, tmp_path))
    with pytest.raises(UserError, match="max_length 500 exceeds the target's context of 128"):
        quiet(target, settings(chats, tmp_path, max_length=500))
    with pytest.raises(UserError, match="make it a multiple of gradient_accumulation_steps"):
        quiet(target, settings(chats, tmp_path, batch_size=3))
    with pytest.raises(UserError, match="report_to elsewhere"):
        quiet(target, settings(chats, tmp_path, report_to=["elsewhere"]))
