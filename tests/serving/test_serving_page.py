"""The page: everything in one file; in a browser a chat with tinted drafts, live figures, a race with plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from running import NAME, Served
from test_server import settled

from browsers import Page
from outdraft.serving.page import _file, page


class Loads(HTMLParser):
    """What a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {name}={value}" for name, value in attributes if name == "src"]
        self.found += [f"{tag} {value}" for name, value in attributes if name == "href" and value != "data:,"]


def test_the_page_loads_nothing(served: Served) -> None:
    answer = httpx.get(served.url, timeout=None)
    assert answer.text == page() and answer.headers["content-type"].startswith("text/html")
    loads = Loads()
    loads.feed(answer.text)
    assert not loads.found
    own = "".join(map(_file, ("index.html", "page.css", "text.js", "page.js")))
    assert not re.findall(r"https?://|@import|url\(", own), "addresses stand in the libraries' comments alone"
    policy = answer.headers["content-security-policy"]
    assert "connect-src 'self'" in policy and "unsafe" not in policy and policy.count("'sha256-") == 5


ANSWER = 'document.querySelector("article.assistant:last-of-type")'
TICKING = "let ticks = 0; performance.now = () => (ticks += 100);"
"""The page's clock goes on when it is read, so that there is a rate however many events a network chunk has."""


def test_a_chat_in_a_browser(served: Served, tmp_path: Path) -> None:
    with Page(f"{served.url}/#{quote('red <b>cat</b>')}", tmp_path, before=TICKING) as seen:
        seen.wait(f"{ANSWER} && {ANSWER}.querySelector('.figures')")
        assert seen.value('document.querySelector("article.user .text").textContent') == "red <b>cat</b>", (
            "text is text"
        )
        assert seen.value('document.getElementById("model").textContent') == f"{NAME}, drafter: draft-model"
        assert seen.value(f"{ANSWER}.querySelectorAll('mark').length") > 0, "guessed tokens are tinted"
        tinted = f"[...{ANSWER}.querySelectorAll('mark')].map((one) => one.textContent.length).reduce((a, b) => a + b)"
        assert seen.value(tinted) < seen.value(f"{ANSWER}.querySelector('.text').textContent.length"), "others are not"
        colours = [f"getComputedStyle({ANSWER}.querySelector('{tag}')).backgroundColor" for tag in ("mark", ".text")]
        assert seen.value(colours[0]) != seen.value(colours[1])
        assert seen.value(f"{ANSWER}.querySelectorAll('.figures')[1].textContent") == "cut at 32 tokens"
        live = seen.value('document.getElementById("live").textContent')
        assert re.fullmatch(r"tau [0-9.]+ · [0-9.]+ tokens/s", live)
        figures = seen.value(f"{ANSWER}.querySelector('.figures').textContent")
        assert re.search(r"with the drafter: 32 tokens, tau [0-9.]+ .* \d+% of the text came from drafts", figures)

        drafted = served.figure("spec_decode_num_draft_tokens_total")
        seen.value("""document.getElementById("speculative").click();
            document.getElementById("question").value = "and dog";
            document.getElementById("most").value = 10;
            document.getElementById("ask").requestSubmit()""")
        seen.wait("document.querySelectorAll('article.assistant .actions').length == 2")
        assert seen.value(f"{ANSWER}.querySelector('.figures').textContent").startswith("plain: 10 tokens, tau 1.00")
        assert seen.value(f"{ANSWER}.querySelectorAll('mark').length") == 0
        assert served.figure("spec_decode_num_draft_tokens_total") == drafted
        assert not seen.complaints


def test_an_answer_can_be_stopped_and_mistakes_are_shown(served: Served, tmp_path: Path) -> None:
    with Page(served.url, tmp_path) as seen:
        seen.wait('document.getElementById("model").textContent')
        assert seen.value("document.activeElement.id") == "question", "one can type at once"
        seen.value("""document.getElementById("most").value = 4000; answer("red")""")
        seen.wait("document.querySelector('article .error')")
        assert "the context is 128 tokens" in seen.value("document.querySelector('article .error').textContent")
        assert seen.value("turns.length") == 0 and seen.value('document.getElementById("question").value') == "red"
        seen.value("""document.getElementById("question").value = "";
            document.getElementById("most").value = 100; answer("cat"); running.abort()""")
        seen.wait("!running && document.getElementById('question').value == 'cat'")
        assert seen.value("turns.length") == 0, "the question is typed again"
        assert not seen.complaints
    settled(served)


LAST = "[...document.querySelectorAll('article.assistant')].at(-1)"
HELD = """
    const reading = ReadableStreamDefaultReader.prototype.read;
    const decoder = new TextDecoder(), encoder = new TextEncoder();
    let heard = [], given = false;
    ReadableStreamDefaultReader.prototype.read = async function () {
        while (heard.length < 4) {
            const { done, value } = await reading.call(this);
            if (done) break;
            heard = (heard.join("\\n\\n") + decoder.decode(value, { stream: true })).split("\\n\\n");
        }
        if (!given) {
            given = true;
            return { done: false, value: encoder.encode(heard.slice(0, 3).join("\\n\\n") + "\\n\\n") };
        }
        return new Promise((_, no) => running.signal.addEventListener("abort", () => no(running.signal.reason)));
    };
    globalThis.again = () => { ReadableStreamDefaultReader.prototype.read = reading; };
"""
"""The page is given the first three events of a stream and then waits, however fast the answer was written."""


def test_a_stopped_answer_is_kept_and_goes_on(served: Served, tmp_path: Path) -> None:
    with Page(served.url, tmp_path) as seen:
        seen.wait("model.method")
        seen.value(f"""{HELD} document.getElementById("most").value = 20; answer("red")""")
        seen.wait("turns.length == 1 && document.querySelector('article.assistant .text')?.textContent")
        seen.value("document.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }))")
        seen.wait("!running")
        part = seen.value("turns[1].content")
        assert part and seen.value("turns.length") == 2, "what was said stays in the conversation"
        assert "stopped" in seen.value(f"{LAST}.textContent")
        seen.value(f"again(); {LAST}.querySelectorAll('.actions button')[2].click()")
        seen.wait(f"!running && {LAST}.textContent.includes('cut at 20 tokens')")
        whole = seen.value("turns[1].content")
        assert whole.startswith(part) and len(whole) > len(part) and seen.value("turns.length") == 2

        assert seen.value("sessionStorage.getItem('talk')").count("role") == 2
        seen.reload()
        seen.wait(f"model.method && turns.length == 2 && {LAST}.querySelector('.text').textContent.length")
        seen.value(f"{LAST}.querySelectorAll('.actions button')[1].click()")
        seen.wait("!running && turns.length == 2 && document.querySelectorAll('article .figures').length")
        seen.value("document.querySelector('article.user .actions button').click()")
        assert seen.value("turns.length") == 0 and seen.value('document.getElementById("question").value') == "red"
        assert seen.value("document.querySelectorAll('article').length") == 0
        assert not seen.complaints
    settled(served)


MARKDOWN = """# Title

1. **bold** & `a < b`
2. [link](https://example.org/x) [bad](javascript:alert(1)) ![picture](https://example.org/y.png)

```python
print("<b>")
```

<img src=x onerror="globalThis.broken = 1"> <script>globalThis.broken = 1</script>
<svg onload="globalThis.broken = 1"></svg>

| a | b |
|---|---|
| 1 | 2 |
"""


def test_answers_are_markdown_that_runs_and_loads_nothing(served: Served, tmp_path: Path) -> None:
    with Page(served.url, tmp_path) as seen:
        seen.wait("model.method")
        seen.value(f"globalThis.said = new Answer(card('assistant'), {json.dumps(MARKDOWN)})")
        inside = f"{LAST}.querySelector('.text')"
        assert seen.value(f"{inside}.querySelector('h1').textContent") == "Title"
        assert seen.value(f"{inside}.querySelector('li strong').textContent") == "bold"
        assert seen.value(f"{inside}.querySelector('li code').textContent") == "a < b"
        assert seen.value(f"{inside}.querySelector('pre code').textContent") == 'print("<b>")\n'
        assert seen.value(f"{inside}.querySelectorAll('td').length") == 2
        links = f"[...{inside}.querySelectorAll('a')].map((one) => [one.getAttribute('href'), one.rel])"
        assert seen.value(links) == [["https://example.org/x", "noreferrer"], [None, "noreferrer"]]
        assert seen.value(f"{inside}.querySelectorAll('img, script, svg').length") == 0
        assert '<img src=x onerror="globalThis.broken = 1">' in seen.value(f"{inside}.textContent"), "it is shown"
        # Without the sanitiser, too, nothing of it runs: the page's policy names its scripts.
        seen.value("""globalThis.refused = [];
            document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
            (() => { const box = document.createElement("div"); document.body.append(box);
            box.innerHTML = "<img src=x onerror='globalThis.broken = 1'>";
            const script = document.createElement("script");
            script.textContent = "globalThis.broken = 1";
            box.append(script); })()""")
        seen.wait("['img-src', 'script-src-attr', 'script-src-elem'].every((one) => refused.includes(one))")
        assert seen.value("globalThis.broken") is None


def test_tints_follow_their_tokens_through_markdown(served: Served, tmp_path: Path) -> None:
    with Page(served.url, tmp_path) as seen:
        seen.wait("model.method")
        pieces = [
            ["**A", None],
            ["lpha**", "drafter"],
            [" is\n\n", None],
            ["- b", "ngram"],
            ["eta\n", None],
            ["- `c`", "drafter"],
        ]
        seen.value(f"""globalThis.said = new Answer(card("assistant"));
            for (const [text, source] of {json.dumps(pieces)}) said.add(text, source); said.paint()""")
        found = seen.value(f"[...{LAST}.querySelectorAll('mark')].map((one) => [one.textContent, one.className])")
        assert found == [["lpha", "drafter"], ["b", "ngram"], ["c", "drafter"]]
        colours = f"[...{LAST}.querySelectorAll('mark')].map((one) => getComputedStyle(one).backgroundColor)"
        first, second, third = seen.value(colours)
        assert first == third != second


def test_a_race_with_plain_decoding(served: Served, tmp_path: Path) -> None:
    with Page(served.url, tmp_path, before=TICKING) as seen:
        seen.wait("model.method")
        seen.value("""document.getElementById("system").value = "Be brief";
            document.getElementById("most").value = 20;
            document.getElementById("question").value = "red"; document.getElementById("race").click()""")
        seen.wait(f"!running && {LAST}.querySelector('.actions')")
        assert re.fullmatch(r"[0-9.]+x of plain", seen.value(f"{LAST}.querySelector('.ratio').textContent"))
        note = seen.value(f"[...{LAST}.querySelectorAll('.figures')].at(-1).textContent")
        assert re.search(r"without drafts 20 tokens in .* with drafts 20 tokens in .*; the texts are equal", note)
        seen.wait(f"(([a, b]) => a.textContent === b.textContent)({LAST}.querySelectorAll('.text'))")
        assert seen.value(f"{LAST}.querySelectorAll('section')[0].querySelectorAll('mark').length") == 0
        assert seen.value(f"{LAST}.querySelectorAll('section')[1].querySelectorAll('mark').length") > 0
        assert seen.value("turns.map((one) => one.role).join()") == "user,assistant", "one answer is kept"
        assert seen.value("messages('')[0].content") == "Be brief"
        seen.value("answer('and')")
        seen.wait("!running && turns.length == 4")
        assert re.search(r"[0-9.]+x of plain", seen.value('document.getElementById("live").textContent'))
        assert not seen.complaints


def test_what_is_added_at_the_end_is_in_view(served: Served, tmp_path: Path) -> None:
    with Page(served.url, tmp_path) as seen:
        seen.wait("model.method")
        seen.value("document.getElementById('most').value = 6; document.body.style.height = '400px'")
        for place in range(3):
            seen.value("answer('red')")
            seen.wait(f"!running && turns.length == {2 * place + 2}")
        talk = "document.getElementById('talk')"
        assert seen.value(f"{talk}.scrollHeight > {talk}.clientHeight")
        box, last = (f"{one}.getBoundingClientRect().bottom" for one in (talk, f"{LAST}.querySelector('.actions')"))
        assert seen.value(last) <= seen.value(box)
        seen.value(f"{talk}.scrollTop -= 9; document.body.style.height = '300px'")  # as a phone's keyboard makes it
        seen.wait(f"{talk}.clientHeight < 200 && {last} <= {box}")
        shown = "[...document.querySelectorAll('.open')].map((one) => one.checkVisibility())"
        assert seen.value(shown) == [False, False, True], "only the last answer goes on"
        seen.value(f"{talk}.scrollTop = 0")
        seen.frame()
        seen.value("document.body.style.height = '280px'")
        seen.frame()
        assert seen.value(f"{talk}.scrollTop") == 0, "who has scrolled up stays there"


CONTRAST = """(() => {
    const parts = (colour) => colour.match(/[0-9.]+/g).map(Number);
    const light = (colour) => parts(colour).slice(0, 3).map((one) => one / 255)
        .map((one) => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
        .reduce((sum, one, i) => sum + [0.2126, 0.7152, 0.0722][i] * one, 0);
    const behind = (one) => {
        const colour = getComputedStyle(one).backgroundColor;
        return parts(colour)[3] === 0 ? behind(one.parentElement) : colour;
    };
    const ratio = (one, pseudo) => {
        const [low, high] = [light(getComputedStyle(one, pseudo).color), light(behind(one))].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const seen = [...document.querySelectorAll("h1, span, label, summary, button, p, mark, li, code, a")]
        .filter((one) => one.checkVisibility() && one.textContent.trim())
        .map((one) => [one.textContent, ratio(one)]);
    return [...seen, ["placeholder", ratio(document.getElementById("question"), "::placeholder")]];
})()"""
"""The contrast of every text that shows, as the WCAG count it."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_told_from_what_is_behind_it(served: Served, tmp_path: Path, scheme: str) -> None:
    with Page(served.url, tmp_path) as seen:
        seen.wait("model.method")
        seen.prefer(scheme)
        assert seen.value(f"matchMedia('(prefers-color-scheme: {scheme})').matches")
        seen.value(f"""document.getElementById("repetitions").hidden = false;
            const body = card("assistant");
            globalThis.said = new Answer(body, {json.dumps(MARKDOWN)});
            for (const source of ["drafter", "ngram"]) said.add(` *text of a ${{source}}*`, source);
            said.paint(); note(body, "figures"); note(body, "wrong", "error"); answered(body, "x", true)""")
        found = seen.value(CONTRAST)
        assert len(found) > 20 and {"guessed by the drafter", "wrong", "go on"} <= {text for text, _ in found}
        assert [one for one in found if one[1] < 4.5] == []


def test_the_page_says_when_it_needs_a_key(starting: Callable[..., Served], tmp_path: Path) -> None:
    with Page(starting(api_key="secret").url, tmp_path) as seen:
        assert seen.wait('document.getElementById("model").textContent') == "needs a key"
        seen.value("""document.getElementById("key").value = "secret"; connect()""")
        seen.wait('document.getElementById("model").textContent.includes("drafter")')
        assert seen.value('document.getElementById("keybox").hidden')
