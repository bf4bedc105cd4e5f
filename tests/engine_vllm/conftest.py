"""What the tests inside vLLM share: the shipped target, exported drafters, one engine at a time, our own texts.

Run by `make test-engine` in an environment of its own (.venv-vllm), where vLLM is; the ordinary `pytest` leaves this
folder out. Everything is float32, so that texts and counts can be compared to the last one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

if find_spec("vllm") is None:
    collect_ignore_glob = ["*.py"]  # the ordinary environment, which these tests are not for
else:
    # Before vLLM is imported: one process, where tests can look into the engine; nothing from outside; little memory.
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_HOST_IP="127.0.0.1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="WARNING",
        HF_HUB_OFFLINE="1",
    )

import pytest
import torch
from vllm_engine import CHAIN, METHODS, Engine

import outdraft
from outdraft.export.export import Exported, export_drafter
from outdraft.reference import load_prompts


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Exported]]:
    """Every shipped drafter as `outdraft export` writes it, and the target beside the first."""
    root = tmp_path_factory.mktemp("exported")
    target = root / "target"
    made = {}
    for method in METHODS:
        place = None if target.exists() else target
        made[method] = export_drafter(
            "reference",
            "reference",
            "vllm",
            root / method,
            method=method,
            target_dir=place,
            num_speculative_tokens=CHAIN,
        )
    yield made


@pytest.fixture(scope="session")
def target_folder(folders: dict[str, Exported]) -> str:
    """The shipped target as an ordinary folder."""
    return folders[METHODS[0]].target


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Token ids of a few held-out questions, as a chat begins."""
    tokenizer = outdraft.load("reference", dtype="float32", backend="eager").tokenizer
    assert tokenizer is not None
    chats = load_prompts("heldout")[:6]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


@pytest.fixture(scope="session")
def plain_texts(target_folder: str, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of vLLM without a drafter."""
    with Engine(target_folder, None) as engine:
        return engine.greedy(prompts)


@pytest.fixture(scope="session", params=METHODS)
def engine(request: pytest.FixtureRequest, folders: dict[str, Exported], plain_texts: Any) -> Iterator[Any]:
    """An engine with each of the drafters in turn, and the drafter's method; pytest groups the tests by drafter."""
    exported = folders[request.param]
    with Engine(exported.target, exported) as running:
        yield running, request.param


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
