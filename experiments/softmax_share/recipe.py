"""Softmax share and window: how many of eight layers attend, and how far. A step is some 13,000 tokens."""

from collections.abc import Callable

SEEDS = (1, 2, 3)
TOY = ("share_0",)

# which layers of the teacher stay softmax
SHARES = {"0": "none", "1_8": "0", "1_4": "0,4", "1_2": "0,2,4,6", "1": "0,1,2,3,4,5,6,7"}
WINDOWS = (64, 128, 512)  # beside 256, with a quarter of the layers


def arms(steps: Callable[[int], int]) -> dict[str, list[str]]:
    """320 steps each. Where no layer is new, stage 1 has nothing to train: its steps go to stage 2."""
    shared = {f"share_{name}": _arm(steps, layers, 256) for name, layers in SHARES.items()}
    return shared | {f"window_{window}": _arm(steps, SHARES["1_4"], window) for window in WINDOWS}


def _arm(steps: Callable[[int], int], layers: str, window: int) -> list[str]:
    distilled = layers != SHARES["1"]
    common = "student={last} teacher={teacher} seed={seed}"
    stage1 = [f"train stage1_{name}_tiny {common} steps={steps(64)}" for name in ("layers", "logits")]
    second = steps(144) if distilled else steps(272)
    return [
        f"convert {{teacher}} {{out}} --layers {layers} --init reference --window {window} --seed {{seed}}",
        *(stage1 if distilled else []),
        f"train stage2_instruct_tiny student={{last}} seed={{seed}} steps={second}",
        f"train stage3_long_tiny student={{last}} seed={{seed}} batch=2 micro=2 steps={steps(48)}",
        "eval heldout {model} --controls full --limit 32",
    ]
