"""Output files of the tools, which never replace a file of the user."""

from __future__ import annotations

from pathlib import Path

from trainlib.core.errors import UserError


def refuse_to_overwrite(path: Path, mark: str = "") -> None:
    """Raise UserError if the folder of `path` is missing, or `path` is a file without `mark`.

    A tool's output files contain its mark near the start. An empty mark protects every file.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path}: no folder {path.parent}. Create it, or choose another file.")
    if path.is_dir():
        raise UserError(f"{path} is a folder. Choose a file in it.")
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(4096)
        if head and not (mark and mark.encode() in head):
            raise UserError(f"{path} already exists. Remove it, or choose another file.")
