"""The page: everything in one file, and in a browser a chat with tinted drafts, live figures and plain decoding."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import httpx
from browsers import browser
from running import Served

from outdraft.serving.page import page


class Loads(HTMLParser):
    """What a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {name}={value}" for name, value in attributes if name == "src"]
        self.found += [f"{tag} {value}" for name, value in attributes if name == "href" and value != "data:,"]


def test_the_page_loads_nothing(served: Served) -> None:
    answer = httpx.get(served.url)
    assert answer.text == page() and answer.headers["content-type"].startswith("text/html")
    loads = Loads()
    loads.feed(answer.text)
    assert not loads.found and "@import" not in answer.text and "url(" not in answer.text
    assert not re.findall(r"https?://", answer.text)
    assert "connect-src 'self'" in answer.headers["content-security-policy"]


def opened(served: Served, folder: Path, question: str) -> tuple[str, str]:
    """The document once the answer is there, and what the browser complained about."""
    command = [
        *(browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"),
        *("--virtual-time-budget=20000", f"--user-data-dir={folder / 'profile'}", "--dump-dom"),
        f"{served.url}/#{quote(question)}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_a_chat_in_a_browser(served: Served, tmp_path: Path) -> None:
    document, complaints = opened(served, tmp_path, "red <b>cat</b>")
    assert not complaints
    assert "red &lt;b&gt;cat&lt;/b&gt;" in document, "text is text"
    assert "drafter: draft-model" in document
    answer = document[document.index('class="assistant"') :]
    assert "<mark>" in answer and "<span>" in answer, "guessed and other tokens look different"
    assert re.search(r'id="live"[^>]*>tau [0-9.]+ · [0-9.]+ tokens/s', document)
    assert re.search(r"with the drafter: \d+ tokens, tau [0-9.]+ .* of \d+ drafted accepted", answer)


def test_the_page_says_when_it_needs_a_key(starting: Callable[..., Served], tmp_path: Path) -> None:
    document, _ = opened(starting(api_key="secret"), tmp_path, "red")
    assert "needs a key" in document and re.search(r'id="keybox"(?! hidden)', document)


def test_plain_decoding_is_asked_for_by_the_switch() -> None:
    """The page's one request carries the box's state."""
    source = page()
    assert 'const speculative = $("speculative").checked;' in source and "speculative, temperature:" in source
