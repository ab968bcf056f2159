"""What a figure is held against: the aims on one H200 and what its arithmetic and bandwidth allow at most."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

from infinitevl.bench.setup import Row

AGAINST = "against the Transformer"
HIGHER, LOWER = "higher", "lower"
DEVICE, SCALE = "H200", "full"  # aims are for the full model on one of these


class Aim(NamedTuple):
    """What is wanted, what would be better still, and the bound that no code can pass on this hardware."""

    better: str
    aim: float | None
    stretch: float | None = None
    floor: float | None = None


# Of one H200, bf16. Floors: 790 TFLOP/s and 4.3 TB/s over the operations and bytes of the published model; ratios to
# the Transformer: those of the floors.
AIMS: dict[tuple[str, str], Aim] = {
    ("frame", "one stream"): Aim(HIGHER, 130, 150, 240),
    ("frame", "p99 over p50"): Aim(LOWER, 1.05, None, 1.0),
    ("frame", "last frames over first"): Aim(LOWER, 1.01, None, 1.0),
    ("frame", "bytes grown"): Aim(LOWER, 0),
    ("frame", "peak with one stream"): Aim(LOWER, 10.5),
    ("streams", "1 at once"): Aim(HIGHER, 130, 150, 240),
    ("streams", "4 at once"): Aim(HIGHER, 165, 173, 240),
    ("streams", "16 at once"): Aim(HIGHER, 180, 194, 240),
    ("streams", "memory of each further stream"): Aim(LOWER, 127.3),
    ("decode", "1 stream"): Aim(HIGHER, 400, 450, 561),
    ("decode", "16 streams"): Aim(HIGHER, 4200, 5000),
    ("prefill", "prefill of 4,096 tokens"): Aim(HIGHER, 68_000, 75_000, 111_000),
    ("prefill", "prefill of 32,768 tokens"): Aim(HIGHER, 70_000, 80_000, 111_000),
    ("prefill", "prefill of 102,400 tokens"): Aim(HIGHER, 70_000, 80_000, 111_000),
    ("prefill", "prefill of 262,144 tokens"): Aim(HIGHER, None, None, 111_000),
    ("prefill", "prefill of 1,048,576 tokens"): Aim(HIGHER, 70_000, 80_000, 111_000),
    ("question", "first token, idle"): Aim(LOWER, 6, 4, 1.85),
    ("question", "first token under load, p99"): Aim(LOWER, 12, 8),
    ("transformer", "sampled over whole prefill"): Aim(LOWER, 1.03, None, 1.0),
    ("stage2_instruct", "real tokens"): Aim(HIGHER, 12_000),  # training: its floors are counted with the figures
    ("processes", "over one"): Aim(HIGHER, 1.8),
    # FP8: twice the operations a second, half the bytes
    ("frame", "one stream, FP8"): Aim(HIGHER, 180, None, 450),
    ("decode", "1 stream, FP8"): Aim(HIGHER, 650, None, 1094),
    (AGAINST, "prefill of 4,096 tokens"): Aim(HIGHER, None, None, 0.86),
    (AGAINST, "prefill of 32,768 tokens"): Aim(HIGHER, None, None, 1.38),
    (AGAINST, "prefill of 102,400 tokens"): Aim(HIGHER, 2.7, None, 2.68),
    (AGAINST, "prefill of 262,144 tokens"): Aim(HIGHER, 6, None, 5.83),
    (AGAINST, "prefill of 1,048,576 tokens"): Aim(HIGHER, 20, None, 21),
    (AGAINST, "after 4,096 tokens"): Aim(HIGHER, None, None, 0.83),
    (AGAINST, "after 32,768 tokens"): Aim(HIGHER, None, None, 0.96),
    (AGAINST, "after 102,400 tokens"): Aim(HIGHER, None, None, 1.29),
    (AGAINST, "after 262,144 tokens"): Aim(HIGHER, None, None, 2.06),
    (AGAINST, "after 1,048,576 tokens"): Aim(HIGHER, None, None, 5.8),
    (AGAINST, "frames after 4,096 tokens"): Aim(HIGHER, None, None, 0.96),
    (AGAINST, "frames after 32,768 tokens"): Aim(HIGHER, None, None, 1.59),
    (AGAINST, "frames after 102,400 tokens"): Aim(HIGHER, None, None, 3.1),
    (AGAINST, "frames after 262,144 tokens"): Aim(HIGHER, None, None, 6.9),
    (AGAINST, "frames after 1,048,576 tokens"): Aim(HIGHER, None, None, 25),
}


def beside(row: Row, device: str, scale: str) -> dict[str, Any]:
    """The row with its aim, stretch and floor (null where there are none, or for other hardware and models) and how
    much of the aim is reached: 1 or more, it is met."""
    aim = AIMS.get((row.part, row.name)) if DEVICE in device and scale == SCALE else None
    facts = asdict(row) | {"better": None, "aim": None, "stretch": None, "reached": None}
    if aim is None:
        return facts
    floor = row.floor if aim.floor is None else aim.floor
    return facts | aim._asdict() | {"floor": floor, "reached": reached(row.value, aim)}


def reached(value: float, aim: Aim) -> float | None:
    """value over aim, or aim over value where less is better; an aim of nothing is met (1) or not (0)."""
    if aim.aim is None:
        return None
    if aim.aim == 0:
        return float(value <= 0)
    return value / aim.aim if aim.better == HIGHER else aim.aim / value


def against_transformer(rows: list[Row]) -> list[Row]:
    """Ours over the Transformer's, for every figure of speed that both have: above 1, ours is faster."""
    by_name = {(row.part, row.name): row for row in rows}
    ours = {row.name: row for row in rows if row.part in ("prefill", "decode")}
    if one := by_name.get(("frame", "one stream")):
        lengths = [row.name for row in rows if row.part == "transformer" and row.name.startswith("frames after")]
        ours |= dict.fromkeys(lengths, one)
    pairs = [(row, ours[row.name]) for row in rows if row.part == "transformer" and row.name in ours]
    return [
        Row(AGAINST, theirs.name, "x", mine.value / theirs.value, note="sampled" if "sampled" in theirs.note else "")
        for theirs, mine in pairs
    ]
