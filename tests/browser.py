"""A page as a phone's browser shows it: headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.waiting import LIMIT_S, wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), "")
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
MEASURE = """(() => {
  const width = document.documentElement.clientWidth;
  const inside = (each) => each.closest('.wide') !== null && each.className !== 'wide';
  const beyond = [...document.querySelectorAll('main *')].filter(
    (each) => !each.closest('svg *') && !inside(each) && each.getBoundingClientRect().right > width + 0.5);
  return {
    width, scroll: document.documentElement.scrollWidth,
    beyond: beyond.map((each) => each.outerHTML.slice(0, 120)),
    broken: [...document.images].filter((each) => !each.naturalWidth).map((each) => each.src),
    plots: [...document.querySelectorAll('svg')].filter((each) => each.getBoundingClientRect().width > 100).length,
    text: document.body.innerText,
  };
})()"""


@dataclass
class Seen:
    """What the browser says of a page."""

    errors: list[str] = field(default_factory=list)
    """Lines of its console that are warnings or errors, uncaught exceptions, and files that did not load."""
    requests: list[str] = field(default_factory=list)
    """What it asked for outside of the page itself."""
    page: dict[str, Any] = field(default_factory=dict)
    """The result of `MEASURE`: widths in CSS pixels."""


def seen_on_a_phone(page: Path, profile: Path) -> Seen:
    """Open a file at a phone's width."""
    return asyncio.run(_seen(page, profile))


async def _seen(page: Path, profile: Path) -> Seen:
    async with _browser(profile) as address, aiohttp.ClientSession() as session:
        async with session.put(f"http://{address}/json/new?about:blank") as answer:
            target = (await answer.json())["webSocketDebuggerUrl"]
        async with session.ws_connect(target, max_msg_size=0) as socket:
            return await asyncio.wait_for(_visit(socket, page.resolve().as_uri()), LIMIT_S)


async def _visit(socket: aiohttp.ClientWebSocketResponse, address: str) -> Seen:
    seen, number, loaded = Seen(), 0, asyncio.Event()

    def note(method: str, data: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            seen.errors.append(str(data["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and data["type"] in ("error", "warning", "assert"):
            seen.errors.append(str(data["args"]))
        elif method == "Log.entryAdded" and data["entry"]["level"] in ("error", "warning"):
            seen.errors.append(data["entry"]["text"])
        elif method == "Network.loadingFailed":
            seen.errors.append(data["errorText"])
        elif method == "Network.requestWillBeSent":
            url = data["request"]["url"]
            seen.requests += [] if url == address or url.startswith("data:") else [url]
        elif method == "Page.loadEventFired":
            loaded.set()

    async def receive() -> dict[str, Any]:
        message: dict[str, Any] = await socket.receive_json()
        if "method" in message:
            note(message["method"], message["params"])
        return message

    async def call(method: str, **params: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        await socket.send_json({"id": number, "method": method, "params": params})
        while (message := await receive()).get("id") != number:
            pass
        assert "error" not in message, message
        result: dict[str, Any] = message["result"]
        return result

    for domain in ("Page", "Runtime", "Log", "Network"):
        await call(f"{domain}.enable")
    await call("Emulation.setDeviceMetricsOverride", **PHONE)
    await call("Page.navigate", url=address)
    while not loaded.is_set():
        await receive()
    measured = await call("Runtime.evaluate", expression=MEASURE, returnByValue=True)
    seen.page = measured["result"]["value"]
    return seen


@asynccontextmanager
async def _browser(profile: Path) -> AsyncIterator[str]:
    """A browser's debugging address; the process and its children end with it."""
    flags = ["--headless=new", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    flags += ["--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # its sandbox does not start as root; the page is our own
    log = (profile.parent / f"{profile.name}.log").open("wb")
    process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stdout=log, stderr=log, start_new_session=True)
    try:
        port = profile / "DevToolsActivePort"
        ready = f"chromium listens (its log: {log.name})"
        wait_until(ready, lambda: port.is_file() and port.read_text().strip(), alive=lambda: process.poll() is None)
        yield f"127.0.0.1:{port.read_text().split()[0]}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
