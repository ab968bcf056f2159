"""The default checkpoint the paper's way: convert, 1a, 1b, 2 and 3, at sizes that an H200 trains in half an hour."""

from collections.abc import Callable

SEEDS = (1,)
TOY = ("reference",)

EVAL = "eval heldout {model} --controls full"
SAVED = "batch=64 micro=32 workers=2 save_every=500 keep=1"


def arms(steps: Callable[[int], int]) -> dict[str, list[str]]:
    """Steps of some 105,000 tokens, 4,352 frames: 11 million frames in all. Both inits, one beside the other."""

    def pipeline(init: str) -> list[str]:
        taught = f"student={{last}} teacher={{teacher}} seed={{seed}} {SAVED}"
        return [
            f"convert {{teacher}} {{out}} --init {init} --window 256 --seed {{seed}}",
            f"train stage1_layers_tiny {taught} steps={steps(400)}",
            f"train stage1_logits_tiny {taught} steps={steps(600)}",
            f"train stage2_instruct_tiny student={{last}} seed={{seed}} {SAVED} steps={steps(1000)}",
            EVAL,
            f"train stage3_long_tiny student={{last}} seed={{seed}} {SAVED} batch=16 micro=8 steps={steps(500)}",
            EVAL,
        ]

    return {init: pipeline(init) for init in ("reference", "teacher")}
