"""The file in docs/evaluation.md that lets lmms-eval run our checkpoints, against a stand-in that makes its calls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infinitevl import weights

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]

# What lmms-eval's generic model does with a checkpoint: found by AutoModel, prompts with all three kinds of media.
STAND_IN = """
import sys
import numpy as np
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

where = sys.argv[1]
AutoConfig.from_pretrained(where, trust_remote_code=False)
model = AutoModel.from_pretrained(where, trust_remote_code=False, torch_dtype="bfloat16", device_map="cpu").eval()
processor = AutoProcessor.from_pretrained(where, trust_remote_code=False)
tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
picture = Image.fromarray(np.full((90, 120, 3), 128, np.uint8))
clip = np.full((4, 56, 56, 3), 90, np.uint8)
for side, images, videos in (("right", [picture], []), ("left", [picture, picture], []), ("right", [], [clip])):
    kind = "image" if images else "video"
    content = [{"type": kind, kind: None}, {"type": "text", "text": "what does the sign say?"}]
    messages = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(
        text=[prompt] * max(len(images), 1), padding=True, padding_side=side, return_tensors="pt",
        images=images, videos=videos, audios=[],
    ).to("cpu")
    said = model.generate(
        **inputs, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False,
        temperature=None, top_p=None, num_beams=1, max_new_tokens=4, use_cache=True,
    )
    new = [ids[len(given):] for given, ids in zip(inputs.input_ids, said)]
    texts = processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert len(texts) == max(len(images), 1) and len(set(texts)) == 1
print("answered", sys.argv[0])
"""


def test_the_documented_file_answers_what_lmms_eval_asks(tmp_path):
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = [found for found in re.findall(r"```python\n([\s\S]*?)```", text) if found.startswith("# lmms.py")]
    (tmp_path / "lmms.py").write_text(code)
    (tmp_path / "lmms_eval").mkdir()
    (tmp_path / "lmms_eval" / "__init__.py").touch()
    (tmp_path / "lmms_eval" / "__main__.py").write_text(STAND_IN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "lmms.py", str(weights.locate("tiny"))]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("answered"), done.stderr[-2000:]
