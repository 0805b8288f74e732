"""What the workflow's scripts share. Nothing here is imported by name from outside `workflow_scripts/`.

Imported before all else of this project and in the syntax of any Python 3, so that it can say what an unfit Python lacks.
"""

import codecs
import importlib.util
import sys

__version__ = "0.1.0"

LOOK_ALIKES = {"×": "x", "→": "->", "…": "...", "≥": ">=", "–": "-", "·": "-", "≠": "!=", "−": "-"}


def as_ascii(error):
    """Codec error handler: what a terminal or a log cannot show becomes a look-alike, or its number."""
    lost = error.object[error.start : error.end]
    return "".join(LOOK_ALIKES.get(c, "\\u%04x" % ord(c)) for c in lost), error.end  # noqa: UP031


bare = importlib.util.find_spec("pydantic") is None and not sys.argv[0].endswith("set_up.py")  # which installs it
if sys.version_info < (3, 12) or bare:
    sys.exit(
        "error: %s (Python %d.%d): %s\n  fix: .venv/bin/python in its place; `make setup` makes .venv"  # noqa: UP031
        % (sys.executable, sys.version_info[0], sys.version_info[1],
           "3.12 or newer is needed" if sys.version_info < (3, 12) else "this workflow's packages are not installed there")
    )  # fmt: skip
codecs.register_error("look-alikes", as_ascii)
for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="look-alikes")
