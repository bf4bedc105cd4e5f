"""Scale curves from end to end on a tiny target: every curve measured once, kept, read back, shown and filled in."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cli_fixtures import CONTEXT, Folders, make_folders
from training.tiny import write_chats

ROOT = Path(__file__).resolve().parents[2]
CURVES = ["tree", "context", "batch", "temperature", "shape", "memory"]
SIZES = ["--turns", "2", "--tokens", "6", "--trees", "chain 2,2/2/5", "--contexts", "32,9999", "--batches", "1,2"]
SIZES += ["--dtype", "float32", "--memory-batches", "1,2", "--temperatures", "0,1", "--shapes", "2x64,3x64"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def root(scale: ModuleType, folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything measured once."""
    root = tmp_path_factory.mktemp("scale")
    shutil.copy(ROOT / "docs" / "measurements" / "scale.md", root / "page.md")
    write_chats(root / "prompts.jsonl", 3, seed=1)
    run(scale, folders, root, "--write-docs", str(root / "page.md"))
    return root


def run(scale: ModuleType, folders: Folders, root: Path, *more: str) -> None:
    given = ["--model", folders.target, "--draft-model", folders.drafter, "--data", str(root / "prompts.jsonl")]
    before, sys.argv = sys.argv, ["scale.py", *given, "--output-dir", str(root / "out"), *SIZES, *more]
    try:
        scale.main()
    finally:
        sys.argv = before


def points(root: Path) -> list[dict[str, Any]]:
    return json.loads((root / "out" / "scale.json").read_text())["points"]


def test_every_curve_has_its_points(root: Path) -> None:
    found = {curve: [one for one in points(root) if one["curve"] == curve] for curve in CURVES}
    assert list(found["tree"][0]["rivals"]) == ["plain", "chain 2", "2/2/5"]
    assert [one["context"] for one in found["context"]] == [32, CONTEXT - 6], "up to the model's limit"
    assert [one["batch"] for one in found["batch"]] == [1, 2]
    assert [one["temperature"] for one in found["temperature"]] == [0, 1]
    assert [one["shape"] for one in found["shape"]] == ["2x64", "3x64"]
    assert len({(one["context"], one["batch"]) for one in found["memory"]}) == 4
    for one in (rival for curve in CURVES[:5] for point in found[curve] for rival in point["rivals"].values()):
        low, high = one["spread"]
        assert low <= one["speedup"] <= high and len(one["ratios"]) == 2 and 1 <= one["tau"] <= one["longest_tau"]
    for point in found["shape"]:
        assert point["rivals"]["plain"]["round_in_plain_tokens"] == 1
        for one in point["rivals"].values():
            assert one["round_spread"] == sorted(one["tau"] / ratio for ratio in one["ratios"])
    sizes = [one["keys_and_values_bytes"] for one in found["memory"]]
    a_token = 2 * 2 * 2 * 4 * 4  # layers, keys and values, heads, their width, bytes
    assert sizes == [rows * (context + 8) * a_token for context in (32, CONTEXT - 8) for rows in (1, 2)]


def test_what_random_weights_would_gain_is_arithmetic_on_stated_taus(scale: ModuleType, root: Path) -> None:
    shown = (root / "out" / "scale.md").read_text()
    assert "random weights: times are real, taus are not" in shown and "speed-up at tau 3" in shown
    one = {"round_in_plain_tokens": 1.5, "longest_tau": 4}
    assert [scale.scale_report.gain(one, tau) for tau in (1.5, 3, 4, 5)] == [1, 2, pytest.approx(4 / 1.5), None]
    chain = next(one for one in points(root) if one["curve"] == "shape")["rivals"]["chain 3"]
    assert chain["longest_tau"] == 4


def test_the_page_is_filled_in_and_keeps_its_words(root: Path) -> None:
    page, frame = (root / "page.md").read_text(), (ROOT / "docs" / "measurements" / "scale.md").read_text()
    assert "Not measured yet" not in page
    for curve in CURVES:
        between = page.partition(f"<!-- {curve} -->\n")[2].partition(f"<!-- end of {curve} -->")[0]
        assert between.startswith("| ") and "revision" in between
    assert page.partition("## Found")[0] == frame.partition("## Found")[0]
    if importlib.util.find_spec("plotly"):
        assert (root / "page.png").is_file() == (shutil.which("chromium") is not None)
        plot = (root / "out" / "scale.html").read_text()
        assert "Random weights: tau needed to break even" in plot and "Peak memory beyond the models" in plot


def test_finished_points_are_read_back_and_others_added(
    scale: ModuleType, folders: Folders, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, measured = points(root), []
    real = scale.measure
    monkeypatch.setattr(scale, "measure", lambda point, *rest: measured.append(point.at) or real(point, *rest))
    run(scale, folders, root)
    assert not measured and points(root) == before
    run(scale, folders, root, "--curves", "batch", "--batches", "1,3")
    assert measured == [{"batch": 3}] and [one["batch"] for one in points(root)] == [1, 3]
    run(scale, folders, root, "--curves", "batch", "--batches", "1", "--turns", "1")
    assert measured == [{"batch": 3}, {"batch": 1}], "other settings are another point"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--curves", "tree,depth"), "--curves knows tree, context"),
        (("--shapes", "12x100"), "'12x100' is no shape; write layers x width"),
        (("--shapes", "70b:0"), "'70b:0' is no shape"),
        (("--batches", "0"), "--batches must be numbers"),
        (("--temperatures", "warm"), "--temperatures must be numbers"),
        (("--turns", "0"), "--turns must be at least 1"),
        (("--curves", "batch", "--tokens", "5000"), "no prompt leaves room for 5000 tokens"),
        (("--draft-model", "none-there"), "none-there"),
    ],
)
def test_mistakes_are_one_line(
    scale: ModuleType, folders: Folders, root: Path, flags: tuple[str, ...], says: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(scale, folders, root, *flags)
    assert says in str(ended.value) and "\n" not in str(ended.value)
