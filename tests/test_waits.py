"""A round asks the device as seldom as it can, and a recorded function never: found out on a CPU, where asking is free.

On a GPU `.tolist()`, `.item()` or a tensor as a condition waits for all that was launched before, and inside of what is
recorded as a CUDA graph it is an error, after which everything runs unrecorded.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import tiny
from outdraft.api.generation import load
from outdraft.core import tensors
from outdraft.drafting import expand as growth
from outdraft.engine.round import Batch
from outdraft.methods.eagle3.drafter import Eagle3Config, Eagle3Head
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.methods.fspad_1f.network import OneForwardConfig, OneForwardHead
from outdraft.target.backends.graphs import Replayed

ASKING = {Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.cpu}

FORBIDDEN = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "lift_fresh", "unique_consecutive"}
"""Operations that need a value or a size on the host, or bring fresh numbers from it."""


class Asked(TorchFunctionMode):
    """Counts what asks for a tensor's value, within rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds = 0
        self.by = Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        thrown = func is Tensor.item and args[0].dtype == torch.float64  # dice lie on the host
        if func in ASKING and not thrown:
            self.by[func.__name__] += 1
        return func(*args, **(kwargs or {}))

    def around(self, old: Callable[[Batch], Any]) -> Callable[[Batch], Any]:
        def round_(batch: Batch) -> Any:
            self.rounds += 1
            with self:
                return old(batch)

        return round_


class Recorded(TorchDispatchMode):
    """What would break a recording is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        assert name not in FORBIDDEN, f"{name} in a recorded function"
        return func(*args, **(kwargs or {}))


class Unasked(TorchFunctionMode):
    """Likewise, for what reads a CPU tensor without an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in ASKING, f"{func.__name__} in a recorded function"
        return func(*args, **(kwargs or {}))


def shapes() -> dict[str, int]:
    torch.manual_seed(0)
    config = tiny("llama-gqa").config
    names = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return {name: getattr(config, name) for name in names}


def head(**switches: Any) -> FeatureHead:
    return FeatureHead(FeatureHeadConfig(**shapes(), **switches))


def eagle3(**switches: Any) -> Eagle3Head:
    own = shapes()
    taps: dict[str, Any] = {"tap_ids": (1, 1), "tap_unit": "input", "num_taps": 2}
    return Eagle3Head(Eagle3Config(**own, target_hidden_size=own["hidden_size"], **taps, **switches))


DRAFTERS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"method": "none"},
    "fspad": lambda: {"draft_model": head()},
    "eagle": lambda: {"draft_model": head(feature_sampling=False, partial_alignment=False)},
    "eagle3": lambda: {"draft_model": eagle3(draft_vocab_size=9)},
    "eagle3.1": lambda: {"draft_model": eagle3(tap_norms=True, norm_output=True, head_norms=True)},
    "fspad-1f": lambda: {
        "draft_model": OneForwardHead(OneForwardConfig(**shapes(), block_size=4, slot_candidates=4, draft_vocab_size=9))
    },
    "eesd": lambda: {"draft_model": ExitLayer.beginning(tiny("llama-gqa"), ExitLayerConfig(1))},
    "prompt-lookup": lambda: {"method": "prompt-lookup"},
}

PROMPTS = [[1, 2, 3, 4, 1, 2, 3], [5, 6, 7, 5, 6], [8, 9]]
GREEDY: dict[str, Any] = {"tree_depth": 2, "tree_top_k": 3, "tree_size": 8}
CHAIN: dict[str, Any] = {"num_speculative_tokens": 3}
DRAWN: dict[str, Any] = {"num_speculative_tokens": 3, "temperature": 1.0, "seed": 1, "coupling": "dice"}
NOISY: dict[str, Any] = GREEDY | {"temperature": 1.0, "seed": 1}


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    ("drafter", "settings", "most"),
    [
        ("plain", {}, 1),
        ("fspad", GREEDY, 1),
        ("fspad", CHAIN, 1),
        ("eagle", GREEDY, 1),
        ("eagle3", GREEDY, 1),
        ("fspad-1f", GREEDY, 2),  # its tables, and what was accepted
        ("prompt-lookup", {}, 1),
        ("fspad", {"prompt_lookup_min": 1}, 1),
        ("eesd", GREEDY, 1),
        ("eesd", CHAIN, 1),
        ("plain", {"temperature": 1.0, "seed": 1}, 1),
        ("fspad", NOISY, 1),
        ("eesd", NOISY, 1),
        ("plain", {"temperature": 1.0, "seed": 1, "coupling": "dice"}, 4),
        ("fspad", DRAWN, 3),
        ("eesd", DRAWN, 3),
    ],
)
def test_a_round_asks_the_device_so_often(
    drafter: str, settings: dict[str, Any], most: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny("llama-gqa"), backend="graphs", **DRAFTERS[drafter]())
    asked = Asked()
    monkeypatch.setattr(Batch, "round", asked.around(Batch.round))
    monkeypatch.setattr(tensors, "READ_FREELY", ())  # as on a GPU
    given = {**settings, "max_new_tokens": 12, "eos_token_id": 10**6, "controller": "fixed"}
    if drafter in ("fspad", "eagle", "eagle3", "fspad-1f", "eesd"):
        given = {"prompt_lookup_min": 0, **given}
    model.generate(PROMPTS[:1], **given)  # first forwards are compared with the model's own
    asked.rounds = 0
    asked.by.clear()
    model.generate(PROMPTS[:1] * rows, **given)
    assert asked.rounds > 2
    assert sum(asked.by.values()) <= most * asked.rounds, dict(asked.by)


@pytest.mark.parametrize("settings", [GREEDY, CHAIN, DRAWN, NOISY], ids=["tree", "chain", "drawn", "noisy"])
@pytest.mark.parametrize("drafter", ["plain", "fspad", "eagle", "eagle3", "eagle3.1", "eesd"])
def test_nothing_recorded_asks_or_brings_in_numbers(
    drafter: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny("llama-gqa"), backend="graphs", **DRAFTERS[drafter]())
    if drafter == "plain":
        settings = {key: value for key, value in settings.items() if key in ("temperature", "seed")}
    else:
        settings = settings | {"prompt_lookup_min": 0}
    given = {**settings, "max_new_tokens": 12, "eos_token_id": 10**6}
    expected = model.generate(PROMPTS, **given).tokens  # what is made once is made before anything is recorded
    monkeypatch.setattr(growth, "greatest", lambda scores: scores.argmax(-1))  # NumPy's is for CPUs
    ran = Counter[str]()
    call = Replayed.__call__

    def strictly(self: Replayed) -> tuple[Tensor, ...]:
        ran["recorded"] += 1
        with Recorded(), Unasked():
            return call(self)

    monkeypatch.setattr(Replayed, "__call__", strictly)
    assert model.generate(PROMPTS, **given).tokens == expected
    assert ran["recorded"] > 3


def test_asking_is_noticed() -> None:
    for fault in (lambda x: x.tolist(), lambda x: bool(x.sum() > 0), lambda x: x + torch.tensor([1.0])):
        with pytest.raises(AssertionError, match="in a recorded function"), Recorded(), Unasked():
            fault(torch.ones(1))


# --- what `benchmarks/launches.py` counts -------------------------------------------------------------------------

MOST = {"none": 40, "fspad": 75, "eesd": 80, "prompt-lookup": 45}
"""Launches outside of recordings where eight rows draw: 28 make noise, which each row has of a generator of its own."""


@pytest.fixture(scope="module")
def launches() -> Any:
    """The script, whose target is larger and whose exit layer is right at times only."""
    path = Path(__file__).parents[1] / "benchmarks" / "launches.py"
    if not path.exists():
        pytest.skip("the benchmarks are not here")
    spec = importlib.util.spec_from_file_location("launches", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("method", MOST)
def test_a_round_waits_once_and_launches_little(
    launches: Any, method: str, rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, name, value in launches.as_on_a_gpu():
        monkeypatch.setattr(place, name, value)
    found = launches.counted(method, launches.settings_of(method, temperature), rows)
    assert found["waits"] == 1
    assert found["copies"] < 0.2, "but for tables that are made once, and copies that do not wait"
    assert found["replays"] == {"fspad": 2, "eesd": 3}.get(method, 1)
    assert found["outside"] <= (MOST[method] if rows * temperature > 1 else 45)


def test_what_asks_and_what_copies_are_counted(launches: Any) -> None:
    operations = launches.Operations(Counter())
    with operations, launches.Waits(operations.counts):
        (torch.tensor([1.0]) + 1).tolist()
    assert [operations.counts[kind] for kind in ("waits", "copies", "outside")] == [1, 1, 1]
