"""A target whose layers lie on two GPUs, which are pretended (`pretended_gpu.py`), by the hooks of accelerate.

A tensor that meets one of the other device is an error there. Texts are those of the same model on one device, and
what crosses between the devices in a round does not grow with the layers.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook
from transformers import PreTrainedModel

from models import tiny
from outdraft.api.generation import SpeculativeModel, load
from outdraft.api.loading import load_target
from outdraft.core.sampling_settings import SamplingSettings
from outdraft.core.shape import TreeShape
from outdraft.core.tensors import sent
from outdraft.engine.continuous import Decoder
from outdraft.engine.round import decode
from outdraft.methods.eagle3.drafter import Eagle3Config, Eagle3Head
from outdraft.methods.eesd.network import ExitLayer, ExitLayerConfig
from outdraft.target.backends.graphs import Replayed
from outdraft.target.cache import SlotCache
from outdraft.target.spread import Sharing
from outdraft.target.target import Target
from pretended import FIRST, SECOND, CaptureError, Device, DeviceMistake, OnDevice
from pretended_gpu import Rounds, pretended
from test_waits import CHAIN, DICE, NETWORKS, NOISE, PROMPTS, TREE, rows_of, shapes, waited


@pytest.fixture
def device() -> Iterator[Device]:
    """A machine with GPUs."""
    with pretended() as pretending, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot serve")
        yield pretending


def model_of(layers: int) -> PreTrainedModel:
    return tiny("llama-gqa", num_hidden_layers=layers)


def halves(layers: int, embedding: int = 0, head: int = 1) -> dict[str, str]:
    """A device map whose boundary lies in the middle of the layers."""
    ends = {"model.embed_tokens": embedding, "model.rotary_emb": embedding, "model.norm": 1, "lm_head": head}
    return {name: f"cuda:{place}" for name, place in {**places_of(layers), **ends}.items()}


def places_of(layers: int) -> dict[str, int]:
    return {f"model.layers.{layer}": int(layer >= layers // 2) for layer in range(layers)}


@torch.no_grad()
def exit_layer(layers: int) -> ExitLayer:
    """An exit after all layers but the last, that one a little off: the first part lies on both devices."""
    made = ExitLayer.beginning(model_of(layers), ExitLayerConfig(layers - 1))
    generator = torch.Generator().manual_seed(2)
    for weight in made.parameters():
        weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return made


def eagle3(layers: int) -> Eagle3Head:
    """A head that reads a layer of each device."""
    own = shapes()
    taps: dict[str, Any] = {"tap_ids": (1, layers - 1), "tap_unit": "input", "num_taps": 2}
    return Eagle3Head(Eagle3Config(**own, target_hidden_size=own["hidden_size"], **taps, draft_vocab_size=9))


OWN: dict[str, Callable[[int], Any]] = {"eesd": exit_layer, "eagle3": eagle3}


def both(kind: str, layers: int = 4, places: dict[str, str] | None = None) -> tuple[SpeculativeModel, SpeculativeModel]:
    """A model and its drafter on the CPU, and the same with the model's layers on two GPUs."""
    model, network = model_of(layers), None
    if kind in OWN or kind in NETWORKS:
        network = (OWN[kind](layers) if kind in OWN else NETWORKS[kind]()).double().eval()
    spread = dispatch_model(copy.deepcopy(model), places or halves(layers), skip_keys="past_key_values")
    given = {"method": kind} if network is None else {"draft_model": network}
    return load(model, backend="eager", **given), load(spread, **given)


def settings_of(kind: str, more: dict[str, Any]) -> dict[str, Any]:
    settings = {"max_new_tokens": 12, "eos_token_id": 10**6, **more}
    return (
        settings if kind in ("none", "prompt-lookup") else {"prompt_lookup_min": 0, "controller": "fixed", **settings}
    )


def most_of(rounds: Rounds, first: int = 0) -> Counter[str]:
    """The most of everything that a round did in which all rows stayed, from the `first` of these on."""
    most = Counter[str]()
    for counts in rounds.steady[first:]:
        most |= counts
    return most


@pytest.mark.parametrize(
    ("kind", "settings", "crossings"),
    [
        ("none", {}, (7, 9)),
        ("prompt-lookup", {}, (7, 9)),
        ("fspad", TREE, (7, 9)),
        ("fspad-1f", TREE, (7, 9)),
        ("eesd", TREE, (42, 50)),  # each of the three levels runs through both devices
        ("eagle3", TREE, (8, 10)),
        ("medusa", TREE, (7, 9)),
        ("dflash", TREE, (10, 12)),
    ],
)
def test_texts_are_those_of_one_device_and_a_round_waits_once(
    device: Device, kind: str, settings: dict[str, Any], crossings: tuple[int, int]
) -> None:
    here, there = both(kind)
    assert there.target.gathered_on == SECOND and there.target.backend == "eager"
    for rows in (1, 3):
        for way in ({}, NOISE):
            given = settings_of(kind, settings | way)
            expected = here.generate(PROMPTS[:rows], **given).tokens
            device.lines.clear()
            with Rounds(device) as rounds:
                assert there.generate(PROMPTS[:rows], **given).tokens == expected
            most = most_of(rounds, first=1)
            assert len(rounds.steady) > 1 and most["waits"] == 1 and most["copies"] == 0, waited(device)
            assert 0 < most["crossings"] <= crossings[rows > 1], device.lines


@pytest.mark.parametrize("kind", ["none", "fspad", "eesd", "eagle3"])
def test_dice_give_the_texts_of_one_device(device: Device, kind: str) -> None:
    here, there = both(kind)
    given = settings_of(kind, ({} if kind == "none" else CHAIN) | DICE)
    assert there.generate(PROMPTS, **given).tokens == here.generate(PROMPTS, **given).tokens


@pytest.mark.parametrize(
    "places",
    [
        halves(4, head=0),
        halves(4, embedding=1),
        {"model": "cuda:0", "lm_head": "cuda:1"},
        {name: place for name, place in halves(4).items() if name != "model.rotary_emb"},
        {**halves(4), **{f"model.layers.{layer}": f"cuda:{layer % 2}" for layer in range(4)}},
    ],
    ids=["head with the embedding", "embedding with the head", "head alone", "rotations nowhere", "in turn"],
)
@pytest.mark.parametrize("kind", ["eesd", "eagle3"])
def test_any_device_map_gives_the_texts_of_one_device(device: Device, kind: str, places: dict[str, str]) -> None:
    here, there = both(kind, places=places)
    assert there.target.gathered_on == torch.device(places["lm_head"])
    given = settings_of(kind, TREE)
    assert there.generate(PROMPTS, **given).tokens == here.generate(PROMPTS, **given).tokens


@pytest.mark.parametrize("kind", ["none", "eagle3"])
def test_what_crosses_does_not_grow_with_the_layers(device: Device, kind: str) -> None:
    """Masks, positions and slots cross a boundary once."""
    found = []
    for layers in (4, 8):
        there = both(kind, layers)[1]
        with Rounds(device) as rounds:
            there.generate(PROMPTS, **settings_of(kind, {} if kind == "none" else TREE))
        found.append(most_of(rounds)["crossings"])
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("settings", [SamplingSettings(), SamplingSettings(temperature=1.0)], ids=["greedy", "T=1"])
@pytest.mark.parametrize("kind", ["none", "fspad", "eesd", "eagle3", "prompt-lookup"])
def test_rows_that_join_give_the_texts_of_one_device(device: Device, kind: str, settings: SamplingSettings) -> None:
    """As a server decodes: rows come in one after the other, and leave at different lengths."""
    here, there = both(kind)
    shape = TreeShape(2, 3, 8)

    alone = rows_of(here, settings)
    for row in alone:
        list(decode(here.target, here.drafter, [row], shape))
    rows, decoder = rows_of(there, settings), Decoder(there.target, there.drafter, shape)
    waiting = list(rows)
    with Rounds(device) as rounds:
        while decoder.rows or waiting:
            if waiting:
                decoder.add([waiting.pop(0)])
            decoder.prefill(4)
            decoder.prefill(4)
            decoder.round()
    assert [row.tokens for row in rows] == [row.tokens for row in alone]
    most = most_of(rounds)
    assert rounds.steady and most["waits"] == 1 and most["copies"] == 0, waited(device)


def test_keys_and_values_stay_on_the_devices_of_their_layers(device: Device) -> None:
    target = both("none")[1].target
    cache = target.new_cache(2, 8)
    target.runner(cache).prefill([torch.tensor([1, 2, 3]), torch.tensor([4, 5])])
    assert [(buffer.device, len(buffer)) for buffer in cache._buffers] == [(FIRST, 2), (SECOND, 2)]
    cache.reserve(4, SECOND)
    device.counting = True
    cache.commit([[0, 2], [1]])
    assert cache.lengths == [5, 3] and device.counts == {"pinned": 2, "launches": 4}, "what moves, once a device"


# --- what is caught ----------------------------------------------------------------------------------------------


FAULTS = ("mask", "positions", "slots", "moves", "drafter")


def plant(fault: str, patch: pytest.MonkeyPatch) -> None:
    """Make a tensor on the wrong device, which a machine with one device would hide."""
    if fault == "mask":  # it is made where rounds run, and nobody brings it over
        patch.setattr(Sharing, "_there", lambda layer, given: given)
        patch.setattr(AlignDevicesHook, "pre_forward", only_states)
    elif fault == "positions":
        patch.setattr("outdraft.target.target.beside_embedding", lambda model, inputs: inputs)
        patch.setattr("outdraft.target.views.beside_embedding", lambda model, inputs: inputs)
    elif fault == "slots":
        patch.setattr(SlotCache, "_open", opened_where_rounds_run)
    elif fault == "moves":
        patch.setattr("outdraft.target.cache.sent", lambda numbers, device: sent(numbers, SECOND))
    else:
        patch.setattr(Target, "embed", lambda target, ids: target._embedding(ids))


def only_states(hook: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    return tuple(part.to(hook.execution_device) for part in args), kwargs


own_open = SlotCache._open


def opened_where_rounds_run(cache: SlotCache, buffer: int, count: int) -> Any:
    views = own_open(cache, buffer, count)
    cache._views[buffer] = views = views._replace(places=(cache._rows, cache._slots))
    return views


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_on_the_wrong_device_is_found(device: Device, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {name: place for name, place in halves(4).items() if name != "model.rotary_emb"}
    kind = "dflash" if fault == "drafter" else "eagle3"
    there, given = both(kind, places=places)[1], settings_of(kind, TREE)
    there.generate(PROMPTS, **given)
    plant(fault, monkeypatch)
    with pytest.raises(DeviceMistake):
        there.generate(PROMPTS, **given)


# --- one device that is not the first ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "fspad", "eesd"])
def test_recordings_and_kernels_run_on_the_models_device(device: Device, kind: str) -> None:
    """Kernels of Triton and captured graphs run on the current device, whatever the tensors' is."""
    model, network = tiny("llama-gqa"), NETWORKS[kind]().double().eval() if kind in NETWORKS else None
    found = []
    for place in (lambda module: module, lambda module: device.placed(module, SECOND)):
        given = {"method": kind} if network is None else {"draft_model": place(network)}
        own = load(place(model), backend="graphs", **given)
        with Rounds(device) as rounds:
            found.append(own.generate(PROMPTS, **settings_of(kind, {} if kind == "none" else TREE)).tokens)
    assert found[0] == found[1] and rounds.steady[-1]["replays"] > 0


def test_a_recording_of_another_device_is_found(device: Device) -> None:
    there = OnDevice(torch.arange(3.0), SECOND)
    assert Replayed(lambda: (there * 2,), SECOND, None)()[0].tolist() == [0.0, 2.0, 4.0]
    with pytest.raises(CaptureError):
        Replayed(lambda: (there * 2,), FIRST, None)


def test_device_auto_leaves_layers_where_they_were_put(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cuda` is not `cuda:0`, and moving a whole model there would put all layers on one device."""
    model_of(4).save_pretrained(tmp_path)

    def from_pretrained(path: str, device_map: str, **settings: Any) -> Any:
        assert device_map == "auto"
        return dispatch_model(model_of(4), halves(4), skip_keys="past_key_values")

    monkeypatch.setattr("outdraft.api.loading.AutoConfig.from_pretrained", lambda *given, **more: model_of(4).config)
    monkeypatch.setattr(
        "outdraft.api.loading.class_for", lambda config: SimpleNamespace(from_pretrained=from_pretrained)
    )
    monkeypatch.setattr("outdraft.api.loading.resolve_device", lambda asked: torch.device("cuda"))
    target = load_target(tmp_path, device="auto", dtype="float64")
    assert {weight.device for weight in target.model.parameters()} == {FIRST, SECOND}
    assert target.gathered_on == SECOND
