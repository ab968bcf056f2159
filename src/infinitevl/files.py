"""Files and folders that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A path to write to; at the end of the block it replaces `path`, on an error it is removed and `path` stays.

    The file may be read by whom the umask lets, whoever writes it (safetensors makes files for their owner alone).
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.touch()
        mode = aside.stat().st_mode
        aside.unlink()
        yield aside
        aside.chmod(mode)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_written_aside(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill; at the end of the block it becomes `path`, on an error it is removed.

    FileExistsError where there is something at `path` already: nothing is ever overwritten.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} is there already: name a folder that is not, or remove it")
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.mkdir(parents=True)
    try:
        yield aside
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
