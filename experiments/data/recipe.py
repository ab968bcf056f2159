"""Data: the pipeline with a fiftieth, a tenth and all of the tokens, against all of them without distillation."""

from collections.abc import Callable

SEEDS = (1, 2, 3)
TOY = ("tenth",)

CONVERT = "convert {teacher} {out} --init reference --window 256 --seed {seed}"
EVAL = "eval heldout {model} --controls full --limit 32"
ALL = 960  # steps of some 13,000 tokens: a sixth each for 1a, 1b and 3, half for 2


def arms(steps: Callable[[int], int]) -> dict[str, list[str]]:
    """A share of the tokens is a share of every stage's steps; each story is seen once."""
    stage2 = "train stage2_instruct_tiny student={last} seed={seed}"
    stage3 = "train stage3_long_tiny student={last} seed={seed} batch=2 micro=2"

    def pipeline(share: float) -> list[str]:
        sixth, common = steps(max(1, round(share * ALL / 6))), "student={last} teacher={teacher} seed={seed}"
        stage1 = [f"train stage1_{name}_tiny {common} steps={sixth}" for name in ("layers", "logits")]
        return [CONVERT, *stage1, f"{stage2} steps={3 * sixth}", f"{stage3} steps={sixth}", EVAL]

    undistilled = f"{stage2} steps={steps(5 * ALL // 6)}", f"{stage3} steps={steps(ALL // 6)}"
    return {
        "fiftieth": pipeline(1 / 50),
        "tenth": pipeline(1 / 10),
        "all": pipeline(1),
        "all_undistilled": [CONVERT, *undistilled, EVAL],
    }
