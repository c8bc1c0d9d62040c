"""Drives a headless Chromium over its debugging pipe (DevTools protocol), with the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

VARIABLE = "CHROMIUM"
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 180.0
Data = dict[str, Any]


class BrowserError(Exception):
    """The browser did not do what it was asked for."""


def find() -> str | None:
    """Return the path of a Chromium, or None; the environment variable CHROMIUM names one."""
    named = os.environ.get(VARIABLE)
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A running Chromium with one page.

    Args:
        program: its path.
        profile: an empty folder for its files.
    """

    def __init__(self, program: str, profile: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()  # (its input), (its output)
        options = [
            *(
                "--headless",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "--disable-gpu",
                "--hide-scrollbars",
            ),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--disable-quic", "--no-default-browser-check", "--disable-dev-shm-usage"),
        ]
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # Chromium refuses root otherwise; it opens nothing but our own page
        # the protocol speaks on descriptors 3 and 4; a shell puts them there, whatever numbers the pipes have here
        script = f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, program, *options, "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(ours[0], theirs[1]),
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from = ours[1], theirs[0]
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[Data] = []
        (target,) = [item for item in self.call("Target.getTargets")["targetInfos"] if item["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        for descriptor in (self._to, self._from):
            os.close(descriptor)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    # --- the protocol ---

    def call(self, method: str, **parameters: Any) -> Data:
        """Ask for something and return the answer.

        Raises:
            BrowserError: it refused, is gone, or does not answer.
        """
        self._number += 1
        message: Data = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._read(deadline, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']}")
                found: Data = answer["result"]
                return found
            self.events.append(answer)

    def _read(self, deadline: float, what: str) -> Data:
        while b"\0" not in self._buffer:
            ready, _writers, _errors = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._from, 1 << 20) if ready else b""
            if not part:
                raise BrowserError(f"no answer to {what} within {PATIENCE:.0f} s" if not ready else "the browser ended")
            self._buffer += part
        line, _zero, self._buffer = self._buffer.partition(b"\0")
        found: Data = json.loads(line)
        return found

    def wait_for(self, event: str) -> Data:
        """Return the next event of a name.

        Raises:
            BrowserError: it does not come.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            for index, found in enumerate(self.events):
                if found.get("method") == event:
                    return self.events.pop(index)
            self.events.append(self._read(deadline, event))

    # --- what a person does ---

    def view(self, width: int, height: int, dark: bool = False, script: bool = True) -> None:
        """Choose the window's size, the colours and whether scripts run; before `open`."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)

    def open(self, address: str) -> None:
        """Open a page and wait until it is loaded."""
        self.call("Page.navigate", url="about:blank")
        self.wait_for("Page.loadEventFired")
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.wait_for("Page.loadEventFired")

    def ask(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page.

        Raises:
            BrowserError: it threw.
        """
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key: one character, or Tab, Enter, Escape, ArrowDown, ArrowUp."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40}
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        code = codes.get(key, ord(key.upper()) if len(key) == 1 else 0)
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)
        self.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def type(self, text: str) -> None:
        """Type a text into what has the focus."""
        for char in text:
            self.press(char)

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
