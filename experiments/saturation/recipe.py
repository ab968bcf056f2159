"""Saturation: what one stream remembers by age, out to more than half a million tokens, and two ways of upkeep."""

from collections.abc import Callable

SEEDS = (1,)
TOY = ("as_it_is", "decay_90")

EVAL = "eval recall {student} --tokens 524288 --streams 32 --seed {seed} --controls full"


def arms(steps: Callable[[int], int]) -> dict[str, list[str]]:
    """Nothing is trained. A reset of the states every 256 frames, and 10 % less of them every 15, a window."""
    return {
        "as_it_is": [EVAL],
        "reset_256": [f"{EVAL} --refresh-every 256 --keep 0"],
        "decay_90": [f"{EVAL} --refresh-every 15 --keep 0.9"],
    }
