"""The files of a round's weights: the PEFT directory, its archive, and a warm start's parent. Needs no torch."""

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

PEFT = "peft"
"""The directory that training leaves in the round's."""
ARCHIVE = "adapter.zip"


@dataclass(frozen=True, slots=True)
class Parent:
    """The version that a warm start begins with."""

    name: str
    archive: bytes
    """A zip file of its PEFT directory."""


def pack(folder: Path, archive: Path) -> None:
    """The PEFT directory as a zip file, the same bytes every time."""
    new = archive.with_suffix(".new")
    with zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as target:
        for path in sorted(folder.iterdir()):
            with path.open("rb") as source, target.open(zipfile.ZipInfo(path.name), "w", force_zip64=True) as member:
                shutil.copyfileobj(source, member, 1 << 20)
    new.replace(archive)
