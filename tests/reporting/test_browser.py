"""How headless Chromium shows the pages, at three widths and in both colour schemes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.reporting.page import compare, write_report
from tests.reporting.made_runs import make_run

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"


class Browser:
    """Headless Chromium, told what to do through its debugging pipe: JSON messages that end with a zero byte."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Chromium reads from 3 and writes to 4; numbers from 10 on cannot be in the way of that.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        redirect = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
        command = ["bash", "-c", redirect, "-", CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(command, pass_fds=ends, stderr=subprocess.DEVNULL)
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)
        self.output, self.input = os.fdopen(ours_out, "wb", buffering=0), os.fdopen(ours_in, "rb")
        self.events: list[dict[str, Any]] = []
        self.session, self.last_id = "", 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def _receive(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self.input.read(1)) != b"\0":
            assert byte, "the browser has gone"
            message += byte
        found: dict[str, Any] = json.loads(message)
        return found

    def call(self, method: str, **params: object) -> dict[str, Any]:
        self.last_id += 1
        message: dict[str, object] = {"id": self.last_id, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.output.write(json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.last_id:
            self.events.append(answer)
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, path: Path, width: int, scheme: str) -> None:
        """Loads the page; `events` then holds what it did."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        loader = self.call("Page.navigate", url=path.as_uri())["loaderId"]
        loaded = {"name": "load", "loaderId": loader}
        while not any(loaded.items() <= event["params"].items() for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def close(self) -> None:
        self.call("Browser.close")
        self.process.wait(30)
        self.output.close()
        self.input.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("no chromium is installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def contrast(first: str, second: str) -> float:
    """WCAG 2 contrast ratio of two CSS colours `rgb(r, g, b)`."""

    def luminance(colour: str) -> float:
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_pages_in_a_browser(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    run, other = make_run(tmp_path / ("run-with-a-long-name-" * 8)), make_run(tmp_path / "other", n_critic=3)
    for path in (write_report(run), compare([run, other, run], tmp_path / "out.html")):
        browser.open(path, width, scheme)
        assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
        sticking_out = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && "
        sticking_out += "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200))"
        assert browser.evaluate(sticking_out) == []
        cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert browser.evaluate(cut) == 0 or width == 390
        assert browser.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        colours = "(([s, p]) => [getComputedStyle(document.querySelector(s))[p]])"
        for selector in ("h3", "figcaption", "td", "summary", ".marked td"):
            if browser.evaluate(f"document.querySelector('{selector}') !== null"):
                ink = browser.evaluate(f"{colours}(['{selector}', 'color'])[0]")
                paper = browser.evaluate(
                    f"{colours}(['{'.marked td' if 'td' in selector else '.card'}', 'backgroundColor'])[0]"
                )
                assert contrast(ink, paper) >= 4.5
                assert (contrast(paper, "rgb(0, 0, 0)") < 4.5) == (scheme == "dark")
        chart_text = browser.evaluate(f"{colours}(['svg text', 'fill'])[0]")
        assert contrast(chart_text, browser.evaluate(f"{colours}(['.card', 'backgroundColor'])[0]")) >= 4.5
        requests = [
            event["params"]["request"]["url"]
            for event in browser.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
        wrong = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")
        assert [event for event in browser.events if event["method"] in wrong] == []
