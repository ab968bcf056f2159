"""What the default checkpoint is trained on and how: phases of growing length, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field

from infinitevl.synth.world import LONG, READING, SHORT, Setting

# between SHORT and LONG: denser than what is tested, so that a short story holds several things to recall
MIXED = Setting(
    sign_frames=(1, 4), sign_gaps=(1, 6), letters=(2, 6), object_gaps=(4, 14), digit_gaps=(2, 10), state_frames=(6, 24)
)


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
    """The recipe of checkpoints/tiny: about 20 minutes on one H200.

    Reading first, one picture at a time; then stories of 34, 68 and 136 frames (2 to 9 windows). Segments of 17 frames
    put the questions at every distance from the last time stamp, and keep the shapes of all stories equal.
    """
    return Recipe(
        phases=(
            Phase("read", 3400, 768, 1, 1, 2, READING, peak=2e-3, now_share=1.0),
            Phase("story2", 1800, 32, 2, 17, 10, MIXED, peak=2e-3, now_share=0.35),
            Phase("story4", 1200, 32, 4, 17, 10, LONG, peak=1.8e-3, floor=0.5),
            Phase("story8", 400, 32, 8, 17, 10, LONG, peak=1e-3, floor=0.05),
        ),
        kinds={
            "sign": 3.0,
            "emblem_now": 1.5,
            "door": 0.3,
            "light": 0.3,
            "word_by_emblem": 2.0,
            "emblem_by_word": 1.5,
            "count_past": 1.5,
            "first_word": 0.5,
        },
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
