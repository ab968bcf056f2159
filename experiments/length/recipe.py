"""Length: streams of 8 to 4,096 frames, watched by the teacher, by a window alone, and by the hybrid."""

from collections.abc import Callable

SEEDS = (1, 2, 3)
ALONE = ("time_teacher", "time_window", "time_hybrid")  # one stream, nothing beside it: what a frame takes
ONCE = ("teacher", *ALONE)
TOY = ("teacher", "hybrid", "time_hybrid")

EVAL = "eval length {model} --frames 4096 --streams 16"
EVERY = "0,1,2,3,4,5,6,7"


def arms(steps: Callable[[int], int]) -> dict[str, list[str]]:
    """480 steps each, the teacher none. Evaluated before and after stage 3.

    What time_* answer is of models that were converted and taught nothing: only their times are wanted.
    """
    common = "student={last} teacher={teacher} seed={seed}"
    stage1 = [f"train stage1_{name}_tiny {common} steps={steps(80)}" for name in ("layers", "logits")]
    stage2, stage3 = "train stage2_instruct_tiny student={last} seed={seed}", "train stage3_long_tiny student={last}"
    stage3 = f"{stage3} seed={{seed}} batch=2 micro=2 steps={steps(80)}"
    convert = "convert {teacher} {out} --init reference --window 256 --seed {seed}"
    timed = "eval length {model} --frames 2048 --streams 1"
    return {
        "teacher": ["eval length {teacher} --frames 4096 --streams 4"],
        "time_teacher": [timed.replace("{model}", "{teacher}")],
        "time_window": [f"{convert} --layers {EVERY}", timed],
        "time_hybrid": [convert, timed],
        "window": [f"{convert} --layers {EVERY}", f"{stage2} steps={steps(400)}", EVAL, stage3, EVAL],
        "hybrid": [convert, *stage1, f"{stage2} steps={steps(240)}", EVAL, stage3, EVAL],
    }
