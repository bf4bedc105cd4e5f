"""The page to chat on: its files put together into one that loads nothing, and the headers it is sent with."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

_SCRIPT = re.compile(r'<script src="([\w.]+)"></script>')
_STYLE = re.compile(r'<link rel="stylesheet" href="([\w.]+)">')


@cache
def page() -> str:
    """Return the page's source, with its scripts and its style sheet inside."""
    html = _SCRIPT.sub(lambda found: f"<script>{_file(found[1])}</script>", _file("index.html"))
    return _STYLE.sub(lambda found: f"<style>{_file(found[1])}</style>", html)


@cache
def page_headers() -> dict[str, str]:
    """Return the page's headers: it runs its own scripts only, loads nothing, talks to its own server and is shown in
    no frame.

    Scripts are named by their hashes. So what a model writes runs nowhere, even if the sanitiser let it through.
    """
    names = _SCRIPT.findall(_file("index.html"))
    scripts = " ".join(_hashed(_file(name)) for name in names)
    styles = " ".join(_hashed(_file(name)) for name in _STYLE.findall(_file("index.html")))
    return {
        "Content-Security-Policy": f"default-src 'none'; style-src {styles}; script-src {scripts}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _file(name: str) -> str:
    """Return the text of a file beside this one, without the address of a source map, which is not here."""
    text = (files("outdraft.serving.page") / name).read_text(encoding="utf-8")
    return re.sub(r"//# sourceMappingURL=.*", "", text)


def _hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
