"""The page of `chat.py --web` in a real browser: needs Streamlit (no dependency of this project) and Chromium.

.venv/bin/uv pip install --target FOLDER 'streamlit>=1.67,<2'
PYTHONPATH=FOLDER .venv/bin/python -m pytest -m long tests/test_chat_page.py
"""

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from helpers import SCRIPTS
from helpers.browser import Browser
from helpers.webdatasets import picture

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("streamlit") is None, reason="Streamlit is not installed"),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def page(small_checkpoint):
    """The address of the page, served by chat.py, which ends with Ctrl-C."""
    port = free_port()
    command = [str(SCRIPTS / "chat.py"), str(small_checkpoint), "--web", "--port", str(port), "--max-new-tokens", "6"]
    server = subprocess.Popen(
        [sys.executable, *command], stderr=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    yield f"http://127.0.0.1:{port}"
    server.send_signal(signal.SIGINT)
    assert server.wait(100) == 0 and "Traceback" not in server.stderr.read()


def test_a_conversation_about_pictures_in_a_browser_that_asks_nobody_else(page, tmp_path, small_checkpoint):
    paths = [tmp_path / "a.png", tmp_path / "b.jpg", tmp_path / "broken.png"]
    paths[0].write_bytes(picture(size=(56, 56)))
    paths[1].write_bytes(picture("JPEG", (84, 56)))
    paths[2].write_bytes(picture(size=(56, 56))[:-60])
    messages = "document.querySelectorAll('[data-testid=stChatMessage]')"
    ready = "document.querySelector('[data-testid=stChatInputTextArea]')"

    async def story() -> None:
        async with Browser(CHROMIUM, tmp_path / "profile") as browser:
            for _ in range(60):  # until the model is loaded
                await browser.do("Page.navigate", url=page)
                await asyncio.sleep(1)
                if await browser.value(f"!!{ready}"):
                    break
            await browser.value(f"{ready}.focus()")
            await browser.choose_files(paths[0], paths[1])
            await asyncio.sleep(2)
            await browser.value(f"{ready}.focus()")
            await browser.type("Which of the two digits is larger?")
            await browser.until(f"{messages}.length == 2 && {messages}[1].innerText.split('\\n').length > 1")
            assert await browser.value(f"{messages}[0].querySelectorAll('img').length") == 2
            await browser.value(f"{ready}.focus()")
            await browser.type("And now?")
            await browser.until(f"{messages}.length == 4 && {messages}[3].innerText.split('\\n').length > 1")
            await browser.choose_files(paths[2])
            await asyncio.sleep(2)
            await browser.value(f"{ready}.focus()")
            await browser.type("What is this?")
            await browser.until("document.body.innerText.includes('truncated or damaged image')")
            await browser.screenshot(tmp_path / "page.png")
            await browser.value(
                "[...document.querySelectorAll('button')].find(b => b.innerText == 'New conversation').click()"
            )
            await browser.until(f"{messages}.length == 0")
            elsewhere = [url for url in browser.requested if not url.startswith((page, "data:", "blob:"))]
            assert elsewhere == []

    asyncio.run(story())
