"""Saturation: what one stream remembers by age, out to more than half a million tokens, and four ways of upkeep."""

from collections.abc import Callable

SEEDS = (1, 2)
TOY = ("as_it_is", "reset_1024")

EVAL = "eval recall {student} --tokens 524288 --streams 32 --seed {seed} --controls full"


def arms(steps: Callable[[int], int]) -> dict[str, list[str]]:
    """Nothing is trained. Resets: after so many frames (1,024 are 70 windows); decay: 1 % less every 15 s, a window, or
    10 %.
    """
    return {
        "as_it_is": [EVAL],
        "reset_256": [f"{EVAL} --refresh-every 256 --keep 0"],
        "reset_1024": [f"{EVAL} --refresh-every 1024 --keep 0"],
        "decay_90": [f"{EVAL} --refresh-every 15 --keep 0.9"],
        "decay": [f"{EVAL} --refresh-every 15 --keep 0.99"],
    }
