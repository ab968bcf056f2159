"""What is trained on what and how: a recipe is a function that returns a frozen config, changed by `key=value`."""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal


class RecipeError(ValueError):
    """A recipe, key or value that cannot be used; one line that names it."""


# fields, what their values must fulfil, and that in words
_LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("steps batch micro length log_every save_every keep patience", lambda value: value >= 1, "at least 1"),
    ("max_frames synth_frames synth_segment synth_asks lora_alpha", lambda value: value >= 1, "at least 1"),
    ("lr clip temperature fps max_pixels", lambda value: value > 0, "above 0"),
    ("workers seed lora_rank weight_decay delta_scale", lambda value: value >= 0, "0 or more"),
    ("warmup synth_now", lambda value: 0 <= value <= 1, "a share from 0 to 1"),
    ("beta1 beta2", lambda value: 0 <= value < 1, "from 0 to below 1"),
)


@dataclass(frozen=True)
class Recipe:
    """One run of one stage. `batch` rows of `length` tokens make a step; a row is packed with whole conversations.

    student, teacher: checkpoints (folder, hub id, or the folder of an earlier run). data: a .json or .jsonl file,
    several with commas between, hf:NAME[:SPLIT] of HF `datasets`, or synth, which never ends. media: folder that names
    of pictures start from (empty: the data file's own).
    """

    stage: Literal["stage1_layers", "stage1_logits", "stage2_instruct", "stage3_long"]
    student: str = ""
    teacher: str = ""
    data: str = ""
    media: str = ""
    # how long and how fast
    steps: int = 1000
    batch: int = 64  # rows of a step, over all processes
    micro: int = 1  # rows that one process puts through the model at once
    length: int = 8192  # tokens of a row
    lr: float = 2e-4
    delta_scale: float = 1.0  # learning rate of the delta mixers over lr
    warmup: float = 0.05  # share of the steps over which the rate rises; then it falls as a cosine
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    clip: float = 1.0  # greatest norm of a step's gradient
    patience: int = 5  # steps in a row with a loss or gradient that is not finite before the run stops
    seed: int = 1
    # what
    trains: Literal["deltas", "mixers", "mixers+mlp", "all"] = "deltas"
    temperature: float = 2.0  # of the distillation of logits
    lora_rank: int = 0  # 0: no LoRA, what `trains` says is trained as it is
    lora_alpha: int = 32
    merge: bool = True  # save LoRA's result as an ordinary checkpoint; false: the adapter alone
    # pictures
    max_pixels: int = 512**2  # of a picture or frame
    max_frames: int = 224  # of a video
    fps: float = 2.0  # at which a video is sampled, or less so that it has max_frames
    # the synthetic world
    synth_frames: int = 68  # seconds of a story
    synth_segment: int = 17  # frames of a story for each of its places for questions, which lie anywhere in it
    synth_asks: int = 4  # questions at each place
    synth_setting: Literal["reading", "short", "mixed", "long", "varied"] = "long"
    synth_now: float = 0.25  # share of questions about the present
    # the machine
    device: str = ""  # empty: cuda where there is one, else cpu
    dtype: Literal["", "float32", "bfloat16"] = ""  # of the computation; empty: bfloat16 on cuda, float32 on a cpu
    checkpointing: bool = True  # recompute each block in the backward instead of keeping it
    compile: bool = True  # each block by torch.compile, on cuda
    workers: int = 8  # processes that prepare data, no more than there are cores; 0: none, in turn with the training
    # files
    log_every: int = 10  # steps between two lines of the log
    save_every: int = 500
    keep: int = 3  # newest checkpoints that stay
    compact: bool = False  # state in bfloat16, in files below 16 MiB: a resume is then near and not to the bit
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for names, fits, words in _LIMITS:
            for name in names.split():
                if not fits(getattr(self, name)):
                    raise RecipeError(f"{name} must be {words}, got {getattr(self, name)}")


def stage1_layers() -> Recipe:
    """1a at 4B: each delta layer learns its teacher layer's output; 1M captions and questions (paper, section 3.3)."""
    return Recipe(stage="stage1_layers", steps=15_625)


def stage1_logits() -> Recipe:
    """1b at 4B: the delta layers learn the teacher's words, end to end; 1M."""
    return Recipe(stage="stage1_logits", steps=15_625)


def stage2_instruct() -> Recipe:
    """2 at 4B: all mixers learn 8M answers, pictures of up to 1344x1344. trains=mixers+mlp is the paper's figure."""
    return Recipe(stage="stage2_instruct", steps=31_250, batch=256, lr=5e-5, trains="mixers", max_pixels=1344**2)


def stage3_long() -> Recipe:
    """3 at 4B: LoRA on rows of 32,768 tokens, 800K of stage 2 and 200K long videos at 10 frames a second."""
    return Recipe(
        stage="stage3_long",
        steps=15_625,
        length=32_768,
        lr=2e-5,
        trains="mixers",
        lora_rank=64,
        lora_alpha=128,
        max_pixels=512**2,
        fps=10.0,
    )


def stage1_layers_tiny() -> Recipe:
    """1a for the shape of the default checkpoint, on the synthetic world."""
    return replace(_tiny(stage1_layers()), lr=2e-3)


def stage1_logits_tiny() -> Recipe:
    """1b, likewise."""
    return replace(_tiny(stage1_logits()), lr=1e-3)


def stage2_instruct_tiny() -> Recipe:
    """2, likewise, with the MLPs, as the paper's figure has it; trains=all trains a model from scratch."""
    return replace(_tiny(stage2_instruct()), lr=5e-4, trains="mixers+mlp")


def stage3_long_tiny() -> Recipe:
    """3, likewise: stories of four times the length, as dense as those that are tested; mixers and MLPs, no LoRA."""
    longer = replace(_tiny(stage3_long()), batch=16, micro=4, length=6400, synth_frames=272, synth_setting="long")
    return replace(longer, lr=2e-4, trains="mixers+mlp", lora_rank=0, save_every=100)


def _tiny(recipe: Recipe) -> Recipe:
    shape = replace(recipe, data="synth", steps=1000, batch=64, micro=16, length=1664, save_every=250)
    return replace(shape, synth_setting="varied")


RECIPES: dict[str, Callable[[], Recipe]] = {
    each.__name__: each
    for each in (
        *(stage1_layers, stage1_logits, stage2_instruct, stage3_long),
        *(stage1_layers_tiny, stage1_logits_tiny, stage2_instruct_tiny, stage3_long_tiny),
    )
}
FIXED = ("stage",)


def recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of a name with `key=value` changes. RecipeError names what is unknown and what comes nearest."""
    if name not in RECIPES:
        raise RecipeError(f"no recipe {name!r}{nearest(name, RECIPES)}; there are {', '.join(RECIPES)}")
    made, types_of = RECIPES[name](), typing.get_type_hints(Recipe)
    values: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise RecipeError(f"{change!r} is not key=value")
        if key not in types_of or key in FIXED:
            raise RecipeError(f"no key {key!r} in a recipe{nearest(key, set(types_of) - set(FIXED))}")
        if key in values:
            raise RecipeError(f"{key} is given twice")
        values[key] = parsed(key, text, types_of[key])
    return replace(made, **values)


def nearest(word: str, known: Iterable[str]) -> str:
    """ ": did you mean ...?" where a known word is near, else nothing."""
    close = difflib.get_close_matches(word, sorted(known), 1)
    return f": did you mean {close[0]!r}?" if close else ""


def parsed(key: str, text: str, kind: Any) -> Any:
    """The value that a text means for a field of a type. RecipeError where it means none."""
    if typing.get_origin(kind) is Literal:
        if text not in typing.get_args(kind):
            known = ", ".join(repr(value) for value in typing.get_args(kind))
            raise RecipeError(f"{key}={text}: it is one of {known}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise RecipeError(f"{key}={text}: it is true or false")
        return text.lower() == "true"
    try:
        value = kind(text.replace("_", "")) if kind is int else kind(text)
    except ValueError:
        raise RecipeError(f"{key}={text}: it is {_words(kind)}") from None
    if kind is float and not math.isfinite(value):
        raise RecipeError(f"{key}={text}: it is {_words(kind)}")
    return value


def _words(kind: Any) -> str:
    return {int: "a whole number", float: "a number"}.get(kind, "a text")


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Names of the fields in which two recipes differ."""
    return [field.name for field in fields(Recipe) if getattr(one, field.name) != getattr(other, field.name)]
