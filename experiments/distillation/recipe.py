"""Distillation: what stages 1a and 1b bring, at equal numbers of training tokens. A step is some 13,000 tokens."""

from collections.abc import Callable

SEEDS = (1, 2, 3)
TOY = ("full", "scratch")

CONVERT = "convert {teacher} {out} --init reference --window 256 --seed {seed}"
EVAL = "eval heldout {model} --controls full --limit 32"


def arms(steps: Callable[[int], int]) -> dict[str, list[str]]:
    """480 steps each: a third for stage 1, half for stage 2, a sixth for stage 3. Evaluated after 160, 400 and 480."""
    first, second, third = steps(160), steps(240), steps(80)

    def stage1(name: str, count: int) -> str:
        common = "student={last} teacher={teacher} seed={seed}"
        return f"train stage1_{name}_tiny {common} steps={count}"

    def stage2(count: int, more: str = "") -> str:
        return f"train stage2_instruct_tiny student={{last}} seed={{seed}} steps={count}{more}"

    stage3 = f"train stage3_long_tiny student={{last}} seed={{seed}} batch=2 micro=2 steps={third}"
    early = f"eval heldout {{last}}/step-{first:08d}/model --controls full --limit 32"
    long2 = stage2(first + second, f" save_every={first}")
    both = [stage1("layers", steps(80)), stage1("logits", steps(80))]
    return {
        "full": [CONVERT, *both, EVAL, stage2(second), EVAL, stage3, EVAL],
        "without_1": [CONVERT, long2, early, EVAL, stage3, EVAL],
        "without_1a": [CONVERT, stage1("logits", first), EVAL, stage2(second), EVAL, stage3, EVAL],
        "without_1b": [CONVERT, stage1("layers", first), EVAL, stage2(second), EVAL, stage3, EVAL],
        "scratch": [CONVERT, "scratch {last} {out}", f"{long2} trains=all", early, EVAL, f"{stage3} trains=all", EVAL],
    }
