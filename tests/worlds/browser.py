"""A real Chromium without a window, told what to do over its DevTools protocol: one browser, and tabs in it.

The protocol is JSON over a WebSocket, and what tests need of it is a dozen calls. A driver would bring a second browser and its own node.
"""

import asyncio
import base64
import itertools
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(__file__).parents[2] / ".cache/axe/axe_playwright_python/axe.min.js"
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run")
_QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-default-browser-check")
_PATIENCE_SECONDS = 60.0


class Tab:
    """One page. errors: what its scripts failed by, and what the browser refused it."""

    def __init__(self, browser: "Browser", session: str) -> None:
        self._browser = browser
        self.session = session
        self.errors: list[str] = []
        self.loaded = asyncio.Event()

    async def call(self, method: str, **parameters: Any) -> Any:
        return await self._browser.call(method, self.session, **parameters)

    async def open(self, url: str) -> None:
        """Returns when all of it is loaded."""
        self.loaded.clear()
        await self.call("Page.navigate", url=url)
        await asyncio.wait_for(self.loaded.wait(), _PATIENCE_SECONDS)

    async def evaluate(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if failed := found.get("exceptionDetails"):
            raise AssertionError(f"{script}: {failed.get('exception', {}).get('description') or failed['text']}")
        return found["result"].get("value")

    async def until(self, script: str) -> None:
        """Looks at each frame until the expression holds; while it fails, it does not."""
        holds = f"(() => {{ try {{ return {script} }} catch {{ return false }} }})()"
        looks = f"new Promise(done => {{ const look = () => {holds} ? done() : requestAnimationFrame(look); look(); }})"
        try:
            await asyncio.wait_for(self.evaluate(looks), _PATIENCE_SECONDS)
        except TimeoutError:
            text = await self.evaluate("document.body.innerText.slice(0, 2000)")
            raise AssertionError(f"this does not come to be: {script}\n{self.errors}\n{text}") from None

    async def text(self, selector: str) -> str:
        """What an element says, wherever the page is scrolled to: `innerText` leaves out rows that are out of view and not laid out."""
        return str(await self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))

    async def press(self, key: str, *, text: str = "", shift: bool = False) -> None:
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}
        of = {"key": key, "windowsVirtualKeyCode": codes.get(key, ord(key[0].upper())), "modifiers": 8 if shift else 0}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text or ("\r" if key == "Enter" else ""), **of)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **of)

    async def type(self, text: str) -> None:
        for letter in text:
            await self.press(letter, text=letter)

    async def looks(self, *, width: int = 1280, height: int = 900, scheme: str = "light", scale: float = 1) -> None:
        """How large the window is, and which colours the person prefers."""
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=width < 600)
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def picture(self, file: Path, **of: Any) -> None:
        file.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot", **of))["data"]))


class Browser:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._tabs: dict[str, Tab] = {}

    async def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json(
            {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session is not None else {})
        )
        return await answer

    async def listen(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                answer = self._asked.pop(said["id"])
                if answer.done():
                    continue
                if "error" in said:
                    answer.set_exception(AssertionError(f"the browser refuses: {said['error']}"))
                else:
                    answer.set_result(said["result"])
            elif tab := self._tabs.get(said.get("sessionId", "")):
                if said["method"] == "Runtime.exceptionThrown":
                    tab.errors.append(str(said["params"]["exceptionDetails"]))
                elif said["method"] == "Page.loadEventFired":
                    tab.loaded.set()
                elif said["method"] == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                    tab.errors.append(said["params"]["entry"]["text"])

    @asynccontextmanager
    async def tab(self, url: str) -> AsyncIterator[Tab]:
        """A page of its own, with the address open."""
        context = (await self.call("Target.createBrowserContext"))["browserContextId"]
        try:
            target = (await self.call("Target.createTarget", url="about:blank", browserContextId=context))["targetId"]
            session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
            tab = self._tabs[session] = Tab(self, session)
            for domain in ("Page", "Runtime", "Log"):
                await tab.call(f"{domain}.enable")
            await tab.looks()
            await tab.open(url)
            yield tab
        finally:
            await self.call("Target.disposeBrowserContext", browserContextId=context)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser with a folder of its own, until the block ends."""
    assert CHROMIUM is not None, "no Chromium is on this machine"
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as folder:
        arguments = (*_FLAGS, *_QUIET, f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank")
        process = await asyncio.create_subprocess_exec(CHROMIUM, *arguments, stderr=asyncio.subprocess.PIPE)
        try:
            assert process.stderr is not None
            address, said = "", b""
            async for line in process.stderr:
                said += line
                if b"DevTools listening on " in line:
                    address = line.decode().split()[-1]
                    break
            assert address, f"Chromium did not start: {said.decode()}"
            drained = asyncio.create_task(process.stderr.read())
            async with aiohttp.ClientSession() as http, http.ws_connect(address, max_msg_size=0) as socket:
                browser = Browser(socket)
                listening = asyncio.create_task(browser.listen())
                try:
                    yield browser
                finally:
                    listening.cancel()
            drained.cancel()
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
