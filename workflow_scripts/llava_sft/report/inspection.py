"""The page of an inspection."""

from pathlib import Path
from typing import Any

from llava_sft.report.html import render
from llava_sft.report.pictures import thumbnail


def inspection_page(report: dict[str, Any], gallery: list[dict[str, Any]], language: str = "en") -> str:
    """The report of an inspection, and samples with their images' bytes, as one HTML page without external resources."""
    pictured = [sample | {"images": [thumbnail(image) for image in sample["images"]]} for sample in gallery]
    path = Path(report["path"])
    name = path.resolve().parent.name if path.name == "webdatasets" else path.name
    return render("inspect.html.j2", language, report=report, gallery=pictured, name=name)
