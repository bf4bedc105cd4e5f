"""The page: everything in one file, and in a browser a chat with tinted drafts, live figures and plain decoding."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import httpx
from running import NAME, Served
from test_server import settled

from browsers import Page
from outdraft.serving.app import page


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


ANSWER = 'document.querySelector("article.assistant:last-of-type")'


def test_a_chat_in_a_browser(served: Served, tmp_path: Path) -> None:
    with Page(f"{served.url}/#{quote('red <b>cat</b>')}", tmp_path) as seen:
        seen.wait(f"{ANSWER} && {ANSWER}.querySelector('.figures')")
        assert seen.value('document.querySelector("article.user .text").textContent') == "red <b>cat</b>", (
            "text is text"
        )
        assert seen.value('document.getElementById("model").textContent') == f"{NAME}, drafter: draft-model"
        assert seen.value(f"{ANSWER}.querySelectorAll('mark').length") > 0, "guessed tokens are tinted"
        assert seen.value(f"{ANSWER}.querySelectorAll('span').length") > 0, "others are not"
        colours = [f"getComputedStyle({ANSWER}.querySelector('{tag}')).backgroundColor" for tag in ("mark", "span")]
        assert seen.value(colours[0]) != seen.value(colours[1])
        live = seen.value('document.getElementById("live").textContent')
        assert re.fullmatch(r"tau [0-9.]+ · [0-9.]+ tokens/s", live)
        figures = seen.value(f"{ANSWER}.querySelector('.figures').textContent")
        assert re.search(r"with the drafter: 32 tokens, tau [0-9.]+ .* of \d+ drafted accepted", figures)

        drafted = served.figure("spec_decode_num_draft_tokens_total")
        seen.value("""document.getElementById("speculative").click();
            document.getElementById("question").value = "and dog";
            document.getElementById("most").value = 10;
            document.getElementById("ask").requestSubmit()""")
        seen.wait("document.querySelectorAll('article.assistant .figures').length == 2")
        assert seen.value(f"{ANSWER}.querySelector('.figures').textContent").startswith("plain: 10 tokens, tau 1.00")
        assert seen.value(f"{ANSWER}.querySelectorAll('mark').length") == 0
        assert served.figure("spec_decode_num_draft_tokens_total") == drafted
        assert not seen.complaints


def test_an_answer_can_be_stopped_and_mistakes_are_shown(served: Served, tmp_path: Path) -> None:
    with Page(served.url, tmp_path) as seen:
        seen.wait('document.getElementById("model").textContent')
        seen.value("""document.getElementById("most").value = 4000; answer("red")""")
        seen.wait("document.querySelector('article .error')")
        assert "the context is 128 tokens" in seen.value("document.querySelector('article .error').textContent")
        seen.value("""document.getElementById("most").value = 100; answer("red"); running.abort()""")
        seen.wait("document.querySelectorAll('article .error').length == 2 && !running")
        assert seen.value("turns.length") == 0, "nothing is kept of either"
        assert not seen.complaints
    settled(served)


def test_the_page_says_when_it_needs_a_key(starting: Callable[..., Served], tmp_path: Path) -> None:
    with Page(starting(api_key="secret").url, tmp_path) as seen:
        assert seen.wait('document.getElementById("model").textContent') == "needs a key"
        seen.value("""document.getElementById("key").value = "secret"; connect()""")
        seen.wait('document.getElementById("model").textContent.includes("drafter")')
        assert seen.value('document.getElementById("keybox").hidden')
