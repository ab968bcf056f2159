"""What every test starts from: the same seeds, one thread, and the folder of reference data where there is one."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


def pytest_configure() -> None:
    torch.set_num_threads(
        1
    )  # small models wait longer for a second thread than it saves, most of all on a busy machine


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden data and real footage: INFINITEVL_SHARED, by default ../shared, from the project's root."""
    folder = ROOT / os.environ.get("INFINITEVL_SHARED", "../shared")
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder}: point INFINITEVL_SHARED at it")
    return folder
