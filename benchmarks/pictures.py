"""Pictures that know which data they were drawn from."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from fastlora.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {  # of providers: Okabe and Ito's palette, told apart by the colour-blind
    "frozen": "#999999",
    "peft": "#E69F00",
    "peft+compile": "#F0E442",
    "addmm": "#009E73",
    "bitsandbytes": "#D55E00",
    "torchtune": "#CC79A7",
    "unsloth": "#000000",
    "liger": "#8C6D31",
    "fastlora": "#0072B2",
    "fastlora+compile": "#56B4E9",
}


def save(figure: "Figure", path: Path, data: str) -> None:
    """Write a PNG with the digest of the text of the results that it shows: a CSV's or a JSON's."""
    metadata = {"Description": _description(data)}
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", metadata=metadata))


def is_drawn_from(path: Path, data: Path) -> bool:
    """Whether the PNG shows what is in the file now."""
    from PIL import Image

    if not path.is_file() or not data.is_file():
        return False
    with Image.open(path) as image:
        return image.info.get("Description") == _description(data.read_text(encoding="utf-8"))


def _description(data: str) -> str:
    return f"drawn from data of sha256 {hashlib.sha256(data.strip().encode()).hexdigest()}"
