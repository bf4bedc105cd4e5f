"""A headless browser for tests of pages: opened at an address, asked and told things by its debugging protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest


def browser() -> str:
    """A headless-capable Chromium, or a skip that says what is missing."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in (os.environ.get("CHROME_PATH", ""), *names) if (path := shutil.which(name))), None)
    if found is None:
        try:
            from playwright.sync_api import sync_playwright

            with sync_playwright() as engines:
                found = engines.chromium.executable_path if Path(engines.chromium.executable_path).exists() else None
        except Exception:  # without its browsers the package raises errors of its own kinds
            found = None
    if found is None:
        pytest.skip("needs Chromium on PATH, in CHROME_PATH or by playwright")
    return found


class Refused(Exception):
    """The browser does not do what it was told."""


class Page:
    """One page in a browser of its own.

    Args:
        url: opened at once.
        folder: for the browser's profile.
        before: a script that runs before those of the page.
    """

    def __init__(self, url: str, folder: Path, before: str = ""):
        profile = folder / "profile"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
        command = [browser(), *flags, f"--user-data-dir={profile}", "about:blank" if before else url]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._asked = 0
        self.complaints: list[str] = []
        """What the page wrote to its console, and exceptions of its scripts."""
        try:
            port = _waited(lambda: _first_line(profile / "DevToolsActivePort"))
            listing = f"http://127.0.0.1:{port}/json/list"
            pages = _waited(lambda: [one for one in _json(listing) if one["type"] == "page"])
            self._wire = _connected(pages[0]["webSocketDebuggerUrl"])
            self._call("Runtime.enable")
            if before:
                self._call("Page.enable")
                self._call("Page.addScriptToEvaluateOnNewDocument", source=before)
                self._call("Page.navigate", url=url)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def value(self, expression: str) -> Any:
        """Of an expression in the page."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Until it is true, and makes sense: a page may still be loading."""
        guarded = f"(() => {{ try {{ const it = {expression}; return it instanceof Node || it }} catch {{}} }})()"

        def found() -> Any:
            try:
                return self.value(guarded)
            except Refused:  # a page that is being loaded anew evaluates nothing
                return None

        return _waited(found)

    def reload(self) -> None:
        """Open the same address again: what is asked from now on is answered by the new page."""
        self.value("globalThis.left = true; location.reload()")
        self.wait("!globalThis.left && document.readyState == 'complete'")

    def frame(self) -> None:
        """Until the page has drawn what it shows, and told its listeners of scrolls and sizes."""
        drawn = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
        self._call("Runtime.evaluate", expression=drawn, awaitPromise=True)

    def prefer(self, scheme: str) -> None:
        """The reader's system is set to this colour scheme: light or dark."""
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def _call(self, method: str, **parameters: Any) -> Any:
        self._asked += 1
        self._send(json.dumps({"id": self._asked, "method": method, "params": parameters}).encode())
        while True:
            message = json.loads(self._receive())
            if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(message["params"]))
            if message.get("id") == self._asked:
                if "error" in message:
                    raise Refused(message["error"]["message"])
                return message["result"]

    # --- WebSocket (RFC 6455), as far as a client of this kind needs it ------------------------------------------

    def _send(self, data: bytes) -> None:
        size = struct.pack("!B", 0x80 | len(data)) if len(data) < 126 else struct.pack("!BH", 0x80 | 126, len(data))
        self._wire.sendall(b"\x81" + size + bytes(4) + data)  # masked with zeros

    def _receive(self) -> bytes:
        """The next message of text."""
        data, last = b"", False
        while not last:
            head, size = struct.unpack("!BB", self._exactly(2))
            last = bool(head & 0x80)
            if size >= 126:
                (size,) = struct.unpack("!H" if size == 126 else "!Q", self._exactly(2 if size == 126 else 8))
            data += self._exactly(size)
        return data

    def _exactly(self, count: int) -> bytes:
        parts = b""
        while len(parts) < count:
            part = self._wire.recv(count - len(parts))
            assert part, "the browser has gone"
            parts += part
        return parts


def _waited(found: Any, seconds: float = 300) -> Any:
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def _json(url: str) -> Any:
    return httpx.get(url, timeout=None).json()  # a browser that is starting may take long


def _first_line(path: Path) -> str | None:
    return path.read_text().split("\n")[0] if path.exists() and "\n" in path.read_text() else None


def _connected(url: str) -> socket.socket:
    parts = urlsplit(url)
    wire = socket.create_connection((str(parts.hostname), int(parts.port or 80)))
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [f"GET {parts.path} HTTP/1.1", f"Host: {parts.netloc}", "Upgrade: websocket", "Connection: Upgrade"]
    lines += [f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", ""]
    wire.sendall("\r\n".join(lines).encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        part = wire.recv(1)
        assert part, "the browser has gone"
        answer += part
    assert answer.startswith(b"HTTP/1.1 101"), answer
    return wire
