"""What a round launches on a GPU, waits for and copies there, found out on a CPU, where all of that is hidden.

On a GPU `.tolist()`, `.item()` or a tensor as a condition waits for all that was launched before, and so does a copy to
the device that is not pinned. Inside of what is recorded as a CUDA graph either is an error, and a number of the host's
stays what it was when it was recorded.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import tiny
from outdraft.api.generation import SpeculativeModel, load
from outdraft.core.coupling import chance_of
from outdraft.core.sampling import Warper
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.engine.continuous import Decoder
from outdraft.engine.round import decode
from outdraft.engine.rows import Row
from outdraft.methods.dflash.network import DFlashConfig, DFlashNetwork
from outdraft.methods.eagle3.drafter import Eagle3Config, Eagle3Head
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig
from outdraft.methods.fspad.network import FeatureHead, FeatureHeadConfig
from outdraft.methods.fspad_1f.network import OneForwardConfig, OneForwardHead
from outdraft.methods.medusa.drafter import MedusaConfig, MedusaHeads
from outdraft.target.backends.graphs import Replayed
from pretended import FIRST, CaptureError, Device, DeviceMistake, OnDevice
from pretended_gpu import Rounds, pretended


@pytest.fixture
def device() -> Iterator[Device]:
    """A machine with a GPU, where nothing may run unrecorded for want of a recording."""
    with pretended() as pretending, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*recorded|.*cannot serve|.*computes something")
        yield pretending


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


def one_forward(**switches: Any) -> OneForwardHead:
    return OneForwardHead(OneForwardConfig(**shapes(), block_size=4, slot_candidates=4, draft_vocab_size=9, **switches))


def dflash() -> DFlashNetwork:
    own = shapes()
    taps: dict[str, Any] = {"tap_ids": (1, 1), "tap_unit": "input", "num_taps": 2, "num_hidden_layers": 2}
    more = {"target_hidden_size": own["hidden_size"], "mask_token_id": 1, "causal": (False, True), "windows": (0, 4)}
    return DFlashNetwork(DFlashConfig(**own, **taps, **more, block_size=4))  # type: ignore[arg-type]


@torch.no_grad()
def exit_layer() -> ExitLayer:
    """The target's last layer a little off, so that it is right at times."""
    made = ExitLayer.beginning(tiny("llama-gqa"), ExitLayerConfig(1))
    generator = torch.Generator().manual_seed(2)
    for weight in made.parameters():
        weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return made


NETWORKS: dict[str, Callable[[], Any]] = {
    "fspad": head,
    "eagle": lambda: head(feature_sampling=False, partial_alignment=False),
    "eagle3": lambda: eagle3(draft_vocab_size=9),
    "eagle3.1": lambda: eagle3(tap_norms=True, norm_output=True, head_norms=True),
    "fspad-1f": one_forward,
    "fspad-1f of a layer": lambda: one_forward(second_layer=False),  # the target has but two, too
    "eesd": exit_layer,
    "medusa": lambda: MedusaHeads(MedusaConfig(shapes()["hidden_size"], shapes()["vocab_size"], 3)),
    "dflash": dflash,
}


def both(kind: str, device: Device) -> tuple[SpeculativeModel, SpeculativeModel]:
    """A model and its drafter on the CPU, and the same on the GPU."""
    model, network = tiny("llama-gqa"), NETWORKS[kind]().double().eval() if kind in NETWORKS else None
    found = []
    for place in (lambda module: module, device.placed):
        given = {"method": kind} if network is None else {"draft_model": place(network)}
        found.append(load(place(model), backend="graphs", **given))
    return found[0], found[1]


def waited(device: Device) -> dict[str, int]:
    """Where the host waited, or copied."""
    return {line: count for line, count in device.lines.items() if line.startswith(("waits", "copies"))}


PROMPTS = [[1, 2, 3, 4, 1, 2, 3], [5, 6, 7, 5, 6], [8, 9]]
TREE: dict[str, Any] = {"tree_depth": 2, "tree_top_k": 3, "tree_size": 8}
CHAIN: dict[str, Any] = {"num_speculative_tokens": 3}
NOISE: dict[str, Any] = {"temperature": 1.0, "seed": 1}
DICE: dict[str, Any] = {**NOISE, "coupling": "dice"}
REPEATS: dict[str, Any] = {"prompt_lookup_min": 1}


@pytest.mark.parametrize(
    ("kind", "settings", "waits", "replays", "launches"),
    [
        ("none", {}, 1, 1, (22, 22)),
        ("none", NOISE, 1, 1, (24, 31)),
        ("none", DICE, 3, 1, (44, 44)),
        ("fspad", TREE, 1, 2, (31, 31)),
        ("fspad", CHAIN, 1, 2, (24, 28)),
        ("fspad", TREE | NOISE, 1, 2, (40, 54)),
        ("fspad", CHAIN | DICE, 3, 2, (58, 108)),
        ("eagle", TREE, 1, 2, (31, 31)),
        ("eagle3", TREE | NOISE, 1, 2, (40, 54)),
        ("eagle3.1", TREE, 1, 2, (36, 36)),
        ("eesd", TREE, 1, 3, (41, 41)),
        ("eesd", CHAIN, 1, 3, (36, 36)),
        ("eesd", TREE | NOISE, 1, 3, (43, 66)),
        ("prompt-lookup", {}, 1, 1, (40, 40)),
        ("prompt-lookup", NOISE, 1, 1, (40, 58)),
        ("fspad", TREE | REPEATS, 1, 2, (40, 50)),
        ("fspad-1f", TREE, 1, 2, (28, 31)),
        ("fspad-1f", TREE | NOISE, 1, 2, (35, 45)),
        ("fspad-1f", CHAIN | DICE, 3, 2, (58, 108)),
        ("medusa", TREE, 1, 2, (31, 31)),
        ("medusa", TREE | NOISE, 1, 2, (35, 45)),
        ("dflash", TREE, 1, 1, (180, 188)),
    ],
)
@pytest.mark.parametrize("rows", [1, 8])
def test_a_round_waits_once_copies_nothing_and_launches_little(
    device: Device, kind: str, settings: dict[str, Any], waits: int, replays: int, launches: tuple[int, int], rows: int
) -> None:
    """One round waits once more: that in which a row ends, for its seconds."""
    here, there = both(kind, device)
    given = {"max_new_tokens": 24 if kind == "eesd" else 12, "eos_token_id": 10**6, **settings}  # it is often right
    if kind not in ("none", "prompt-lookup"):
        given = {"prompt_lookup_min": 0, "controller": "fixed", **given}
    prompts = [PROMPTS[row % 3] for row in range(rows)]
    expected = here.generate(prompts, **given).tokens
    assert there.generate(prompts, **given).tokens == expected, "as it records"
    with Rounds(device) as rounds:
        assert there.generate(prompts, **given).tokens == expected, "from recordings"
    steady = rounds.steady[2:]  # a drafter takes prompts in unrecorded
    most = Counter[str]()
    for counts in steady:
        most |= counts
    assert steady and rounds.ending and most["copies"] == 0, waited(device)
    assert (most["waits"], most["replays"]) == (waits, replays), waited(device)
    assert most["launches"] <= launches[rows > 1], most
    assert max(counts["waits"] for counts in rounds.ending) == waits + 1


def test_a_spine_is_built_on_the_host(device: Device) -> None:
    here, there = both("fspad-1f", device)
    given = {**CHAIN, **DICE, "candidates": "spine", "max_new_tokens": 8, "controller": "fixed"}
    assert there.generate(PROMPTS, **given).tokens == here.generate(PROMPTS, **given).tokens


def rows_of(model: SpeculativeModel, settings: SamplingSettings) -> list[Row]:
    """Rows for a decoder, of different prompts and lengths."""
    made = []
    for place, (prompt, length) in enumerate(zip([*PROMPTS, PROMPTS[0]], (12, 4, 7, 5), strict=True)):
        target, tokens = model.target, list[int]()
        warper = Warper(settings, len(prompt), target.vocab_size)
        chance = chance_of(warper, target.vocab_size, target.device, place, tokens)
        made.append(Row(list(prompt), warper, chance, length, tokens=tokens))
    return made


@pytest.mark.parametrize("settings", [SamplingSettings(), SamplingSettings(temperature=1.0)], ids=["greedy", "T=1"])
@pytest.mark.parametrize("kind", ["none", "fspad", "fspad-1f of a layer", "eesd", "medusa", "prompt-lookup"])
def test_rows_that_join_add_no_wait_and_no_copy(device: Device, kind: str, settings: SamplingSettings) -> None:
    """As a server decodes: rows come in one after the other, and leave at different lengths."""
    here, there = both(kind, device)
    shape = TreeShape(2, 3, 8)

    alone = rows_of(here, settings)
    for row in alone:
        list(decode(here.target, here.drafter, [row], shape))
    for _ in range(5):  # the same buffers are lent in other pairs, each of which is recorded once
        rows, decoder = rows_of(there, settings), Decoder(there.target, there.drafter, shape)
        waiting = list(rows)
        device.lines.clear()
        with Rounds(device) as rounds:
            while decoder.rows or waiting:
                if waiting:
                    decoder.add([waiting.pop(0)])
                decoder.prefill(4)
                decoder.prefill(4)
                decoder.round()
        assert [row.tokens for row in rows] == [row.tokens for row in alone]
        if not any("graphs.py" in line for line in waited(device)):  # nothing was recorded
            break
    recorded = [counts for counts in rounds.steady if counts["replays"] > 1 or kind in ("none", "prompt-lookup")]
    assert len(recorded) > 3
    assert max(counts["copies"] for counts in recorded) == 0, waited(device)
    assert max(counts["waits"] for counts in recorded) == 1, waited(device)


# --- what is caught ----------------------------------------------------------------------------------------------


def test_mistakes_questions_and_copies_are_seen(device: Device) -> None:
    there, here = OnDevice(torch.arange(3.0), FIRST), torch.ones(3)
    device.counting = True
    for wrong in (lambda: there + here, lambda: torch.cat([there, here]), lambda: there.gather(0, here.long())):
        with pytest.raises(DeviceMistake):
            wrong()
    for right in (lambda: there * torch.tensor(2.0), lambda: there.masked_fill(there > 1, torch.tensor(0.0))):
        right()
    device.counts.clear()
    there.tolist(), bool(there.sum() > 1), there[there > 1], there.cpu(), there.nonzero(), there.argmax().item()
    assert device.counts["waits"] == 6 and device.counts["copies"] == 0
    here.to("cuda"), torch.tensor([1, 2], device="cuda"), there[torch.tensor([0])], there.copy_(here)
    assert device.counts["copies"] == 4 and device.counts["waits"] == 6
    here.pin_memory().to("cuda", non_blocking=True)
    assert device.counts["pinned"] == 1 and device.counts["copies"] == 4
    before = device.counts["launches"]
    (there + 1)[:2].reshape(2, 1).expand(2, 4)
    assert device.counts["launches"] == before + 1


def test_a_recording_asks_nothing_and_knows_no_later_number_of_the_host(device: Device) -> None:
    there, added = OnDevice(torch.arange(3.0), FIRST), 1
    replayed = Replayed(lambda: (there * 2 + added,), FIRST, None)
    assert replayed()[0].tolist() == [1.0, 3.0, 5.0]
    added = 5
    there.add_(1)
    assert replayed()[0].tolist() == [3.0, 5.0, 7.0], "what lies at the address, and the host's old number"
    for fault in (lambda: there.tolist(), lambda: there + torch.tensor([1.0]).to(FIRST), lambda: bool(there[0] > 0)):
        with pytest.raises(CaptureError):
            Replayed(lambda fault=fault: (there + 1, fault())[:1], FIRST, None)  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["fspad", "eesd"])
@pytest.mark.parametrize("fault", ["wait", "copy", "launch"])
def test_a_fault_in_a_round_is_counted(device: Device, kind: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, there = both(kind, device)
    given = {**TREE, "max_new_tokens": 8, "eos_token_id": 10**6, "prompt_lookup_min": 0, "controller": "fixed"}
    faults: dict[str, Callable[[Tensor], Any]] = {
        "wait": lambda x: x.sum().item(),
        "copy": lambda x: x.new_tensor([1.0, 2.0]),
        "launch": lambda x: x * 2,
    }
    own = there.target.logits
    found = []
    for planted in (False, True):
        if planted:
            monkeypatch.setattr(there.target, "logits", lambda x, counts: (faults[fault](x), own(x, counts))[1])
        there.generate(PROMPTS[:1], **given)
        with Rounds(device) as rounds:
            there.generate(PROMPTS[:1], **given)
        found.append(rounds.steady[-1])
    counted = {"wait": "waits", "copy": "copies", "launch": "launches"}[fault]
    assert found[1][counted] == found[0][counted] + 1


# --- what `benchmarks/launches.py` counts -------------------------------------------------------------------------

MOST = {"none": 40, "fspad": 75, "fspad-1f": 75, "eesd": 80, "prompt-lookup": 45}
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
    assert found["replays"] == {"fspad": 2, "fspad-1f": 2, "eesd": 3}.get(method, 1)
    assert found["outside"] <= (MOST[method] if rows * temperature > 1 else 45)


def test_what_asks_and_what_copies_are_counted(launches: Any) -> None:
    operations = launches.Operations(Counter())
    with operations, launches.Waits(operations.counts):
        (torch.tensor([1.0]) + 1).tolist()
    assert [operations.counts[kind] for kind in ("waits", "copies", "outside")] == [1, 1, 1]
