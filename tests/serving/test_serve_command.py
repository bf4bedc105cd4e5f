"""`outdraft serve` from the outside: it says where it listens, answers, and ends well; mistakes are one line."""

from __future__ import annotations

import builtins
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import PATIENCE
from typer.testing import CliRunner

from cli_fixtures import Folders, make_folders
from outdraft.cli import app
from outdraft.serving.server import listen


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("folders"))


def test_it_listens_answers_and_ends_when_told_to(folders: Folders, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "outdraft.cli", "serve", "--model", folders.target, "-d", folders.drafter]
    command += ["--port", "0", "--temperature", "0", "--dtype", "float32", "--tree-size", "5"]
    command += ["--log-requests"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OUTDRAFT_API_KEY": "secret", "COLUMNS": "200"}
    log = tmp_path / "log"
    with log.open("wb") as remarks:
        server = subprocess.Popen(command, stderr=remarks, stdout=subprocess.PIPE, env=environment)
    try:
        while (found := re.search(r"listening on (http://127\.0\.0\.1:\d+)", log.read_text())) is None:
            assert server.poll() is None, log.read_text()
            time.sleep(0.05)
        assert "target, drafter: fspad" in log.read_text(), "named by its folder, without what lies above it"
        key = {"Authorization": "Bearer secret"}
        body = {"model": "target", "prompt": "red", "max_tokens": 5}
        answers = [httpx.post(f"{found[1]}/v1/completions", json=body, headers=key, timeout=None) for _ in range(2)]
        texts = {answer.json()["choices"][0]["text"] for answer in answers}
        assert len(texts) == 1, "the server's own temperature is 0"
        for answer in answers:
            assert f" {answer.json()['id']} prompt_tokens=3 completion_tokens=" in log.read_text()
        assert httpx.get(f"{found[1]}/v1/models", timeout=None).status_code == 401
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 0
        assert server.stdout is not None and not server.stdout.read()
        assert "temperature 0 where a request names none" in log.read_text()
        assert "shutting down: running requests have 30 seconds to finish" in log.read_text()
        assert "Traceback" not in log.read_text() and "secret" not in log.read_text()
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "70000"], "--port must be at most 65535"),
        (["--host", ""], "--host must be an address"),
        (["--served-model-name", " "], "--served-model-name must not be empty"),
        (["--temperature", "inf"], "temperature must be finite, not inf"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--method", "none", "--tree-size", "5"], "--tree-size shapes what a drafter drafts"),
        (["--kv-cache-tokens", "1"], "--kv-cache-tokens must be at least 2"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--max-model-len", "9999"], "--max-model-len 9999 exceeds the model's context of 1024"),
        (["--request-timeout", "0"], "--request-timeout 0 would refuse every request"),
        (["--allow-origin", "example.com"], "--allow-origin must be * or like https://example.com"),
        (["--allow-origin", "https://example.com/"], "without a path"),
        (["-d", "DRAFTER", "--controller", "none"], "none"),
    ],
)
def test_mistakes_are_one_line(folders: Folders, flags: list[str], said: str) -> None:
    flags = [folders.drafter if flag == "DRAFTER" else flag for flag in flags]
    port = [] if "--port" in flags else ["--port", "0"]
    done = CliRunner().invoke(app, ["serve", "--model", folders.target, *port, *flags])
    assert done.exit_code == 2 and said in done.output and done.output.count("\n") == 1


def test_an_address_in_use_is_said_before_anything_is_loaded() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(app, ["serve", "--model", "no/such-model", "--port", port])
    assert done.exit_code == 2 and f"cannot listen on 127.0.0.1:{port}" in done.output


def test_without_the_extra_one_line_names_it(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("fastapi", "outdraft.serving"))]:
        monkeypatch.delitem(sys.modules, name)
    whole = builtins.__import__

    def absent(name: str, *args: Any, **settings: Any) -> Any:
        if name.split(".")[0] == "fastapi":
            raise ImportError(name, name=name)
        return whole(name, *args, **settings)

    monkeypatch.setattr(builtins, "__import__", absent)
    done = CliRunner().invoke(app, ["serve", "--model", folders.target])
    assert done.exit_code == 2 and "pip install 'outdraft[serve]'" in done.output
