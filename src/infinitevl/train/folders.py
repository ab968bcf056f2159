"""Whether a folder can be had, asked before hours of work and not after."""

from __future__ import annotations

import tempfile
from pathlib import Path


def can_be_made(path: Path) -> bool:
    """Whether files can be put into `path`, a folder that is there or whose missing part can be made.

    Tried, and not read off permissions, which say too much: root may write to /proc, and nothing can be made in it.
    """
    try:
        there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
        with tempfile.TemporaryDirectory(prefix=".", dir=there):
            return True
    except OSError:
        return False
