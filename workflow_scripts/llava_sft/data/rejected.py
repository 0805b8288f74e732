"""Why a record is left out."""

from llava_sft.errors import SHOWN


class Rejected(Exception):
    """A record is left out. `reason` is one of a fixed set (it is counted), `detail` holds this record's values, cut."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail if len(detail) <= SHOWN else f"{detail[:SHOWN]}…"
        super().__init__(f"{reason}: {self.detail}" if detail else reason)
