"""A headless Chromium, driven by its own protocol over a pipe: no port, no driver package.

    with Chromium() as browser:
        browser.open(url)
        browser.wait_for("document.querySelector('#x')")

Whatever the page logs as an error, throws, or is refused by its content policy is in `problems`.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser")
# Started beside other tests on two cores.
ANSWER_BOUND_S = 60.0

_ARGUMENTS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--hide-scrollbars"),
    *("--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-extensions", "--mute-audio"),
    "--font-render-hinting=none",
)
_KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), " ": (32, " ")}
_ARROWS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Gone(AssertionError):
    """The browser refused a call: most often, the document it was for has just been left."""


class Chromium:
    """One browser with one page. `close` ends all of its processes."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        assert EXECUTABLE is not None
        self.problems: list[str] = []
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self._buffer = b""
        self._profile = tempfile.mkdtemp(prefix="pdc-chromium-")
        there, self._out = os.pipe()
        self._in, back = os.pipe()
        sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()
        command = (EXECUTABLE, *_ARGUMENTS, *sandbox, f"--user-data-dir={self._profile}")
        self._process = subprocess.Popen(
            # It reads at 3 and writes at 4.
            ["bash", "-c", f'exec "$@" 3<&{there} 4>&{back}', "bash", *command, "about:blank"],
            pass_fds=(there, back),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(there)
        os.close(back)
        try:
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._call(f"{domain}.enable")
            self.resize(width, height)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def reload(self) -> None:
        """Returns once another document is there, so that nothing is asked of the old one."""
        self.leaving("location.reload()")

    def leaving(self, expression: str) -> None:
        """Runs what makes the page load itself anew, and waits until it has."""
        self.js("window.isOld = true")
        with contextlib.suppress(Gone):
            self.js(expression)
        self.wait_for("!window.isOld && document.readyState === 'complete'")

    def resize(self, width: int, height: int, is_phone: bool = False, scale: float = 1.0) -> None:
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=is_phone,
        )

    def prefer(self, scheme: str) -> None:
        """`light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", features=features)

    def js(self, expression: str) -> Any:
        """Its value; a promise's, once it is there. Raises: AssertionError: it threw."""
        answer = self._call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, within_s: float = 30.0) -> Any:
        """The first value of `expression` that counts as true; True for an element."""
        give_up_s = time.monotonic() + within_s
        # An element by its value is {}, which counts as false here.
        value = f"const found = {expression}; return found instanceof Element ? true : found;"
        while True:
            with contextlib.suppress(Gone):
                found = self.js(f"(() => {{ try {{ {value} }} catch {{ return null }} }})()")
                if found:
                    return found
            assert time.monotonic() < give_up_s, (
                f"not within {within_s:g} s: {expression}; problems: {self.problems}"
            )
            time.sleep(0.1)

    def text(self, selector: str) -> str:
        found = self.js(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")
        return str(found)

    def click(self, selector: str) -> None:
        """With the mouse, in its middle."""
        x, y = self._point(selector, 0.5)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str, across: float = 0.5) -> None:
        """The mouse over it, this share of its width from the left."""
        x, y = self._point(selector, across)
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def _point(self, selector: str, across: float) -> tuple[float, float]:
        x, y = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            f"const r = e.getBoundingClientRect(); return [r.x + {across} * r.width,"
            "r.y + r.height / 2] })()"
        )
        return x, y

    def type(self, text: str) -> None:
        self._call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        code, said = _KEYS.get(key, (_ARROWS.get(key, ord(key[0].upper())), ""))
        text = said or (key if len(key) == 1 else "")
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self._call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """`whole`: all of the page, not what is in the window."""
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        for end in (self._out, self._in):
            os.close(end)
        try:
            # It ends by itself when its pipe is closed.
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        give_up_s = time.monotonic() + ANSWER_BOUND_S
        while True:
            answer = self._receive(give_up_s, method)
            if answer.get("id") == number:
                if "error" in answer:
                    raise Gone(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _receive(self, give_up_s: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left_s = give_up_s - time.monotonic()
            ready, _, _ = select.select([self._in], [], [], max(0.0, left_s))
            assert ready, f"Chromium has not answered {method} in {ANSWER_BOUND_S:g} s"
            piece = os.read(self._in, 1 << 20)
            assert piece, f"Chromium ended during {method}"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        said = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                details = said["exceptionDetails"]
                self.problems.append(
                    details.get("exception", {}).get("description") or details["text"]
                )
            case "Runtime.consoleAPICalled" if said["type"] in ("error", "warning", "assert"):
                self.problems.append(" ".join(str(a.get("value")) for a in said["args"]))
            case "Log.entryAdded" if said["entry"]["level"] in ("error", "warning"):
                entry = said["entry"]
                self.problems.append(f"{entry['text']} {entry.get('url', '')}".strip())
