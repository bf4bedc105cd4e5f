"""Every verb from end to end on a tiny model, and every mistake a user can make in one line with exit code 2."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import outdraft
from cli_fixtures import CONTEXT, Folders, make_folders, save_head, write_lines
from outdraft.cli import app
from outdraft.console.generate import Chat
from outdraft.target.backends import why_not_native


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("cli"))


def run(*args: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def succeeded(*args: object, stdin: str | None = None) -> Result:
    result = run(*args, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result


def parsed(*args: object) -> Any:
    return json.loads(succeeded(*args, "--json").stdout)


# --- generate ----------------------------------------------------------------------------------------------------


def test_generate_streams_the_text_to_stdout_and_the_figures_to_stderr(folders: Folders) -> None:
    result = succeeded("generate", "hello", "--model", folders.target, "-d", folders.drafter, "--max-new-tokens", 12)
    assert "tau" in result.stderr and "tokens/s" in result.stderr
    assert "tau" not in result.stdout


def test_generate_with_a_drafter_says_what_the_target_alone_says(folders: Folders) -> None:
    common = ("generate", "hello", "--model", folders.target, "--max-new-tokens", 24, "--dtype", "float32")
    plain = parsed(*common, "--method", "none")
    for more in (
        (),
        ("-d", folders.drafter, "--controller", "fixed"),
        ("-d", folders.eagle, "--num-speculative-tokens", 3),
        ("-d", folders.small_model),
        ("--method", "prompt-lookup"),
        ("-d", folders.drafter, "--tree-depth", 2, "--tree-top-k", 2, "--tree-size", 6, "--backend", "eager"),
    ):
        drafted = parsed(*common, *more)
        assert drafted["tokens"] == plain["tokens"]
        assert drafted["drafted"] > 0
        assert drafted["text"] == plain["text"]
    assert plain["method"] == "none" and plain["tau"] == 1.0


def test_generate_takes_its_prompt_from_a_file_or_stdin(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("hello\n")
    common = ("generate", "--model", folders.target, "--max-new-tokens", 8, "--dtype", "float32", "--json")
    texts = [
        json.loads(succeeded(*common, *more, stdin=stdin).stdout)["text"]
        for more, stdin in ((("hello",), None), (("--prompt-file", tmp_path / "prompt.txt"), None), ((), "hello\n"))
    ]
    assert texts[0] == texts[1] == texts[2]


def test_raw_prompts_leave_the_chat_template_out(folders: Folders) -> None:
    common = ("generate", "hello", "--model", folders.target, "--max-new-tokens", 4)
    assert parsed(*common, "--raw")["prompt_tokens"] == len("hello") < parsed(*common, "--chat")["prompt_tokens"]


def test_the_answer_follows_a_format(folders: Folders, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="outdraft[guided]")
    schema = {"type": "object", "properties": {"k": {"enum": ["new", "old"]}}, "required": ["k"]}
    schema |= {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
    (file := tmp_path / "schema.json").write_text(json.dumps(schema))
    common = ("generate", "hello", "--model", folders.target, "-d", folders.drafter, "--max-new-tokens", 40)
    found = [parsed(*common, "--response-format", given)["text"] for given in (file, json.dumps(schema))]
    assert found[0] == found[1] and json.loads(found[0])["k"] in ("new", "old")
    chosen = {"type": "choice", "choice": ["red", "blue"]}
    assert succeeded(*common, "--response-format", json.dumps(chosen)).stdout.strip() in chosen["choice"]
    assert parsed(*common, "--response-format", "json_object")["text"].startswith("{")
    for given, named in (
        (tmp_path / "absent.json", "absent.json cannot be read"),
        (folders.chats, "holds none"),
        ('{"type": "regex"}', "needs regex"),
        ('{"type": "object", "not": {}}', 'keys: ["not"]; leave them out'),
        ('{"type": "array", "uniqueItems": true}', 'keys: ["uniqueItems"]'),
        ('{"type": "object", "propertyNames": {"pattern": "^a"}}', 'keys: ["propertyNames"]'),
        ("[1]", "cannot be read"),
    ):
        assert named in refused(*common, "--response-format", given)


def test_sampling_is_repeatable_by_its_seed(folders: Folders) -> None:
    common = ("generate", "hello", "--model", folders.target, "--top-p", 0.9, "--max-new-tokens", 16, "--seed")
    assert parsed(*common, 1)["tokens"] == parsed(*common, 1)["tokens"] != parsed(*common, 2)["tokens"]


def test_show_drafts_colours_accepted_tokens(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    common = ("generate", "hello", "--model", folders.target, "--dtype", "float32", "--max-new-tokens", 12)
    itself = ("-d", folders.target)  # a draft model that is always right
    assert parsed(*common, *itself)["from_draft"].count(True) == 10
    assert "\x1b[" in succeeded(*common, *itself, "--show-drafts").stdout
    assert "\x1b[" not in succeeded(*common, *itself).stdout
    assert "\x1b[" not in succeeded(*common, "--show-drafts").stdout


def test_a_controller_decides_how_far_to_draft_and_never_what_comes_out(folders: Folders) -> None:
    common = ("generate", "hello", "--model", folders.target, "--dtype", "float32", "--max-new-tokens", 24)
    plain = parsed(*common)
    for controller in ("fixed", "confidence", "beta", "calibrated,discount=0.95", "auto"):
        drafted = parsed(*common, "-d", folders.target, "--controller", controller, "--num-speculative-tokens", 5)
        assert drafted["text"] == plain["text"]
        assert sum(drafted["draft_lengths"]) == drafted["rounds"]
        assert drafted["drafted"] == sum(n * rounds for n, rounds in enumerate(drafted["draft_lengths"]))
        assert drafted["drafted"] > 0


def test_bench_runs_every_drafter_with_every_controller(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("hello\nwhat is this\n")
    result = parsed(
        *("bench", "--model", folders.target, "-d", folders.drafter, "--data", tmp_path / "prompts.txt"),
        *("--methods", "none,prompt-lookup,fspad", "--controllers", "fixed,calibrated"),
        *("--max-new-tokens", 12, "--dtype", "float32"),
    )
    methods = result["results"][0]["methods"]
    rivals = [f"{name} {controller}" for name in ("prompt-lookup", "fspad") for controller in ("fixed", "calibrated")]
    assert list(methods) == ["plain", *rivals]
    assert all(methods[name]["identical"] is True and sum(methods[name]["draft_lengths"]) > 0 for name in rivals)


# --- chat --------------------------------------------------------------------------------------------------------


def test_chat_answers_and_obeys_its_commands(folders: Folders) -> None:
    lines = "hello\n/plain\nhow are you?\n/plain\n/reset\n/dance\n/exit\nnever read\n"
    settings = ("--model", folders.target, "-d", folders.drafter, "--max-new-tokens", 6)
    result = succeeded("chat", *settings, stdin=lines)
    assert result.stderr.count("tokens/s") == 2
    for remark in ("plain decoding", "with drafts (fspad)", "begins anew", "unknown command /dance"):
        assert remark in result.stderr


def test_chat_takes_a_system_message_a_temperature_and_explains_tau(folders: Folders) -> None:
    lines = "/help\n/system Be kind\nhello\n/temperature 0.5\nhello\n/temperature hot\n/system\n"
    result = succeeded(
        "chat", "--model", folders.target, "--max-new-tokens", 4, "--show-drafts", "--seed", 0, stdin=lines
    )
    told = " ".join(result.stderr.split())
    for remark in ("tau is how many tokens", "begins anew", "temperature 0.5", "such as /temperature 0.7"):
        assert remark in told
    assert "tinted" in told and "unknown command /system" in told and told.count("tokens/s") == 2


def test_chat_keeps_what_was_said_before_ctrl_c(folders: Folders) -> None:
    loaded = outdraft.load(folders.target, dtype="float32")
    said = io.StringIO()
    chat = Chat(loaded, {"max_new_tokens": 8}, {}, Console(file=io.StringIO()), Console(file=said))
    whole = "".join(piece.text for piece in loaded.stream([{"role": "user", "content": "hello"}], max_new_tokens=8))

    def stopped(pieces: int) -> None:
        stream = type(loaded).stream

        def some(self: Any, *args: Any, **settings: Any) -> Any:
            for count, piece in enumerate(stream(self, *args, **settings)):
                if count == pieces:
                    raise KeyboardInterrupt
                yield piece

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(type(loaded), "stream", some)
            chat.answer("hello")

    stopped(0)
    assert not chat.history and "forgotten" in said.getvalue()
    stopped(4)
    assert [turn["role"] for turn in chat.history] == ["user", "assistant"]
    assert chat.history[1]["content"] and whole.startswith(chat.history[1]["content"])
    assert "what was said so far is kept" in said.getvalue()


def test_generate_says_where_rounding_may_decide(folders: Folders) -> None:
    common = ("generate", "hello", "--model", folders.target, "-d", folders.target, "--max-new-tokens", 12)
    assert "--exact rules it out" in succeeded(*common, "--dtype", "bfloat16", "--backend", "packed").stderr
    for settled in (("float32",), ("bfloat16", "--temperature", 1)):
        assert "--exact rules it out" not in succeeded(*common, "--dtype", *settled).stderr
    if why_not_native() is None:  # on whose kernels a token's company changes nothing
        shipped = ("generate", "hello", "-d", "reference", "--max-new-tokens", 12, "--dtype", "bfloat16")
        assert "--exact rules it out" not in succeeded(*shipped).stderr


def test_flags_take_no_value_in_the_help() -> None:
    for verb in ((), ("train",), ("bench",), ("generate",)):
        assert "bool" not in succeeded(*verb, "--help").stdout


def test_chat_says_when_the_context_is_full_and_goes_on(folders: Folders) -> None:
    lines = f"{'x' * CONTEXT}\nhello\n"
    result = succeeded("chat", "--model", folders.target, "--max-new-tokens", 4, stdin=lines)
    assert f"the model's context is {CONTEXT}" in result.stderr and "/reset" in result.stderr
    assert result.stderr.count("tokens/s") == 1


# --- train, regenerate, info ---------------------------------------------------------------------------------------


def test_train_writes_a_drafter_and_measures_tau_on_held_out_prompts(folders: Folders, tmp_path: Path) -> None:
    common = ("train", "--model", folders.target, "--output-dir", tmp_path / "run", "--max-length", 64)
    settings = ("--data", folders.chats, "--max-steps", 4, "--report-to", "none", "eval_steps=2", "batch_size=4")
    found = parsed(*common, *settings)
    assert found["steps"] == 4 and found["tau"]["tau"] >= 1
    held_out = (tmp_path / "run/data/held_out.jsonl").read_text().splitlines()
    assert len(held_out) == 1 and len((tmp_path / "run/data/train.jsonl").read_text().splitlines()) == 11
    assert parsed("info", tmp_path / "run")["method"] == "fspad"
    again = run(*common, *settings)
    assert again.exit_code == 2 and "--resume" in again.stderr
    assert parsed(*common, *settings, "--resume")["steps"] == 4


def test_train_reads_a_file_then_overrides_then_flags(folders: Folders, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {folders.target}\ndata: {folders.chats}\noutput_dir: {tmp_path / 'run'}\n"
        "method: eagle\nmax_steps: 7\nlearning_rate: 1.0e-3\nmax_length: 64\n"
    )
    plan = parsed("train", "--config", config, "--dry-run", "max_steps=9", "learning_rate=1e-2", "--max-steps", 5)
    assert (plan["method"], plan["steps"], plan["learning_rate"]) == ("eagle", 5, 0.01)
    assert not (tmp_path / "run").exists()
    shown = succeeded("train", "--config", config, "--dry-run").stdout
    assert "training plan" in shown and "eagle" in shown


def test_a_tracker_that_is_missing_is_named_before_a_dry_run(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    given = ("train", "--model", folders.target, "--data", folders.chats, "--output-dir", tmp_path / "run")
    for dry in ((), ("--dry-run",)):
        said = refused(*given, "--report-to", "wandb", *dry)
        assert "report_to wandb" in said and "pip install wandb" in said
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_chat_template_is_told_of_its_switches(folders: Folders, tmp_path: Path) -> None:
    model = shutil.copytree(folders.target, tmp_path / "target")
    config = json.loads((model / "tokenizer_config.json").read_text())
    said = "{% if enable_thinking is defined and not enable_thinking %}no thoughts{% endif %}"
    for file in model.glob("*.jinja"):
        file.write_text(said + file.read_text())
    if "chat_template" in config:
        config["chat_template"] = said + config["chat_template"]
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    off = ("--chat-template-kwargs", '{"enable_thinking": false}')
    common = ("train", "--model", model, "--data", folders.chats, "--max-steps", 1, "--max-length", 999)
    plain = parsed(*common, "--output-dir", tmp_path / "a", "--report-to", "none", "--dry-run")
    told = parsed(*common, "--output-dir", tmp_path / "b", "--report-to", "none", "--dry-run", *off)
    assert told["tokens"] == plain["tokens"] + plain["examples"] * len("no thoughts")
    assert "no switch" in refused(*common, "--output-dir", tmp_path / "c", "chat_template_kwargs.tokenize=false")
    answers = ("regenerate", "--model", model, "--data", folders.chats, "--max-new-tokens", 2, "--output")
    assert parsed(*answers, tmp_path / "plain.jsonl")["written"] == 12
    assert parsed(*answers, tmp_path / "told.jsonl", *off)["written"] == 12
    assert "chat_template_kwargs" in refused(*answers, tmp_path / "plain.jsonl", *off)


def test_train_measures_on_given_prompts(folders: Folders, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "eval.jsonl", {"prompt": "one two"}, {"turns": ["three"]})
    found = parsed(
        *("train", "--model", folders.target, "--data", folders.chats, "--output-dir", tmp_path / "run"),
        *("--eval-data", prompts, "--max-steps", 1, "--max-length", 64, "--report-to", "none"),
    )
    assert found["tau"]["tau"] >= 1
    assert not (tmp_path / "run/data").exists()


def test_regenerate_answers_and_goes_on(folders: Folders, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    common = ("regenerate", "--model", folders.target, "--data", folders.chats, "--output", output)
    settings = ("--max-new-tokens", 8, "--dtype", "float32", "--temperature", "0,1", "--batch-size", 5)
    assert parsed(*common, *settings)["written"] == 24
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) // 2])
    assert 0 < parsed(*common, *settings)["written"] < 24
    assert output.read_bytes() == whole
    said = succeeded(*common, *settings).stdout
    assert "0 written, 24 were there" in said
    greedy = ("--max-new-tokens", 8, "--dtype", "float32", "--output")
    plain, drafted = tmp_path / "plain.jsonl", tmp_path / "drafted.jsonl"
    said = succeeded(*common, *greedy, plain).stdout
    assert "12 written" in said and "tokens/s" in said and "ended by themselves" in said and "tau" not in said
    for more in (("-d", folders.drafter), ("--method", "prompt-lookup")):
        drafted.unlink(missing_ok=True)
        assert "tau" in succeeded(*common, *greedy, drafted, *more).stdout
        assert drafted.read_bytes() == plain.read_bytes()


def test_regenerate_interrupted_says_how_to_go_on(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outdraft.training.regenerate import RowPool

    def interrupted(pool: RowPool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RowPool, "step", interrupted)
    result = run("regenerate", "--model", folders.target, "--data", folders.chats, "-o", tmp_path / "o.jsonl")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == (
        f"interrupted: 0 of 12 answers are in {tmp_path / 'o.jsonl'}; run it again to go on"
    )


def test_regenerate_refuses_what_would_do_nothing(folders: Folders, tmp_path: Path) -> None:
    common = ("regenerate", "--model", folders.target, "--data", folders.chats, "-o", tmp_path / "o.jsonl")
    assert "--top-p changes nothing at temperature 0" in refused(*common, "--top-p", 0.9)
    assert "numbers with commas" in refused(*common, "--temperature", "warm")
    assert "at least 1" in refused(*common, "--batch-size", 0)


def test_info_tells_models_from_drafters(folders: Folders) -> None:
    model = parsed("info", folders.target)
    assert (model["kind"], model["family"], model["verifies_trees"], model["context"]) == (
        *("model", "llama", True, CONTEXT),
    )
    assert model["chat_template"] and model["here"]["backend"] in ("native", "packed", "eager")
    drafter = parsed("info", folders.eagle)
    assert (drafter["kind"], drafter["method"], drafter["fits_targets_with"]["vocab_size"]) == ("drafter", "eagle", 260)
    assert "verifies trees" in succeeded("info", folders.target).stdout


def test_info_names_what_a_drafter_has_beyond_the_paper(folders: Folders, tmp_path: Path) -> None:
    beyond = {"tap_layers": [1, 2], "state_norm": True, "draft_vocab_size": 40}
    found = parsed("info", save_head(tmp_path / "beyond", **{**beyond, "tap_layers": (1, 2)}))
    assert {name: found[name] for name in beyond} == beyond
    shown = succeeded("info", tmp_path / "beyond").stdout
    rows = {name.strip(): value.strip() for _, name, value, _ in (line.split("│") for line in shown.splitlines()[1:-1])}
    assert (rows["tap layers"], rows["state norm"], rows["draft vocab size"]) == ("1, 2", "yes", "40")
    assert not beyond.keys() & parsed("info", folders.eagle).keys(), "the paper's own need no naming"


def test_info_says_why_a_model_cannot_verify_trees(tmp_path: Path) -> None:
    config = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32, "state_size": 4}
    write_lines(tmp_path / "config.json", {**config, "architectures": ["MambaForCausalLM"]})
    facts = parsed("info", tmp_path)
    assert not facts["verifies_trees"] and facts["why_not"]


# --- bench -------------------------------------------------------------------------------------------------------


def test_bench_compares_all_methods_greedy_and_sampled(folders: Folders, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", {"prompt": "one two"}, {"turns": ["three", "four"]})
    found = parsed(
        *("bench", "--model", folders.target, "--data", prompts, "--temperatures", "0,1", "--repetitions", 2),
        *("-d", folders.drafter, "-d", f"small={folders.small_model}", "-d", folders.eagle, "--include-transformers"),
        *("--methods", "none,prompt-lookup,fspad,eagle,draft-model", "--max-new-tokens", 10, "--dtype", "float32"),
    )
    assert [result["temperature"] for result in found["results"]] == [0, 1]
    greedy, sampled = (result["methods"] for result in found["results"])
    names = ["plain", "transformers generate", "prompt-lookup", "fspad", "small", "eagle"]
    assert list(greedy) == list(sampled) == names
    assert all(method["identical"] is True for method in greedy.values())
    assert all(method["identical"] is None for method in sampled.values())
    assert greedy["plain"]["speedup"] == 1.0 and greedy["plain"]["tau"] == 1.0
    for method in greedy.values():
        low, high = method["speedup_interval"]
        assert low <= method["speedup"] <= high and method["tokens_per_second"] > 0
    assert found["environment"]["dtype"] == "float32" and found["settings"]["prompts"] == 2


def test_bench_prints_a_table(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    result = succeeded(
        *("bench", "--model", folders.target, "--data", tmp_path / "prompts.txt", "--limit", 1),
        *("-d", folders.drafter, "--max-new-tokens", 6, "--dtype", "float32"),
    )
    assert "prompt-lookup" in result.stdout and "fspad" in result.stdout and "yes" in result.stdout


# --- mistakes ----------------------------------------------------------------------------------------------------


def refused(*args: object) -> str:
    """The one line that a mistake is answered with."""
    result = run(*args)
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.output
    return lines[0]


def test_missing_folders(folders: Folders, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert str(absent) in refused("generate", "hi", "--model", absent)
    assert str(absent) in refused("generate", "hi", "--model", folders.target, "-d", absent)
    assert str(absent) in refused("info", absent)
    assert str(absent) in refused("train", "--model", absent, "--data", folders.chats, "--output-dir", tmp_path / "o")
    assert str(absent) in refused("train", "--model", folders.target, "--data", absent, "--output-dir", tmp_path / "o")
    assert str(absent) in refused("bench", "--model", folders.target, "--data", absent)
    assert str(absent) in refused("generate", "--model", folders.target, "--prompt-file", absent)
    assert "config.json" in refused("generate", "hi", "--model", tmp_path)


def test_a_drafter_in_the_models_place_is_called_one(folders: Folders) -> None:
    said = refused("generate", "hi", "--model", folders.drafter)
    assert said == (
        f"error: '{folders.drafter}' is a drafter; give it with --draft-model, and the model that it was trained for "
        "with --model"
    )


def test_a_text_without_its_quotes_names_the_fix() -> None:
    assert "did not expect there”; put a text in straight quotes" in refused("generate", "“Hi", "there”")


def test_a_name_near_that_of_a_shipped_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_session", Mock())
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", Mock(side_effect=OSError("no such file")))
    assert refused("generate", "hi", "--model", "smolm2").endswith("; did you mean 'smollm2'?")


@pytest.mark.parametrize("name", ["no-such-folder", "no-such/folder"])
def test_names_that_are_neither_folders_nor_on_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def offline(*args: Any, **settings: Any) -> None:
        raise OSError("no connection\nsee the manual")

    monkeypatch.setattr("huggingface_hub.get_session", Mock())  # this machine has a connection, or so it looks
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", offline)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", offline)
    for command in (("generate", "hi", "--model", name), ("info", name)):
        said = refused(*command)
        assert f"'{name}' is no folder here" in said and "(no connection)" in said
    for command in (("generate", "hi", "--model", f"./{name}"), ("info", f"./{name}")):
        assert "Hub" not in refused(*command), "a path is nothing else"


def test_outputs_that_cannot_be_written(folders: Folders, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    both = ("--model", folders.target, "--data", folders.chats)
    for command in (("train", *both, "--max-steps", 1, "--output-dir"), ("regenerate", *both, "--output")):
        result = run(*command, file / "x")
        assert result.exit_code == 2, result.stderr
        said = result.stderr.splitlines()[-1]
        assert said.startswith(f"error: {file}") and "check the path" in said


def test_drafters_of_other_targets(folders: Folders) -> None:
    assert "hidden_size 32" in refused("generate", "hi", "--model", folders.target, "-d", folders.wider)
    larger = refused("generate", "hi", "--model", folders.target, "-d", folders.larger_vocabulary)
    assert "vocab_size 300" in larger


def test_truncated_weights(folders: Folders, tmp_path: Path) -> None:
    for source in (folders.drafter, folders.target):
        broken = tmp_path / Path(source).name
        shutil.copytree(source, broken)
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert "broken" in str(refused("info", broken)) or "damaged" in refused("info", broken)
    assert "drafter" in refused("generate", "hi", "--model", folders.target, "-d", tmp_path / "drafter")
    assert "copy or download them again" in refused("generate", "hi", "--model", tmp_path / "target")
    (tmp_path / "target" / "tokenizer.json").write_text("{}")
    shutil.copy(Path(folders.target) / "model.safetensors", tmp_path / "target")
    said = refused("generate", "hi", "--model", tmp_path / "target")
    assert "the tokenizer in" in said and "copy or download them again" in said


def test_broken_and_empty_data(folders: Folders, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    broken = write_lines(tmp_path / "broken.jsonl", good, good, '{"messages": [')
    empty = write_lines(tmp_path / "empty.jsonl")
    train = ("train", "--model", folders.target, "--output-dir", tmp_path / "o", "--data")
    again = ("regenerate", "--model", folders.target, "--output", tmp_path / "o.jsonl", "--data")
    bench = ("bench", "--model", folders.target, "--data")
    for command in (train, again, bench):
        assert f"{broken}:3" in refused(*command, broken)
        assert "empty" in refused(*command, empty)
    assert f"{broken}:3" in refused(*train, broken, "--dry-run")
    assert f"{broken}:1" in refused(*bench, write_lines(broken, {"words": 1}))


def test_a_folder_where_a_file_of_prompts_is_wanted(folders: Folders, tmp_path: Path) -> None:
    both = ("--model", folders.target, "-d", folders.drafter, "--data", tmp_path)
    for verb in ("verify", "doctor", "advise"):
        assert f"{tmp_path} is a folder; give" in refused(verb, *both)
    assert "leaves no room" in refused(
        *("regenerate", "--model", folders.target, "--data", folders.chats),
        *("--output", tmp_path / "o.jsonl", "--max-new-tokens", 10**7),
    )
    assert not (tmp_path / "o.jsonl").exists()


def test_prompts_beyond_the_context(folders: Folders, tmp_path: Path) -> None:
    long = "x" * CONTEXT
    assert f"context is {CONTEXT}" in refused("generate", long, "--model", folders.target)
    prompts = write_lines(tmp_path / "long.jsonl", {"prompt": "x"}, {"prompt": long})
    assert "prompt 2" in refused("bench", "--model", folders.target, "--data", prompts)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--tree-size", 0), "tree_size"),
        (("--tree-top-k", 0), "tree_top_k"),
        (("--tree-depth", -1), "tree_depth"),
        (("--num-speculative-tokens", 0), "num_speculative_tokens"),
        (("--num-speculative-tokens", 3, "--tree-size", 4), "num_speculative_tokens"),
        (("--method", "hydra"), "hydra"),
        (("--method", "eagle"), "eagle"),
        (("--backend", "quick"), "quick"),
        (("--dtype", "int3"), "int3"),
        (("--device", "abacus"), "abacus"),
        (("--temperature", -1), "temperature"),
        (("--seed", 2**80), "seed must lie between"),
        (("--top-p", 0), "top_p"),
        (("--top-p", 1.5), "top_p"),
        (("--min-p", 2), "min_p"),
        (("--top-k", -3), "top_k"),
        (("--repetition-penalty", 0), "repetition_penalty"),
        (("--max-new-tokens", -1), "max_new_tokens"),
        (("--max-new-tokens", "many"), "--max-new-tokens"),
        (("--prompt-file", "x.txt"), "--prompt-file"),
        (("--no-such-flag",), "--no-such-flag"),
    ],
    ids=lambda value: "=".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_settings_that_cannot_be(folders: Folders, flags: tuple[object, ...], named: str) -> None:
    assert named in refused("generate", "hi", "--model", folders.target, "-d", folders.drafter, *flags)


def test_tree_settings_without_a_drafter(folders: Folders) -> None:
    assert "--tree-size" in refused("generate", "hi", "--model", folders.target, "--method", "none", "--tree-size", 0)


def test_training_settings_that_cannot_be(folders: Folders, tmp_path: Path) -> None:
    train = ("train", "--model", folders.target, "--data", folders.chats, "--output-dir", tmp_path / "o")
    assert "learning_speed" in refused(*train, "learning_speed=3")
    assert "optimizer" in refused(*train, "optimizer.lr=3")
    assert "max_length" in refused(*train, "--max-length", 1)
    assert "key=value" in refused(*train, "fast")
    assert "method" in refused(*train, "--method", "hydra")
    config = tmp_path / "c.yaml"
    config.write_text("learning_rates: 1\n")
    assert "learning_rates" in refused(*train, "--config", config)
    config.write_text("a: [1\n")
    assert "line" in refused(*train, "--config", config)
    assert "--model" in refused("train", "--data", folders.chats, "--output-dir", tmp_path / "o")
    assert "data" in refused("train", "--model", folders.target, "--output-dir", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_bench_settings_that_cannot_be(folders: Folders, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", {"prompt": "x"})
    bench = ("bench", "--model", folders.target, "--data", prompts)
    assert "warm" in refused(*bench, "--temperatures", "warm")
    assert "temperature" in refused(*bench, "--temperatures", "0,-1")
    assert "--draft-model" in refused(*bench, "--methods", "none,fspad")
    assert "hydra" in refused(*bench, "--methods", "hydra")
    assert "--methods" in refused(*bench, "--methods", "none", "-d", folders.drafter)
    assert "--controllers" in refused(*bench, "--controllers", "clever")
    assert "--repetitions" in refused(*bench, "--repetitions", 0)
    for limit in (0, -1):
        assert "--limit" in refused(*bench, "--limit", limit)
        assert "--limit" in refused("bench", "--model", folders.target, "--limit", limit), "the shipped prompts too"


# --- the program itself ------------------------------------------------------------------------------------------


def test_help_comes_without_torch() -> None:
    help_text = "from outdraft.cli import app; app(['train', '--help'], standalone_mode=False)"
    code = f"import sys; {help_text}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert result.stdout.strip().endswith("False"), result.stderr
    assert "Peak learning rate." in result.stdout


def test_the_installed_program_prints_one_line_and_exits_with_2(folders: Folders) -> None:
    command = [sys.executable, "-m", "outdraft.cli", "generate", "hi", "--model", folders.target, "--dtype", "int3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)


def test_interrupts_end_with_130_and_a_line(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("outdraft.api.generation.load", interrupt)
    result = run("generate", "hi", "--model", folders.target)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_defects_say_so_in_a_line_and_debug_shows_where(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("outdraft.api.generation.load", fail)
    result = run("generate", "hi", "--model", folders.target)
    assert result.exit_code == 1 and result.stderr.startswith("internal error: ZeroDivisionError: by zero")
    assert isinstance(run("--debug", "generate", "hi").exception, ZeroDivisionError)


def test_version_and_bare_call() -> None:
    assert succeeded("--version").stdout.strip() == outdraft.__version__
    assert "generate" in succeeded().stdout


def test_the_hub_s_retries_are_not_said() -> None:
    """Without a network they would stand before the one line that names the fix."""
    script = (
        "from outdraft.console.app import quiet_libraries; quiet_libraries(); "
        "from huggingface_hub.utils import logging; print(logging.get_verbosity() == logging.ERROR)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "True", done.stderr
