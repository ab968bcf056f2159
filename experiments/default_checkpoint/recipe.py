"""What the default checkpoint is trained on and how: phases of growing length, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from infinitevl.config import SOFTMAX, hybrid
from infinitevl.synth.world import LONG, MIXED, READING, SHORT, Setting
from infinitevl.train.synthetic import WEIGHTS

# stories of a step are laid out alike: their stamps have one length, that of 0:00 to 9:59 or that of 10:00 to 99:59
STAMPED, LATER = 600, 6000


@dataclass(frozen=True)
class Phase:
    """One stretch of training on stories of one length.

    Each step sees `streams` stories of `segments` times `frames` frames; after every segment `asks` questions of each
    story are answered on copies of its memory. Stories begin anywhere in the first ten minutes that they fit into.
    peak: learning rate at the start; it falls linearly to `floor` times it.
    chapters: above 1, a stream watches so many stories, one a step, with its clock and memory going on from one to the
    next (from ten minutes on); gradients stay in a story, and questions too.
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
    chapters: int = 1

    @property
    def length(self) -> int:
        """Frames of a story."""
        return self.segments * self.frames

    @property
    def world(self) -> Setting:
        """The setting, with stories that begin at any time."""
        return replace(self.setting, latest_start=STAMPED - self.length)

    @property
    def earliest(self) -> int:
        """The second at which a stream begins at the earliest; all stamps are as long as that one."""
        return STAMPED if self.chapters > 1 else 0

    def age(self, step: int, stream: int) -> tuple[int, int]:
        """How many stories a stream has watched before a step, and the second at which this one begins.

        Streams are of all ages at once, so that every step has some of each; the same whatever the recipe's seed.
        """
        chain, before = divmod(step + stream, self.chapters)
        room = (LATER - self.earliest - self.chapters * self.length) // 4
        first = self.earliest + 4 * int(np.random.default_rng([chain, stream]).integers(room + 1))
        return before, first + before * self.length


@dataclass(frozen=True)
class Recipe:
    """The whole run. Learning rates are those of AdamW; matrices take Muon's update scaled to AdamW's size.

    layers, window: the text model's; all else is the shape of the default checkpoint.
    """

    phases: tuple[Phase, ...]
    layers: tuple[str, ...] = hybrid(2)
    window: int | None = 256
    seed: int = 1
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    workers: int = 14
    kinds: dict[str, float] = field(default_factory=dict)


def default() -> Recipe:
    """The hybrid from scratch: about half an hour on one H200 (an estimate, from the speed of the first run).

    Reading first, one picture at a time; then stories of 34, 68, 136 and 272 frames (2 to 18 windows), and chains of
    them. Segments of 17 frames put the questions at every distance from the last time stamp, and keep the shapes of all
    stories equal.
    """
    return Recipe(phases=(*_phases(10, 10), _chained(600)), kinds=WEIGHTS)


def longer() -> Recipe:
    """On from a checkpoint (`--start`): whole stories, then memories that are full already."""
    whole = Phase("story16", 320, 16, 16, 17, 10, LONG, peak=1.2e-3, floor=0.7)
    return Recipe(phases=(whole, _chained(850)), kinds=WEIGHTS, seed=2)


def _chained(steps: int) -> Phase:
    """Six stories one after the other, 27 minutes: what came first has to make room."""
    return Phase("chained", steps, 16, 16, 17, 10, LONG, peak=8e-4, floor=0.04, chapters=6)


def teacher() -> Recipe:
    """A softmax teacher without a window, as data-rich as `default`: what it saw it still holds.

    Fewer questions, because each copies a memory that grows with the story, 18 MB after 272 frames, and the backward
    keeps twice that.
    """
    return Recipe(phases=_phases(5, 3), kinds=WEIGHTS, layers=(SOFTMAX,) * 8, window=None)


def _phases(asks: int, last: int) -> tuple[Phase, ...]:
    """asks: questions of a story after each segment; last: in the last phase."""
    return (
        Phase("read", 3400, 768, 1, 1, 2, READING, peak=2e-3, now_share=1.0),
        Phase("story2", 1800, 32, 2, 17, asks, MIXED, peak=2e-3, now_share=0.35),
        Phase("story4", 1200, 32, 4, 17, asks, LONG, peak=1.8e-3, floor=0.6),
        Phase("story8", 800, 32, 8, 17, asks, LONG, peak=1.1e-3, floor=0.6),
        Phase("story16", 600, 16, 16, 17, last, LONG, peak=6e-4, floor=0.05),
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


def smoke_teacher() -> Recipe:
    """The same of the teacher."""
    return replace(smoke(), layers=(SOFTMAX,) * 8, window=None)


def smoke_longer() -> Recipe:
    """The same of what goes on from a checkpoint."""
    chained = Phase("chained", 2, 3, 2, 4, 2, SHORT, peak=1e-3, chapters=2)
    return replace(smoke(), phases=(*smoke().phases[1:], chained))


GOES_ON = ("longer", "smoke_longer")
RECIPES = {each.__name__: each for each in (default, teacher, longer, smoke, smoke_teacher, smoke_longer)}
