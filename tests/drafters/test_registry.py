"""The registry of methods: its records agree with the rest of the package, and whatever is in it can be had by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import outdraft.methods
from cli_fixtures import Folders, make_folders
from drafters.dflash_reference import BlockShape, block_folder
from drafters.eagle3_reference import Eagle3Shape, eagle3_folder
from models import tiny
from outdraft.api.loading import load_drafter_for
from outdraft.cli import app
from outdraft.console.facts import describe
from outdraft.core.shape import TreeShape
from outdraft.core.tree import Tree
from outdraft.drafting.base import Drafter, DraftState, Limits, RowContext, Update
from outdraft.errors import UserError
from outdraft.export.export import export_drafter
from outdraft.methods import registry
from outdraft.methods.checkpoint import method_of, save_drafter, target_facts
from outdraft.methods.registry import Method, methods, names, readers, register, trained, without_model
from outdraft.target.target import Target
from outdraft.training.config import PRESETS, DrafterConfig
from outdraft.training.preparation import new_drafter

FOLDERS = Path(registry.__file__).parent


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("registry"))


def run(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


# --- records -----------------------------------------------------------------------------------------------------


def test_every_folder_of_methods_is_in_the_registry(own: None) -> None:
    known = {type(method).__module__ for method in methods().values()}
    assert known == {f"outdraft.methods.{folder.parent.name}" for folder in FOLDERS.glob("*/__init__.py")}
    assert set(without_model()) < set(names()) and "none" not in methods()


def test_what_records_say_of_settings_is_true_of_the_settings() -> None:
    for method in methods().values():
        assert method.settings <= set(DrafterConfig.model_fields)
        assert set(method.presets) <= set(PRESETS)
        for recipe in method.presets.values():
            assert set(recipe) <= set(DrafterConfig.model_fields)
        assert bool(method.settings) == method.trained == bool(method.card)
    assert readers("unroll_steps") == ("eagle3", "fspad", "eagle") and readers("own_head") == ("eesd", "medusa")
    assert readers("learning_rate") == ()


@pytest.mark.parametrize("name", methods())
def test_a_method_says_what_it_exports_or_why_it_does_not(name: str) -> None:
    method = methods()[name]
    exports = bool(method.exporter) or type(method).export is not Method.export
    assert exports == (method.no_export is None)


@pytest.mark.parametrize("verb", ["generate", "bench", "train"])
def test_help_lists_the_methods(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    said = run(verb, "--help").output
    assert [name for name in (trained() if verb == "train" else names()) if name not in said] == [], said


def test_an_unknown_method_is_answered_with_those_that_there_are(folders: Folders) -> None:
    wrong = run("generate", "hi", "--model", folders.target, "--method", "clever")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1) and ", ".join(names()) in wrong.stderr
    with pytest.raises(UserError, match="\"method\" cannot be 'prompt-lookup': Input should be 'dflash', "):
        DrafterConfig(output_dir="none", method="prompt-lookup")


# --- every method ------------------------------------------------------------------------------------------------


def saved(name: str, target: Target, folder: Path) -> Path:
    """A drafter of the method in its folder, with the weights that it begins with."""
    if name == "eagle3":
        return eagle3_folder(folder, "specforge", Eagle3Shape())
    if name in ("dflash", "dspark"):
        own = {"anchor_first": True, "markov_rank": 4} if name == "dspark" else {}
        return block_folder(folder, "speculators", BlockShape(**own), (1, 2, 3))
    more = {"exit_layer": 1} if name == "eesd" else {}
    network = new_drafter(target, DrafterConfig(output_dir=folder, method=name, **more).with_preset(10**6))
    return save_drafter(folder, network, target_id="tiny", target=target_facts(target.model))


@pytest.mark.parametrize("name", [name for name, method in methods().items() if method.needs_model])
def test_a_method_reads_its_own_folder(name: str, tmp_path: Path) -> None:
    target = Target(tiny("llama-gqa", num_hidden_layers=6).float())
    if name == "draft-model":
        drafter = load_drafter_for(target, tiny("llama-gqa").float(), method=name)
        assert drafter is not None and drafter.method == name
        return
    folder = saved(name, target, tmp_path / "drafter")
    assert method_of(folder).name == name
    drafter = load_drafter_for(target, folder, method=name)
    assert drafter is not None and drafter.method == name
    facts = describe(str(folder), "cpu")
    assert (facts["kind"], facts["method"]) == ("drafter", name) and facts["parameters"] > 0
    if (reason := methods()[name].no_export) is not None:
        with pytest.raises(UserError) as error:
            export_drafter("reference", folder, "vllm", tmp_path / "out")
        assert str(error.value) == reason.format(method=name, folder=folder) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", without_model())
def test_a_method_without_a_model_needs_its_name_alone(name: str) -> None:
    drafter = load_drafter_for(Target(tiny("llama-gqa")), None, method=name)
    assert drafter is not None and drafter.method == name


# --- methods of others -------------------------------------------------------------------------------------------


class Last(Drafter):
    """Guesses that the last token comes again."""

    method = "last-again"
    limits = Limits(probs=False)

    def begin(self, prompts: Any, run: Any) -> LastState:
        return LastState()


class LastState(DraftState):
    def propose(self, update: Update, shape: TreeShape, rows: RowContext) -> Tree:
        roots = update.roots[:, None]
        return Tree(roots.expand(-1, 2), torch.tensor([[-1, 0]]).expand(len(roots), -1), [2] * len(roots))

    def select_rows(self, rows: Any) -> None:
        pass


class LastMethod(Method):
    name, summary, needs_model = "last-again", "the last token again", False

    def bind(self, network: Any, target: Target) -> Last:
        return Last()


def test_a_registered_method_is_had_by_its_name(own: None, folders: Folders) -> None:
    common = ("generate", "one two", "--model", folders.target, "--max-new-tokens", 12, "--json", "--dtype", "float32")
    assert run(*common, "--method", "last-again").exit_code == 2
    register(LastMethod())
    found, plain = (json.loads(run(*common, "--method", name).stdout) for name in ("last-again", "none"))
    assert found["method"] == "last-again" and found["tokens"] == plain["tokens"]
    assert "last-again" in names() and "last-again" in without_model()


def test_a_name_is_given_once(own: None) -> None:
    method = LastMethod()
    register(method)
    register(method)
    for name in ("last-again", "fspad", "none"):
        other = LastMethod()
        other.name = name
        with pytest.raises(UserError, match=f"two drafting methods are called '{name}'"):
            register(other)


@pytest.mark.parametrize("name", registry._installed())
def test_every_part_that_a_record_names_exists(name: str) -> None:
    record = registry._installed()[name]
    parts = ("loader", "drafter", "beginning", "training", "exporter", "network")
    named = {part: place for part in parts if (place := getattr(record, part, ""))}
    assert all(callable(resolve_name(place)) for place in named.values())


def test_a_folder_of_methods_is_all_that_a_method_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    record = (
        "from outdraft.methods.registry import Method\n\n\nclass Mine(Method):\n    name, summary = 'mine', 'mine'\n"
    )
    (tmp_path / "mine" / "__init__.py").write_text(record + "\n\nMETHODS = (Mine(),)\n")
    monkeypatch.setattr(outdraft.methods, "__path__", [*outdraft.methods.__path__, str(tmp_path)])
    found = registry._installed.__wrapped__()
    assert set(found) == {*registry._installed(), "mine"}
    monkeypatch.delitem(sys.modules, "outdraft.methods.mine")


def test_an_installed_method_that_cannot_be_loaded_costs_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Method:
        raise ImportError("no module of that name")

    def entries(*loads: Callable[[], object]) -> Callable[..., list[SimpleNamespace]]:
        return lambda group: [SimpleNamespace(name="theirs", load=load) for load in loads]

    monkeypatch.setattr(registry, "entry_points", entries(broken, lambda: (LastMethod(),)))
    with pytest.warns(UserWarning, match="drafting method 'theirs' cannot be loaded .*no module of that name"):
        found = registry._installed.__wrapped__()
    assert {"last-again", "fspad"} <= set(found)
