"""Pictures of results: whose colour is whose, and which data a picture was drawn from."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from fastlora.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {  # Okabe and Ito's palette: told apart by the colour-blind
    "frozen": "#999999",
    "peft": "#E69F00",
    "fastlora": "#0072B2",
    "peft+compile": "#F0E442",
    "fastlora+compile": "#56B4E9",
}


def save(figure: "Figure", path: Path, data: Path) -> None:
    """Write a PNG that names the file it was drawn from, and that file's digest, in its metadata."""
    metadata = {"Description": _description(data)}
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", metadata=metadata))


def is_drawn_from(path: Path, data: Path) -> bool:
    """Whether the PNG was drawn from the data file as it is now."""
    from PIL import Image

    if not path.is_file() or not data.is_file():
        return False
    with Image.open(path) as image:
        return image.info.get("Description") == _description(data)


def _description(data: Path) -> str:
    return f"drawn from {data.name}, sha256 {hashlib.sha256(data.read_bytes()).hexdigest()}"


def plain(axes: "Axes") -> None:
    """Without the lines that say nothing."""
    axes.spines[["top", "right"]].set_visible(False)
