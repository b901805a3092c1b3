"""A headless Chromium for tests, over the WebDriver protocol (https://www.w3.org/TR/webdriver2/)."""

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
_opener = build_opener(ProxyHandler({}))  # the driver is on this machine


class Browser:
    """One window."""

    def __init__(self, address: str) -> None:
        options = {"binary": CHROMIUM, "args": ARGUMENTS}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        self.session = address
        started = self._ask("/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"{address}/session/{started['sessionId']}"

    def _ask(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.session + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with _opener.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from error

    def open(self, path: Path, tab: str = "") -> None:
        """Load a file from the disk."""
        self._ask("/url", {"url": "about:blank"})
        self._ask("/url", {"url": f"{path.resolve().as_uri()}{tab}"})

    def run(self, script: str) -> Any:
        """What a function with this body returns in the page."""
        return self._ask("/execute/sync", {"script": script, "args": []})

    def press(self, key: str) -> None:
        """Press a key and let it go, at what has the focus."""
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self._ask("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": keys}]})

    def click(self, selector: str) -> None:
        """Click on the first element that matches, as a user does: it has to be seen."""
        found = self._ask("/element", {"using": "css selector", "value": selector})
        self._ask(f"/element/{next(iter(found.values()))}/click", {})

    def resize(self, width: int, height: int = 900, scheme: str = "light") -> None:
        """Set the size of the page, in CSS pixels, and its colours."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._command("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._command("Emulation.setEmulatedMedia", {"features": features})

    def without_scripts(self) -> None:
        """From the next page on, run no JavaScript."""
        self._command("Emulation.setScriptExecutionDisabled", {"value": True})

    def screenshot(self, path: Path) -> None:
        """Save what is seen."""
        path.write_bytes(base64.b64decode(self._ask("/screenshot", method="GET")))

    def text(self) -> str:
        """All that can be read, also where scripts are off."""
        body = self._ask("/element", {"using": "css selector", "value": "body"})
        return str(self._ask(f"/element/{next(iter(body.values()))}/text", method="GET"))

    def console(self) -> list[str]:
        """Messages since the last call."""
        return [entry["message"] for entry in self._ask("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call, but for files and data."""
        messages = [json.loads(entry["message"])["message"] for entry in self._ask("/se/log", {"type": "performance"})]
        sent = [it["params"]["request"]["url"] for it in messages if it["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("file:", "data:", "about:"))]

    def _command(self, name: str, parameters: dict[str, Any]) -> None:
        self._ask("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def close(self) -> None:
        self._ask("", method="DELETE")


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with its driver, for as long as it is needed."""
    assert DRIVER is not None
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            port = next(
                line.rsplit("port ", 1)[1].strip(" .\n") for line in driver.stdout if "successfully on port" in line
            )
            window = Browser(f"http://127.0.0.1:{port}")
            try:
                yield window
            finally:
                window.close()
        finally:
            driver.terminate()
