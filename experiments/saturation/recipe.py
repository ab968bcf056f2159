"""Saturation: what one stream remembers by age, out to more than half a million tokens, and three ways of upkeep."""

from collections.abc import Callable

SEEDS = (1, 2)
TOY = ("as_it_is", "reset_1024")

EVAL = "eval recall {student} --tokens 524288 --controls full --seed {seed}"


def arms(steps: Callable[[int], int]) -> dict[str, list[str]]:
    """Nothing is trained. Resets: after so many frames (1,024 are 70 windows); decay: 1 % less every 15 s, a window, or
    10 %. Two arms have four streams, because they were run on a CPU, where 32 take hours.
    """
    kept = f"{EVAL} --streams 32"
    return {
        "as_it_is": [f"{EVAL} --streams 4"],
        "reset_256": [f"{kept} --refresh-every 256 --keep 0"],
        "reset_1024": [f"{kept} --refresh-every 1024 --keep 0"],
        "decay_90": [f"{EVAL} --streams 4 --refresh-every 15 --keep 0.9"],
        "decay": [f"{kept} --refresh-every 15 --keep 0.99"],
    }
