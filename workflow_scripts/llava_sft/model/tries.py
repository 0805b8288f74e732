"""Faster ways that are being measured, each off unless `LLAVA_SFT_TRY` names it: flash4_vision, flash4_language (attention of
FlashAttention-4)."""

import os

NAMES = frozenset({"flash4_vision", "flash4_language"})
TRIED: set[str] = set(filter(None, os.environ.get("LLAVA_SFT_TRY", "").split(",")))
if TRIED - NAMES:
    raise ValueError(f"LLAVA_SFT_TRY names {', '.join(sorted(TRIED - NAMES))}; there are {', '.join(sorted(NAMES))}")


def tried(name: str) -> bool:
    return name in TRIED
