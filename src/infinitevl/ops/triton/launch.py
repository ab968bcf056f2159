"""How kernels follow each other: on Hopper and later the next one is set up while the last one still runs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def early(x: Tensor) -> dict[str, Any]:
    """Launch options of a kernel that works on x, with EARLY for its own code.

    A kernel launched early (programmatic dependent launch) begins before the one before it has ended, and must call
    `gdc_wait` before it reads what that one wrote and before it writes anything. What it may do first is read weights:
    a chain of small kernels then waits for memory, not for launches.
    """
    if x.device.type == "cuda" and _hopper(x.device):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


@cache
def _hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
