"""State precision: the delta states in float32, and rounded to bfloat16 after every frame, over a million tokens."""

from collections.abc import Callable

SEEDS = (1,)
TOY = ("bfloat16", "logits")

EVAL = "eval recall {student} --tokens 1048576 --streams 32 --controls full --seed {seed}"


def arms(steps: Callable[[int], int]) -> dict[str, list[str]]:
    """Nothing is trained. `logits`: both states in one run, and how far their answers' distributions are apart.

    `logits_short` is what a CPU does in half an hour.
    """
    return {
        "float32": [EVAL],
        "bfloat16": [f"{EVAL} --state-dtype bfloat16"],
        "logits": ["script logits.py {student} --tokens 1048576 --every 16384 --streams 8 --seed {seed}"],
        "logits_short": ["script logits.py {student} --tokens 262144 --every 16384 --streams 2 --seed {seed}"],
    }
