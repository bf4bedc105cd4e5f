"""`exit_layer = auto`: what is compared, what is chosen and why, and that a run keeps its choice."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from cli_fixtures import save_model
from models import tiny
from outdraft.api.loading import load_drafter_for, load_target
from outdraft.cli import app
from outdraft.data.conversations import read_conversations
from outdraft.data.tokenization import tokenize
from outdraft.methods.eesd.exit_choice import Costs, ExitChoice, _Map, candidate_layers, choose_exit
from outdraft.target.target import Target
from outdraft.training.config import DrafterConfig
from outdraft.training.plan import plan
from outdraft.training.train import train

from .test_train import settings
from .tiny import byte_tokenizer, tiny_target


def auto(data: Path, folder: Path, **values: Any) -> DrafterConfig:
    return DrafterConfig(**settings(data, folder, **{"method": "eesd", "exit_layer": "auto", **values}))


def test_the_lower_half_is_compared_the_deeper_the_sparser() -> None:
    assert candidate_layers(2) == [1] and candidate_layers(5) == [1, 2]
    assert candidate_layers(24) == [1, 2, 3, 4, 5, 6, 8, 10, 12]
    assert candidate_layers(80) == [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40]


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "gpt2", "gpt-neo"])
def test_a_layer_is_chosen_and_the_target_stays(family: str, chats: Path) -> None:
    layers = {"num_layers": 4, "attention_types": [[["global", "local"], 2]]} if family == "gpt-neo" else {}
    layers = layers or ({"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4})
    model = tiny(family, dtype=torch.float32, vocab_size=260, **layers)
    target = Target(model, byte_tokenizer())
    examples = tokenize(read_conversations(chats), target.tokenizer, 48)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    choice = choose_exit(target, examples)
    assert [candidate.layer for candidate in choice.candidates] == [1, 2]
    assert choice.layer == max(choice.candidates, key=lambda candidate: candidate.speedup).layer
    assert all(0 <= c.agreement <= 1 and c.cost > 0 and c.chain >= 1 for c in choice.candidates)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_whose_rest_does_nothing_agrees_always(chats: Path) -> None:
    target = tiny_target(layers=4)
    with torch.no_grad():
        for layer in target.model.model.layers[1:3]:  # between the first and the last
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    examples = tokenize(read_conversations(chats), target.tokenizer, 128)
    choice = choose_exit(target, examples)
    assert choice.candidates[0].as_it_is > 0.999 and choice.candidates[0].agreement > 0.99
    assert choice.reason.startswith(f"exit after layer {choice.layer}: a probe agrees on 100%")


def test_the_expected_speed_up_is_that_of_the_geometric_law() -> None:
    costs = Costs(layers=10, first=0.2, each=0.1, token=0.05)
    assert costs.draft(3) == pytest.approx(0.4)
    emitted = 1 + 0.5 + 0.25
    # Two draft tokens; in verification the three lower layers over the last one, the rest over three tokens.
    assert costs.speedup(3, 0.5, 2) == pytest.approx(emitted / (2 * 0.4 + 3 * 0.1 + 1.1 * 0.7))
    chain, best = costs.best_chain(3, 0.5)
    assert best == max(costs.speedup(3, 0.5, n) for n in range(1, 13)) == costs.speedup(3, 0.5, chain)
    assert costs.best_chain(3, 0.9)[0] > chain and costs.best_chain(3, 0.9)[1] > best


def test_the_probe_s_map_is_linear_and_shrinks_to_no_change() -> None:
    torch.manual_seed(0)
    x, turn = torch.randn(4000, 8), torch.randn(8, 8)
    torch.testing.assert_close(_Map.fit(x, x @ turn + 3)(x), x @ turn + 3, atol=0.05, rtol=0.05)
    torch.testing.assert_close(_Map.fit(x, x)(x), x, atol=1e-5, rtol=1e-5)


def test_a_run_records_its_choice_and_keeps_it(chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    train(tiny_target(layers=4), auto(chats, tmp_path / "run"), console=Console(file=said, width=200))
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    choice = ExitChoice.recorded(record["exit_choice"])
    assert choice.reason in said.getvalue() and "best chain" in said.getvalue()
    assert record["config"]["exit_layer"] == choice.layer and asdict(choice) == record["exit_choice"]

    def again(*_: object) -> None:
        raise AssertionError("the choice is made once")

    monkeypatch.setattr("outdraft.methods.eesd.exit_choice.choose_exit", again)
    train(tiny_target(layers=4), auto(chats, tmp_path / "run"), resume=True, console=Console(file=io.StringIO()))
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["exit_choice"] == record["exit_choice"]


def test_the_plan_shows_the_comparison(chats: Path, tmp_path: Path) -> None:
    found = plan(tiny_target(layers=4), auto(chats, tmp_path / "run"))
    said = io.StringIO()
    found.show(Console(file=said, width=150))
    assert found.exit_choice is not None and found.exit_choice.reason in said.getvalue()
    assert not (tmp_path / "run").exists()


def test_the_command_line_trains_what_generates(chats: Path, tmp_path: Path) -> None:
    model, folder = save_model(tmp_path / "target", layers=4), tmp_path / "run"
    run = CliRunner().invoke
    given = ["train", "--model", model, "--method", "eesd", "--data", str(chats), "--dtype", "float32"]
    short = [*given, "--output-dir", str(folder), "--max-steps", "2", "--max-length", "64", "--report-to", "none"]
    done = run(app, [*short, "--exit-layer", "auto", "--own-head", "--loss", "hard", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tau"]["tau"] >= 1
    described = json.loads(run(app, ["info", str(folder), "--json"]).stdout)
    assert described["method"] == "eesd" and described["own_head"] and described["exit_layer"] in (1, 2)
    drafter = load_drafter_for(load_target(model), folder, method="eesd")
    assert drafter is not None and drafter.method == "eesd"
    text = run(app, ["generate", "red green", "--model", model, "--draft-model", str(folder), "--max-new-tokens", "4"])
    assert text.exit_code == 0, text.output


def test_the_command_line_names_what_is_missing(chats: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "target", layers=4)
    given = ["train", "--model", model, "--data", str(chats), "--output-dir", str(tmp_path / "run")]
    for more, says in ((["--method", "eesd"], "--exit-layer"), (["--exit-layer", "2"], "setting of eesd")):
        failed = CliRunner().invoke(app, [*given, *more])
        assert failed.exit_code != 0
        assert says in failed.output + str(failed.exception)
