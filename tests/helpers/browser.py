"""A headless Chromium, driven over its DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""

import asyncio
import base64
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp


class Browser:
    """`async with Browser(chromium, folder) as browser:`; `requested` holds the address of every request of its page, `errors`
    what its console showed of errors."""

    def __init__(self, program: str, profile: Path):
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            "--window-size=1000,900",
        ]
        self.process = subprocess.Popen(
            [program, *options, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.PIPE, text=True
        )
        self.numbers, self.waiting, self.requested, self.errors = itertools.count(1), {}, [], []

    async def __aenter__(self) -> "Browser":
        line = next(line for line in self.process.stderr if "DevTools listening on" in line)
        address = line.split()[-1].split("/")[2]
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://{address}/json") as response:
            page = next(tab for tab in await response.json() if tab["type"] == "page")
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        self.reader = asyncio.create_task(self._read())
        for domain in ("Network", "Page", "DOM", "Runtime", "Log"):
            await self.do(f"{domain}.enable")
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.session.close()
        self.process.terminate()
        self.process.wait()

    async def _read(self) -> None:
        async for message in self.socket:
            content = json.loads(message.data)
            if "id" in content:
                self.waiting.pop(content["id"]).set_result(content)
            elif content["method"] == "Network.requestWillBeSent":
                self.requested.append(content["params"]["request"]["url"])
            elif content["method"] == "Runtime.exceptionThrown":
                self.errors.append(content["params"]["exceptionDetails"])
            elif content["method"] == "Log.entryAdded" and content["params"]["entry"]["level"] in ("error", "warning"):
                self.errors.append(content["params"]["entry"])
            elif content["method"] == "Runtime.consoleAPICalled" and content["params"]["type"] in ("error", "warning"):
                self.errors.append(content["params"]["args"])

    async def do(self, method: str, **params: Any) -> dict[str, Any]:
        number, answer = next(self.numbers), asyncio.get_running_loop().create_future()
        self.waiting[number] = answer
        await self.socket.send_json({"id": number, "method": method, "params": params})
        return (await asyncio.wait_for(answer, 60))["result"]

    async def value(self, script: str) -> Any:
        return (await self.do("Runtime.evaluate", expression=script, returnByValue=True))["result"].get("value")

    async def until(self, script: str, seconds: float = 60) -> None:
        for _ in range(int(seconds / 0.2)):
            if await self.value(script):
                return
            await asyncio.sleep(0.2)
        raise AssertionError(f"{script}: not within {seconds} s\n{await self.value('document.body.innerText')}")

    async def type(self, text: str) -> None:
        await self.do("Input.insertText", text=text)
        await self.do("Input.dispatchKeyEvent", type="keyDown", key="Enter", windowsVirtualKeyCode=13, text="\r")

    async def choose_files(self, *paths: Path) -> None:
        root = (await self.do("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.do("DOM.querySelector", nodeId=root, selector="input[type=file]"))["nodeId"]
        await self.do("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    async def screen(self, width: int, height: int, scheme: str = "light", medium: str = "") -> None:
        """`scheme`: light or dark; `medium`: print, or the screen's."""
        await self.do("Emulation.setScrollbarsHidden", hidden=True)
        await self.do(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        await self.do(
            "Emulation.setEmulatedMedia", media=medium, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    async def key(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    async def screenshot(self, path: Path, whole: bool = False) -> None:
        found = await self.do("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


async def _picture(page: str, picture: str, width: str, height: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with Browser("chromium", Path(folder)) as browser:
            await browser.screen(int(width), int(height))
            await browser.do("Page.navigate", url=Path(page).absolute().as_uri())
            await browser.until("document.readyState == 'complete'")
            await asyncio.sleep(1)  # until the curves are drawn
            await browser.screenshot(Path(picture))


if __name__ == "__main__":  # PYTHONPATH=tests python -m helpers.browser PAGE PNG WIDTH HEIGHT
    asyncio.run(_picture(*sys.argv[1:]))
