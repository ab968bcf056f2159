"""LoRA by peft on the edge: what it trains, that it learns, and that what is saved comes back."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch

import infinitevl
import infinitevl.hf as hf

from .conftest import one_line, picture

LORA = {"r": 4, "lora_alpha": 16, "target_modules": hf.LORA_TARGETS}


@pytest.fixture
def batch(edge: hf.InfiniteVLProcessor) -> dict:
    question = "<|vision_start|><|image_pad|><|vision_end|>what is this?"
    inputs = dict(edge(images=[picture(56, 84), picture(56, 56, 1)], text=[question + " a cat", question + " dog"]))
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def trained(model, batch: dict, steps: int = 8) -> list[float]:
    """Losses of a few steps of AdamW on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_targets_are_the_projections_of_the_language_model(model: hf.InfiniteVLForConditionalGeneration) -> None:
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    names = {m[1] for n, _ in adapted.named_modules() if (m := re.fullmatch(r"base_model\.model\.(.*)\.lora_A", n))}
    softmax, delta = {"q", "k", "v", "o"}, {"q", "k", "v", "g", "o"}
    mixers = [softmax, delta, delta, delta]
    expected = {f"model.blocks.{n}.mixer.{part}" for n, parts in enumerate(mixers) for part in parts}
    expected |= {f"model.blocks.{n}.mlp.{part}" for n in range(4) for part in ("gate", "up", "down")}
    assert names == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_learns_and_leaves_the_rest(folder: Path, batch: dict, dtype: str) -> None:
    model = hf.InfiniteVLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    before = {name: parameter.clone() for name, parameter in model.model.named_parameters()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type="CAUSAL_LM"))
    adapted.train()
    losses = trained(adapted, batch)
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
    after = {name.replace(".base_layer", ""): parameter for name, parameter in model.model.named_parameters()}
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter) and after[name].dtype == parameter.dtype, name
    exact = [p.dtype for name, p in adapted.named_parameters() if name.endswith(("A_log", "dt_bias"))]
    assert exact == [torch.float32] * 6


def test_adapters_come_back(model, folder: Path, batch: dict, tmp_path: Path) -> None:
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    trained(adapted, batch, steps=2)
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = adapted(**batch).logits
        fresh = hf.InfiniteVLForConditionalGeneration.from_pretrained(folder)
        assert (fresh(**batch).logits - logits).abs().max() > 1e-3
        again = peft.PeftModel.from_pretrained(fresh, tmp_path)
        assert torch.allclose(again(**batch).logits, logits, atol=1e-5)
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == str(folder)


def test_a_merged_model_is_a_checkpoint(model, batch: dict, tmp_path: Path) -> None:
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    trained(adapted, batch, steps=2)
    with pytest.raises(ValueError) as error:
        model.save_pretrained(tmp_path)
    assert "merge_and_unload" in one_line(error.value) and not list(tmp_path.iterdir())
    with torch.no_grad():
        logits = adapted(**batch).logits
        merged = adapted.merge_and_unload()
        assert merged is model
        merged.save_pretrained(tmp_path)
        again = hf.InfiniteVLForConditionalGeneration.from_pretrained(tmp_path)
        assert (again(**batch).logits - logits).abs().max() <= 1e-4
    assert torch.equal(infinitevl.load(tmp_path).embedding.weight, again.model.embedding.weight)


def test_an_adapted_model_generates(model, edge: hf.InfiniteVLProcessor) -> None:
    inputs = edge(text="what is this?")
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type="CAUSAL_LM"))
    again = adapted.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(again, plain)  # an untrained adapter adds nothing


def test_a_folder_of_an_adapter_says_what_to_do(model, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    peft.get_peft_model(model, peft.LoraConfig(**LORA)).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert "PeftModel.from_pretrained" in one_line(error.value)
