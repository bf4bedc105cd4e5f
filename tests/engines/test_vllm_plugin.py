"""vLLM's plug-in where there is no vLLM: what it asks of one, the versions it takes, the guard's function.

With a vLLM of straw; inside a real one it is tested by `make test-engine`.
"""

from __future__ import annotations

import random
import subprocess
import sys
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import pytest
import torch

from outdraft.export import vllm_plugin
from outdraft.export.vllm_plugin import expand_batch_to_tokens


class Registry:
    """Like vLLM's own."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def get_supported_archs(self) -> set[str]:
        return set(self.models)

    def register_model(self, name: str, place: str) -> None:
        assert name not in self.models
        self.models[name] = place


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Enough of vLLM 0.32.0 on a CPU for the plug-in."""
    straw: Any = ModuleType("vllm")
    platforms: Any = ModuleType("vllm.platforms")
    sampler: Any = ModuleType("vllm.v1.sample.rejection_sampler")
    straw.__version__, straw.ModelRegistry, straw.on_cpu, straw.sampler = "0.32.0", Registry(), True, sampler
    platforms.current_platform = type("Platform", (), {"is_cpu": staticmethod(lambda: straw.on_cpu)})
    sampler.expand_batch_to_tokens = "vLLM's own"
    for module in (straw, platforms, sampler, ModuleType("vllm.v1"), ModuleType("vllm.v1.sample")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return straw


def test_vllm_finds_it() -> None:
    (found,) = (entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "outdraft")
    assert found.value == "outdraft.export.vllm_plugin:register"


def test_reading_it_needs_neither_vllm_nor_the_rest_of_outdraft() -> None:
    script = (
        "import sys, outdraft.export.vllm_plugin\n"
        "assert not {'vllm', 'torch', 'transformers', 'outdraft.target.target'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_registering_any_number_of_times_registers_once(vllm: Any) -> None:
    vllm_plugin.register()
    vllm_plugin.register()
    place = "outdraft.export.vllm_head:FeatureHeadForCausalLM"
    assert vllm.ModelRegistry.models == {vllm_plugin.FSPAD: place, vllm_plugin.EAGLE_WITH_BIAS: place}
    assert vllm.sampler.expand_batch_to_tokens is expand_batch_to_tokens


@pytest.mark.parametrize(("version", "on_cpu"), [("0.32.0", False), ("0.33.0", True), ("0.40.1+cpu", True)])
def test_the_guard_leaves_other_platforms_and_versions_alone(vllm: Any, version: str, on_cpu: bool) -> None:
    vllm.__version__, vllm.on_cpu = version, on_cpu
    vllm_plugin.register()
    assert vllm.sampler.expand_batch_to_tokens == "vLLM's own"


def test_a_vllm_without_that_sampler_is_left_to_itself(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm.v1.sample.rejection_sampler")
    assert not vllm_plugin.guard((0, 5, 0))


@pytest.mark.parametrize(
    ("text", "numbers"), [("0.32.0", (0, 32, 0)), ("0.32.1rc2+cpu", (0, 32, 12)), ("dev", (0, 0, 0))]
)
def test_versions_are_read(vllm: Any, text: str, numbers: tuple[int, ...]) -> None:
    vllm.__version__ = text
    assert vllm_plugin.vllm_version() == numbers


@pytest.mark.parametrize("version", [(0, 0, 0), (0, 31, 9), (0, 33, 0), (1, 0, 0)])
def test_an_untested_vllm_is_told_what_to_install(version: tuple[int, int, int]) -> None:
    with pytest.raises(ImportError, match=r"tested with vLLM 0\.32\.0 up to, not including, 0\.33\.0.*Install"):
        vllm_plugin.require_tested(version)


def test_a_tested_one_is_taken() -> None:
    vllm_plugin.require_tested((0, 32, 0))
    assert vllm_plugin.TESTED[1] <= vllm_plugin.UP_TO  # no tested version goes without the guard


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_every_rows_value_stands_once_for_each_of_its_tokens(dtype: torch.dtype) -> None:
    dice = random.Random(0)
    for _ in range(50):
        counts = [dice.randrange(4) for _ in range(dice.randrange(1, 6))]
        values = [dice.randrange(3) for _ in counts]
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0)
        wanted = [7 if value == 1 else value for value, count in zip(values, counts, strict=True) for _ in range(count)]
        found = expand_batch_to_tokens(torch.tensor(values, dtype=dtype), ends, sum(counts), 1, 7)
        assert found.dtype == dtype and found.tolist() == wanted
