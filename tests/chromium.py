"""Headless Chromium, driven over its own DevTools protocol: open a page, evaluate JavaScript, take a picture."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import aiohttp

SWITCHES = (
    "--headless",
    "--hide-scrollbars",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
)


class Page:
    """One tab."""

    def __init__(self, socket, loop):
        self._socket, self._loop, self._numbers = socket, loop, itertools.count()

    def call(self, method, **parameters):
        """Send one DevTools command and return its result."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), 60))

    async def _call(self, method, parameters):
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while (answer := await self._socket.receive_json()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, script):
        """Return the value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait_for(self, script, timeout_s=600.0):
        """Evaluate an expression until it is true and return its value."""
        end_s = time.monotonic() + timeout_s
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end_s, f"never true: {script}\n{self.evaluate('document.body.innerText')}"
            time.sleep(0.2)
        return value

    def type(self, text):
        """Type a text and Enter into the element that has the focus."""
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )

    def picture(self, path):
        """Save what the window shows as PNG."""
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def open_page(url, cookies=None, *, size=(1500, 1000)):
    """Open a URL in a browser of its own, with the given cookies set for it."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "Chromium is required on PATH"
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        place = [f"--user-data-dir={profile}", "--remote-debugging-port=0", f"--window-size={size[0]},{size[1]}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([program, *SWITCHES, *place, "about:blank"], **quiet)
        try:
            port = _port(Path(profile) / "DevToolsActivePort")
            session, socket = loop.run_until_complete(_connect(port))
            page = Page(socket, loop)
            for name, value in (cookies or {}).items():
                page.call("Network.setCookie", name=name, value=value, url=url)
            page.call("Page.navigate", url=url)
            yield page
            loop.run_until_complete(session.close())
        finally:
            process.terminate()
            process.wait(timeout=30)
            loop.close()


def _port(file):
    for _ in range(1200):
        if file.is_file() and (text := file.read_text()):
            return int(text.splitlines()[0])
        time.sleep(0.1)
    msg = "Chromium did not start"
    raise TimeoutError(msg)


async def _connect(port):
    session = aiohttp.ClientSession()
    tabs = []
    while not tabs:  # the port is open before the first tab is
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
    (tab,) = tabs
    return session, await session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)
