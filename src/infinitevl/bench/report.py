"""A result as people read it, as JSON, and beside an earlier one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infinitevl.bench.setup import BenchError
from infinitevl.files import written_aside

FORMAT, VERSION = "infinitevl.bench", 1
_SAME = ("scale", "dtype")


def line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def as_line(result: dict[str, Any]) -> str:
    """The result as one line of JSON."""
    return json.dumps(result)


def write(path: Path, result: dict[str, Any]) -> None:
    """The result into a file, which is whole or not there."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def check_places(out: Path | None, plot: Path | None) -> None:
    """BenchError where nothing can be written: to be called before minutes of work, not after."""
    for path in (path for path in (out, plot and plot / "figure") if path is not None):
        folder = path.absolute().parent
        if path == out and (path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK)):
            raise BenchError(f"{path}: nothing can be written there; give a file in a folder that exists")
        if path != out and folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise BenchError(f"{folder}: no folder that can be written to")


def read(path: Path) -> dict[str, Any]:
    """A stored result. BenchError for a file that is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: cannot be read as a result: {line(error)}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise BenchError(f"{path}: not a result of infinitevl bench (write one with --out)")
    if found.get("version") != VERSION:
        raise BenchError(f"{path}: format {found.get('version')}, this version reads {VERSION}")
    return found


def lines(result: dict[str, Any], then: dict[str, Any] | None = None) -> list[str]:
    """The table: each figure beside its aim, and beside what it was `then`."""
    about = result["hardware"]
    clocks = ", ".join(f"{name} {value}" for name, value in (about["clocks"] or {}).items())
    told = [f"{about['name']}, {result['dtype']}, {result['scale']} scale, commit {result['commit'] or 'unknown'}"]
    told += [", ".join(f"{name} {version}" for name, version in result["versions"].items())]
    told += [f"clocks as found: {clocks}"] if clocks else []
    told += [f"gate: green, {len(result['gate']['checks'])} paths", *_differences(result, then), ""]
    told += _aligned(list(_table(result["rows"], then)))
    told += [""] if result["skipped"] or result["failed"] else []
    told += [f"skipped: {each['part']}, {each['name']}: {each['reason']}" for each in result["skipped"]]
    told += [f"FAILED: {each['part']}: {each['error']}" for each in result["failed"]]
    return [*told, f"{result['seconds']:.0f} s"]


def _differences(result: dict[str, Any], then: dict[str, Any] | None) -> list[str]:
    """What to know before two results are compared."""
    if then is None:
        return []
    told = [f"then: {then['hardware']['name']}, {then['date']}, commit {then['commit'] or 'unknown'}"]
    names = [name for name in _SAME if result[name] != then[name]]
    if result["hardware"]["name"] != then["hardware"]["name"]:
        names.append("hardware")
    return told + ([f"note: {' and '.join(names)} differ: the ratios compare unlike things"] if names else [])


def _table(rows: list[dict[str, Any]], then: dict[str, Any] | None) -> Iterator[list[str]]:
    """Heading, then a line for each row, with the part's name where it begins."""
    earlier = {(row["part"], row["name"]): row["value"] for row in (then or {"rows": []})["rows"]}
    heading = ["part", "figure", "p50", "unit", "p99", "aim", "stretch", "floor", "of aim"]
    yield [*heading, *(["then", "now/then"] if then else []), "note"]
    part = None
    for row in rows:
        cells = [row["part"] if row["part"] != part else "", row["name"], number(row["value"]), row["unit"]]
        cells += [number(row[each]) for each in ("p99", "aim", "stretch", "floor")] + [_reached(row["reached"])]
        if then:
            before = earlier.get((row["part"], row["name"]))
            cells += [number(before), number(row["value"] / before if before else None)]
        yield [*cells, row["note"]]
        part = row["part"]


def _reached(share: float | None) -> str:
    """How much of the aim; "short" where it is not met."""
    if share is None:
        return ""
    return f"{share:.2f}" + ("" if share >= 1 else " short")


def number(value: float | None) -> str:
    """A figure as people read it: whole from 1,000 on, else four digits that count."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def _aligned(table: list[list[str]]) -> list[str]:
    """Columns: numbers to the right, words to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = {0, 1, 3, len(widths) - 1}
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in table
    ]
