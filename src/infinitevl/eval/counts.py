"""Follow a frame: answers about it, counted: how many were right of how many, and how sure that is."""

from __future__ import annotations

import math
from typing import Any

from infinitevl.synth.heldout import Count

Z = 1.959964  # deviations of a normal distribution within which 95 % lie


def interval(count: Count) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, 0 to 1 where nothing was asked.

    It takes questions as independent of each other. Those of one stream are not quite: the truth is somewhat wider.
    """
    if not count.asked:
        return 0.0, 1.0
    share, spread = count.share, Z * Z / count.asked
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / count.asked + spread / count.asked / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def plain(count: Count) -> dict[str, Any]:
    """Right, asked, share and interval, for JSON; nothing may have been asked: then share is None."""
    low, high = (round(end, 4) for end in interval(count))
    share = round(count.share, 4) if count.asked else None
    return {"right": count.right, "asked": count.asked, "share": share, "low": low, "high": high}


def cell(count: Count, spread: bool = False) -> str:
    """A share for a table, with its interval where that is wanted; a dash where nothing was asked."""
    if not count.asked:
        return "-"
    low, high = interval(count)
    return f"{count.share:.1%}" + (f" ({low:.1%} to {high:.1%})" if spread else "")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A markdown table, all columns to the right."""
    lines = ["| " + " | ".join(line) + " |\n" for line in (heads, *rows)]
    return "".join([lines[0], "|" + "---:|" * len(heads) + "\n", *lines[1:]])
