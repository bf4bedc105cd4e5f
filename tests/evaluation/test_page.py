"""The report: one file that needs nothing beside it, says everything, and opens in a browser without a complaint."""

from __future__ import annotations

import builtins
import re
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bench_data import benchmark, question_file

from browsers import browser
from cli_fixtures import Folders
from outdraft.errors import UserError
from outdraft.evaluation.audit.findings import Audit, Finding
from outdraft.evaluation.audit.stock import Noise
from outdraft.evaluation.bench.result import BenchResult, closing
from outdraft.evaluation.report import pages
from outdraft.evaluation.report.pages import SLOTS


@pytest.fixture(scope="module")
def written(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BenchResult]:
    pytest.importorskip("plotly")
    folder = tmp_path_factory.mktemp("page")
    data = question_file(folder, {"question_id": 7, "category": "qa", "turns": ["<b>&</b></script>"]}, "{broken")
    result = benchmark(
        folders,
        data,
        suite="spec-bench",
        on_bad_line="skip",
        temperatures=[0.0, 1.0],
        peers=["prompt-lookup"],
        report=folder / "report.html",
        output_dir=folder / "out",
    )
    return folder / "report.html", result


class Elements(HTMLParser):
    """Tags with what they load, and the page's text outside of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.stack: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loaded += [f"{tag} {name}={value}" for name, value in attributes if name == "src" or tag == "link"]
        self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.stack):
            self.text += data


def test_the_page_holds_everything_and_loads_nothing(written: tuple[Path, BenchResult]) -> None:
    path, result = written
    source = path.read_text(encoding="utf-8")
    seen = Elements()
    seen.feed(source)
    style = source.split("<script")[0]
    assert not seen.loaded and "@import" not in style and "url(" not in style
    for summary in result.comparisons[0].summaries:
        assert summary.name in seen.text
    assert closing(result.comparisons[0].summaries) in seen.text
    for said in (
        "Read with care",
        "Left out: 1 question, named",
        "question.jsonl:10",
        "How much faster than plain decoding, by task",
        "How often a drafted token is accepted, by its position in the draft",
        "How far each method drafts",
        "Where the time of a round goes",
        "Whose tokens they are",
        "Spec-Bench's own",
        "load_average",
        "max_new_tokens",
        "float32",
        "Greedy",
        "Temperature 1",
    ):
        assert said in seen.text, said
    assert not list(path.parent.glob("*.partial"))


def test_what_models_and_users_say_is_text_and_no_markup() -> None:
    audit = Audit(
        {"model": "<b>model</b>", "method": "fspad", "generation": {}},
        {"dtype": "float32", "backend": "<eager>"},
        [Finding("tokens", "Is 1 < 2?", True, "<script>x</script>", figures={"histogram": [1, 2]}, lines=["<li>"])],
        *(Noise(), 0.001, 1.0),
    )
    source = pages.audit_page(audit)
    assert "<b>" not in source and "<script" not in source and "<eager>" not in source
    seen = Elements()
    seen.feed(source)
    for said in ("Losslessness of <b>model</b>", "Is 1 < 2?", "<script>x</script>", "level if those were drawn from"):
        assert said in seen.text, said


def test_without_plotly_one_line_names_the_fix(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = builtins.__import__

    def absent(name: str, *args: Any, **settings: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return whole(name, *args, **settings)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"pip install 'outdraft\[report\]'"):
        benchmark(folders, question_file(tmp_path), report=tmp_path / "r.html")


def test_reports_that_cannot_be_written_are_refused_before_measuring(folders: Folders, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    pages.check_page(tmp_path / "absent" / "r.html")
    assert list((tmp_path / "absent").iterdir()) == [], "the folder is made, and nothing is left in it"
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        pages.check_page(tmp_path / "file" / "r.html")
    with pytest.raises(UserError, match="is a folder"):
        benchmark(folders, question_file(tmp_path), report=tmp_path)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("theme", "paper"), [("light", "#ffffff"), ("dark", "#1b2027")])
def test_colours_stand_out_from_the_paper(theme: str, paper: str) -> None:
    for colour in SLOTS[theme]:
        light, dark = sorted((luminance(colour), luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 2, colour


def pixels(png: bytes) -> bytes:
    """The picture's bytes, filtered as they are stored."""
    place, packed = 8, b""
    while place < len(png):
        length, kind = int.from_bytes(png[place : place + 4], "big"), png[place + 4 : place + 8]
        packed += png[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += 12 + length
    return zlib.decompress(packed)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_without_errors(written: tuple[Path, BenchResult], tmp_path: Path, scheme: str) -> None:
    path, _ = written
    common = [
        *(browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
        *("--enable-logging=stderr", "--virtual-time-budget=10000", "--window-size=1200,2400"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"),
    ]
    picture = tmp_path / f"{scheme}.png"
    shot = subprocess.run(
        [*common, f"--screenshot={picture}", path.as_uri()], capture_output=True, text=True, timeout=600
    )
    complaints = [line for line in shot.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints and picture.exists(), shot.stderr[-2000:]
    found = pixels(picture.read_bytes())
    assert len(set(found)) > 100 and found.count(0) < 0.99 * len(found), "blank"

    document = subprocess.run(
        [*common, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=600
    ).stdout
    charts = re.findall(r'id="chart-\d+-\d+"', document)
    assert len(charts) == 2 * 5
    assert document.count('class="main-svg"') >= len(charts), "every chart is drawn"
    ground = {"light": "255, 255, 255", "dark": "27, 32, 39"}[scheme]
    assert f"rgb({ground})" in document, "charts are drawn in the reader's colours"
