"""A smoke test of an experiment: its own lines, at a size that a laptop runs in seconds. `arms.py --toy` uses it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from infinitevl import weights
from infinitevl.config import SOFTMAX, tiny
from infinitevl.model import Model
from infinitevl.processor import load_processor
from infinitevl.train.convert import convert

TRAIN = {"batch": "2", "micro": "1", "workers": "0", "compile": "false", "length": "320", "synth_frames": "9"}
EVALUATIONS = {
    "heldout": {"--limit": "1", "--controls": "full"},
    "length": {"--frames": "8", "--streams": "1"},
    "recall": {"--tokens": "256", "--streams": "1", "--controls": "full"},
    "logits.py": {"--tokens": "320", "--every": "160", "--streams": "1"},
}


def checkpoints(out: Path) -> tuple[str, str]:
    """A random teacher of eight softmax layers, an eighth as wide as the default checkpoint, and what is converted of
    it; made where they lack."""
    folder, student = out / "teacher", out / "student"
    if not folder.exists():
        torch.manual_seed(0)
        small = tiny()
        vision = replace(small.vision, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32)
        text = replace(small.text, layers=(SOFTMAX,) * 8, window=None, hidden_size=32, intermediate_size=48)
        text = replace(text, num_heads=2, num_kv_heads=1, head_dim=16, mrope_sections=(2, 3, 3))
        text = replace(text, delta_heads=2, delta_key_dim=16, delta_value_dim=32)
        weights.save(Model(replace(small, vision=vision, text=text), load_processor(weights.locate("tiny"))), folder)
    if not student.exists():
        convert(folder, student, window=256)
    return str(folder), str(student)
