"""What the default checkpoint is trained on and how: phases of growing length, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field

from infinitevl.synth.world import LONG, READING, SHORT, Setting


@dataclass(frozen=True)
class Phase:
    """One stretch of training on stories of one length.

    Each step sees `streams` stories of `segments` times `frames` frames; after every segment `asks` questions of each
    story are answered on copies of its memory. peak: learning rate at the start; it falls linearly to `floor` times it.
    """

    name: str
    steps: int
    streams: int
    segments: int
    frames: int
    asks: int
    setting: Setting
    peak: float
    floor: float = 1.0
    now_share: float = 0.25  # of questions that are about the present


@dataclass(frozen=True)
class Recipe:
    """The whole run. Learning rates are those of AdamW; matrices take Muon's update scaled to AdamW's size."""

    phases: tuple[Phase, ...]
    seed: int = 1
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    workers: int = 14
    kinds: dict[str, float] = field(default_factory=dict)


def default() -> Recipe:
    """The recipe of checkpoints/tiny: about 20 minutes on one H200."""
    return Recipe(
        phases=(
            Phase("read", 3000, 1024, 1, 1, 4, READING, peak=2e-3, now_share=1.0),
            Phase("short", 2000, 128, 4, 5, 6, SHORT, peak=2e-3, now_share=0.4),
            Phase("medium", 1500, 64, 4, 17, 10, LONG, peak=1.5e-3),
            Phase("long", 1200, 32, 4, 33, 16, LONG, peak=1.2e-3, floor=0.02),
        )
    )


def smoke() -> Recipe:
    """A few steps of every phase at toy size, for tests on a laptop."""
    return Recipe(
        phases=(
            Phase("read", 2, 4, 1, 1, 2, READING, peak=1e-3, now_share=1.0),
            Phase("short", 2, 2, 2, 5, 2, SHORT, peak=1e-3),
        ),
        workers=0,
        warmup=1,
    )
