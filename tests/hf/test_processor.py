"""AutoProcessor's class: the core's pictures and words in transformers' layout, without torchvision."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor
from transformers.processing_utils import ProcessorMixin

import infinitevl.hf as hf
from infinitevl import processor as pictures
from infinitevl import video
from infinitevl.processor import Processor

from .conftest import clip, one_line, picture

IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"


def patches_of(processor: Processor, pixels: Tensor, pair: bool) -> Tensor:
    """Patches of one picture by the core's functions."""
    frames, height, width, _ = pixels.shape
    config = processor.config
    size = pictures.fit_video(frames, height, width, config) if pair else pictures.fit(height, width, config)
    return pictures.patchify(pictures.resize(pixels, size), config, pair=pair)[0].flatten(0, 1)


def said(processor: Processor, text: str) -> list[int]:
    return processor.tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """Two seconds of H.264 at 4 pictures a second."""
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number * 30, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_pictures_and_their_places(processor: Processor, edge: hf.InfiniteVLProcessor) -> None:
    still, moving = [picture(84, 112), picture(56, 57, 1)], clip(5, 56, 84)
    text = f"a {VIDEO} b {IMAGE}{IMAGE} c"
    inputs = edge(images=still, text=text, videos=moving, fps=4, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 8], [1, 4, 4]]
    assert inputs["video_grid_thw"].tolist() == [[3, 4, 6]]
    assert inputs["second_per_grid_ts"] == [0.5]
    expected = torch.cat([patches_of(processor, image[None], pair=False) for image in still])
    assert torch.equal(inputs["pixel_values"], expected)
    assert torch.equal(inputs["pixel_values_videos"], patches_of(processor, moving, pair=True))
    begin, end, image, film = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
    whole = f"a {begin}{film * 18}{end} b {begin}{image * 12}{end}{begin}{image * 4}{end} c"
    assert inputs["input_ids"].tolist() == [said(processor, whole)]
    assert inputs["attention_mask"].all() and inputs["input_ids"].dtype == torch.int64


def test_every_way_to_give_an_image(edge: hf.InfiniteVLProcessor, tmp_path: Path) -> None:
    pixels = picture(40, 60)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels.numpy()).save(path)
    see_through = Image.fromarray(np.dstack([pixels.numpy(), np.full((40, 60), 9, np.uint8)]))
    expected = edge(images=pixels, text=IMAGE)["pixel_values"]
    for image in (pixels.numpy(), Image.open(path), path, str(path), see_through, [[pixels]]):
        assert torch.equal(edge(images=image, text=IMAGE)["pixel_values"], expected)
    with Image.open(path) as turned:
        exif = turned.getexif()
        exif[0x0112] = 6  # a camera held upright
        turned.save(tmp_path / "turned.jpg", exif=exif)
    assert edge(images=tmp_path / "turned.jpg", text=IMAGE)["image_grid_thw"].tolist() == [[1, 4, 2]]
    assert edge(images=pixels, text=IMAGE)["image_grid_thw"].tolist() == [[1, 2, 4]]


def test_every_way_to_give_a_video(edge: hf.InfiniteVLProcessor, film: Path, tmp_path: Path) -> None:
    frames = torch.stack([torch.as_tensor(frame.pixels) for frame in video.frames(film, fps=2)])
    expected = edge(videos=frames, text=VIDEO, fps=2)
    assert expected["video_grid_thw"][0, 0] == (len(frames) + 1) // 2 == 2
    stills = [Image.fromarray(frame.numpy()) for frame in frames]
    paths = [tmp_path / f"{number}.png" for number in range(len(stills))]
    for still, path in zip(stills, paths, strict=True):
        still.save(path)
    for given in (frames.numpy(), list(frames), stills, [stills], film, str(film), [film]):
        inputs = edge(videos=given, text=VIDEO, fps=2)
        assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
        assert inputs["second_per_grid_ts"] == [1.0]
    assert edge(videos=film, text=VIDEO)["second_per_grid_ts"] == [2.0]  # the checkpoint's own rate is 1
    assert len(edge(videos=[film, frames], text=VIDEO * 2)["video_grid_thw"]) == 2


def test_batches_are_padded_on_the_left(processor: Processor, edge: hf.InfiniteVLProcessor) -> None:
    texts = ["a long prompt of many words", "short", IMAGE]
    inputs = edge(images=[[], [], [picture(56, 56)]], text=texts, padding="longest")
    rows = [said(processor, text.replace("<|image_pad|>", "<|image_pad|>" * 4)) for text in texts]
    for ids, mask, row in zip(inputs["input_ids"], inputs["attention_mask"], rows, strict=True):
        assert ids[mask.bool()].tolist() == row
        assert mask.sort().values.equal(mask)
    assert (inputs["input_ids"][inputs["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()


def test_chats(processor: Processor, edge: hf.InfiniteVLProcessor, film: Path) -> None:
    still = picture(56, 56)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": still}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": [{"type": "video", "path": str(film)}, {"type": "text", "text": "and here?"}]},
    ]
    text = edge.apply_chat_template(chat, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}what?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
        f"<|im_start|>user\n{VIDEO}and here?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = edge.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, fps=2)
    expected = edge(images=still, text=text, videos=film, fps=2)
    assert set(inputs) == set(expected)
    for key, value in expected.items():
        assert torch.equal(inputs[key], value) if isinstance(value, Tensor) else inputs[key] == value
    ids = edge.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, processor_kwargs={"fps": 2})
    assert torch.equal(ids, inputs["input_ids"])


def test_the_chat_of_one_question_is_the_one_the_core_asks_with(processor: Processor, edge) -> None:
    content = [{"type": "image", "image": picture(56, 56)}, {"type": "text", "text": "what is this?"}]
    ids = edge.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True)
    assert tuple(ids[0].tolist()) == processor.chat.one_shot([("image", 4)], "what is this?")


def test_several_chats(edge: hf.InfiniteVLProcessor, tmp_path: Path) -> None:
    Image.fromarray(picture(56, 56).numpy()).save(tmp_path / "x.png")
    shown = {"type": "image_url", "image_url": {"url": str(tmp_path / "x.png")}}
    chats = [
        [{"role": "user", "content": "hello"}],
        [{"role": "user", "content": [shown, {"type": "text", "text": "?"}]}],
    ]
    texts = edge.apply_chat_template(chats)
    assert [IMAGE in text for text in texts] == [False, True]
    inputs = edge.apply_chat_template(chats, tokenize=True, return_dict=True)
    assert inputs["input_ids"].shape[0] == 2 and inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert edge.batch_decode(inputs["input_ids"], skip_special_tokens=True)[0].count("hello") == 1


def test_saved_and_read_again(edge: hf.InfiniteVLProcessor, tmp_path: Path) -> None:
    edge.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "infinite_vl"}')
    again = AutoProcessor.from_pretrained(tmp_path, use_fast=True)
    assert isinstance(again, ProcessorMixin) and again.processor.config == edge.processor.config
    assert torch.equal(again(text="what?")["input_ids"], edge(text="what?")["input_ids"])
    assert "ProcessorConfig" in repr(again)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"text": IMAGE}, "more <|image_pad|> than"),
        ({"text": "a", "images": picture(56, 56)}, "more pictures"),
        ({"text": VIDEO, "images": picture(56, 56)}, "more <|video_pad|> than"),
        ({"text": IMAGE, "images": torch.zeros(3, 56, 56)}, "uint8 [height, width, 3]"),
        ({"text": VIDEO, "videos": torch.zeros(2, 3, 56, 56)}, "uint8 [height, width, 3]"),
        ({"text": IMAGE, "images": "no/such/picture.png"}, "no/such/picture.png"),
        ({"text": VIDEO, "videos": "no/such/film.mp4"}, "no/such/film.mp4"),
        ({"text": "a", "padding": "max_length"}, "max_length"),
        ({"text": "a", "return_tensors": "np"}, "'np'"),
    ],
)
def test_what_does_not_fit_is_refused(edge: hf.InfiniteVLProcessor, given: dict, words: str) -> None:
    with pytest.raises(ValueError) as error:
        edge(**given)
    assert words in one_line(error.value)


def test_a_part_that_shows_nothing_is_refused(edge: hf.InfiniteVLProcessor) -> None:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    assert IMAGE in edge.apply_chat_template(chat)  # the text alone is fine: pictures may come in __call__
    with pytest.raises(ValueError, match="shows nothing"):
        edge.apply_chat_template(chat, tokenize=True)
