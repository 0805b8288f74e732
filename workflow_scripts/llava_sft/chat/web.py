"""`chat.py --web`: a page for the browsers of this machine. Streamlit serves it, and runs page.py for every question."""

import socket
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llava_sft.errors import SettingsError

if TYPE_CHECKING:
    from llava_sft.chat.answers import Model
    from llava_sft.chat.questions import Turn

ADDRESS = "127.0.0.1"
NAMES = (ADDRESS, "localhost")  # a page of elsewhere whose name leads here is not let in
INSTALL = ".venv/bin/uv pip install -e '.[web]'"
OPTIONS = {
    "global.developmentMode": "false",
    "server.address": ADDRESS,
    "server.headless": "true",  # opens no browser
    "server.fileWatcherType": "none",
    "server.maxUploadSize": "100",  # MB, of one picture
    "browser.serverAddress": ADDRESS,
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
}


class Shown:
    """What page.py shows; set once, before the server starts."""

    model: "Model"
    title: str
    first: list["Turn"]


def check_page(port: int) -> None:
    """Raise SettingsError where the page cannot be served: without Streamlit, or on a port in use."""
    if find_spec("streamlit") is None:
        raise SettingsError("--web needs Streamlit, which is not installed", INSTALL)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except (OSError, OverflowError) as error:
            raise SettingsError(f"--port {port}: {error}", "another one, as --port 7861") from None


def serve(model: "Model", title: str, first: list["Turn"], port: int) -> None:
    """Serve the page until Ctrl-C."""
    from streamlit.web import cli

    Shown.model, Shown.title, Shown.first = model, title, first
    options = [f"--{name}={value}" for name, value in {**OPTIONS, "server.port": str(port)}.items()]
    options += [f"--server.allowedHosts={name}" for name in NAMES]
    cli.main(["run", str(Path(__file__).with_name("page.py")), *options], standalone_mode=False)
