"""Training on what was kept of the target is training beside it; which of the two a run does, and what it says."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console
from torch import Tensor

from outdraft.errors import UserError
from outdraft.losses.objective import Reading, reader_of
from outdraft.target.target import Target
from outdraft.training import progress
from outdraft.training.config import DrafterConfig
from outdraft.training.feature_store import feature_store
from outdraft.training.held_out import CHAIN
from outdraft.training.preparation import objective_for, prepare
from outdraft.training.progress import ProgressReport, ReadingReport
from outdraft.training.train import train
from outdraft.training.trainer import ObjectiveTrainer

from .test_train import quiet, settings, weights
from .tiny import tiny_target, write_chats

METHODS: dict[str, dict[str, Any]] = {
    "fspad": {},
    "fspad, whole distribution": {"teacher_top_k": 0},
    "fspad, draft vocabulary": {"draft_vocab_size": 12, "unroll_steps": 2, "teacher_top_k": 20},
    "fspad, taps": {"tap_layers": [1, 3], "token_loss": "log-acceptance"},
    "eesd": {"method": "eesd", "exit_layer": 1, "teacher_top_k": 20},
    "eesd, own head": {"method": "eesd", "exit_layer": 1, "own_head": True, "loss": "mixed", "teacher_top_k": 20},
    "medusa": {"method": "medusa", "medusa_num_heads": 3, "teacher_top_k": 20},
    "medusa, hard": {"method": "medusa", "medusa_num_heads": 2, "loss": "hard"},
}


@pytest.mark.parametrize("method", METHODS)
def test_training_on_what_is_kept_is_training_online(
    method: str, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the float16 of probabilities, which moves a few of Adam's signs where gradients are next to nothing."""
    with open(chats, "a") as file:  # every token of a text is to be predicted, the second one too
        file.write("".join(json.dumps({"text": f"{word} cat, two dogs"}) + "\n" for word in ("one", "blue", "sun")))
    forwards: dict[str, int] = {}
    for features in ("online", "cached"):
        values = settings(
            chats, tmp_path / features, features=features, max_steps=4, learning_rate=1e-3, **METHODS[method]
        )
        target = tiny_target(layers=4)
        fresh = objective_for(target, prepare(target, DrafterConfig(**values)).config)
        reading, rows = type(fresh.reading), [0]
        call = reading.__call__

        def counting(self: Reading, ids: Tensor, lengths: Tensor, call: Any = call, rows: list[int] = rows) -> Tensor:
            rows[0] += len(ids)
            return call(self, ids, lengths)

        with monkeypatch.context() as patch:
            patch.setattr(reading, "__call__", counting)
            quiet(target, values)
        forwards[features] = rows[0]
    assert forwards == {"online": 4 * 4, "cached": 29}
    logs = [
        [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
        for state in (tmp_path / features / "checkpoint-4/trainer_state.json" for features in ("online", "cached"))
    ]
    assert len(logs[0]) == len(logs[1]) == 4
    for beside, kept in zip(*logs, strict=True):
        assert beside["loss"] == pytest.approx(kept["loss"], rel=2e-4)
        assert beside["acc"] == pytest.approx(kept["acc"], abs=0.02)  # one or two positions
    begun, online, cached = fresh.drafter.state_dict(), weights(tmp_path / "online"), weights(tmp_path / "cached")
    trained = [name for name in begun if begun[name].is_floating_point()]
    moved, apart = (
        sum(float((online[name] - other[name]).square().sum()) for name in trained) ** 0.5 for other in (begun, cached)
    )
    assert apart < 0.03 * moved


def test_fewer_tokens_of_the_teacher_are_another_training(chats: Path, tmp_path: Path) -> None:
    for name, top_k in (("two", 2), ("all", 0)):
        for method in ("fspad", "medusa"):
            more = {"method": method} | ({"medusa_num_heads": 2} if method == "medusa" else {})
            quiet(tiny_target(), settings(chats, tmp_path / name / method, max_steps=1, teacher_top_k=top_k, **more))
    for method in ("fspad", "medusa"):
        losses = [
            json.loads((tmp_path / name / method / "checkpoint-1/trainer_state.json").read_text())["log_history"][0]
            for name in ("two", "all")
        ]
        assert losses[0]["loss"] < losses[1]["loss"]


def test_a_run_may_be_resumed_with_its_features_kept(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = (settings(chats, tmp_path / name, features="online", max_steps=6) for name in ("whole", "run"))
    quiet(tiny_target(), whole)
    compute = ObjectiveTrainer.compute_loss

    def breaking(self: ObjectiveTrainer, *args: Any, **more: Any) -> Any:
        if self.state.global_step == 4:
            raise MemoryError
        return compute(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectiveTrainer, "compute_loss", breaking)
        with pytest.raises(MemoryError):
            quiet(tiny_target(), run)
    quiet(tiny_target(), {**run, "features": "cached"}, resume=True)
    assert json.loads((tmp_path / "run/provenance.json").read_text())["resumed_from"] == "checkpoint-3"
    losses = [
        [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
        for state in (tmp_path / name / "checkpoint-6/trainer_state.json" for name in ("whole", "run"))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and len(losses[0]) == 6


def store_of(data: Path, folder: Path, **values: Any) -> Any:
    target = tiny_target()
    ready = prepare(target, DrafterConfig(**settings(data, folder, **values)))
    return feature_store(target, ready, objective_for(target, ready.config))


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"max_steps": 6}, False),  # 24 of 26 examples
        ({"max_steps": 7}, True),  # some a second time
        ({"max_steps": 100, "feature_cache_gb": 1e-4}, False),
        ({"max_steps": 100, "features": "online"}, False),
        ({"max_steps": 1, "features": "cached"}, True),
        ({"max_steps": 1, "features": "cached", "feature_cache_gb": 1e-4}, True),  # and refused with its size
    ],
)
def test_features_are_kept_where_that_pays(values: dict[str, Any], kept: bool, chats: Path, tmp_path: Path) -> None:
    assert (store_of(chats, tmp_path / "run", **values) is not None) == kept


def test_a_store_lies_under_the_run_or_where_it_is_told_to(chats: Path, tmp_path: Path) -> None:
    own = store_of(chats, tmp_path / "run", features="cached")
    shared = store_of(chats, tmp_path / "run", features="cached", feature_cache_dir=tmp_path / "shared")
    assert own.folder == tmp_path / "run/features" / own.key
    assert shared.folder == tmp_path / "shared" / own.key
    assert not (tmp_path / "run").exists() and not (tmp_path / "shared").exists()


def test_a_run_says_what_it_reads_and_the_next_one_reads_only_what_is_new(chats: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    common = {"features": "cached", "feature_cache_dir": tmp_path / "shared", "max_steps": 1}
    train(
        tiny_target(),
        DrafterConfig(**settings(chats, tmp_path / "one", **common)),
        console=Console(file=said, width=200),
    )
    assert "features: 0.000 GB for 26 of 26 examples" in said.getvalue()
    assert "reading the target: 26 of 26 examples, " in said.getvalue()
    more = chats.with_name("more.jsonl")
    more.write_text(chats.read_text() + write_chats(tmp_path / "new.jsonl", 4, seed=9).read_text())
    for run, says in (("two", "for 4 of 30 examples"), ("three", "")):
        said.seek(0)
        said.truncate()
        config = DrafterConfig(**settings(more, tmp_path / run, **common))
        train(tiny_target(), config, console=Console(file=said, width=200))
        assert says in said.getvalue() and (says != "") == ("reading the target" in said.getvalue())


def test_a_store_over_the_budget_ends_the_run_in_one_line(target: Target, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        quiet(target, settings(chats, tmp_path / "run", features="cached", feature_cache_gb=1e-4))
    assert "feature_cache_gb = 0.0001; raise it to" in str(raised.value) and "\n" not in str(raised.value)


def test_reading_reports_a_line_now_and_then_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said = io.StringIO()
    with ReadingReport(Console(file=said, width=200), 10, 1000) as report:
        for seconds, examples, tokens in ((10, 2, 200), (10, 3, 300), (5, 4, 400), (5, 1, 100)):
            now[0] += seconds
            report(examples, tokens)
    lines = [line.strip() for line in said.getvalue().splitlines() if line.strip()]
    assert lines == [
        "reading the target: 5 of 10 examples, 25 tokens/s, 20 s left",
        "reading the target: 10 of 10 examples, 33 tokens/s, 0 s left",
    ]


def test_reading_shows_a_bar_on_a_terminal() -> None:
    said = io.StringIO()
    console = Console(file=said, width=150, force_terminal=True)
    with ReadingReport(console, 2, 20) as report:
        report(2, 20)
    assert "reading the target" in said.getvalue() and "2 of 2 examples" in said.getvalue()
    assert "s left" not in said.getvalue()


def test_ctrl_c_while_the_target_is_read_says_how_to_go_on(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReadingReport, "__call__", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match=r"stopped before the first step; .* train --resume --output-dir"):
        quiet(tiny_target(), settings(chats, tmp_path / "run", features="cached"))


def test_the_bar_of_training_has_room_for_steps_and_times() -> None:
    said = io.StringIO()
    report = ProgressReport(Console(file=said, width=100, force_terminal=True))
    state = SimpleNamespace(is_world_process_zero=True, max_steps=60, global_step=38)
    figures = {"loss": 6.686, "acc": 0.16, "tau": 1.14, "held_out_top1_1": 0.182, CHAIN: 1.21, "learning_rate": 6.2e-4}
    report.on_train_begin(None, state, None)
    report.on_log(None, state, None, logs=figures)
    report.close()
    assert "38/60" in said.getvalue() and "tau 1.14" in said.getvalue() and "…" not in said.getvalue()


def test_the_target_is_read_on_packed_layers_where_a_copy_of_it_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target()
    reader = reader_of(target)
    assert isinstance(reader, Target) and reader is not target and reader.backend == "packed"
    assert target.backend == "eager"
    ids = torch.randint(3, 200, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(reader.features(ids), target.features(ids), atol=1e-5, rtol=1e-4)
    monkeypatch.setattr("outdraft.losses.objective.COPIED_BYTES", 1000)
    assert reader_of(target) is target
    assert reader_of(tiny_target(torch.float64)).dtype == torch.float64
