"""infinitevl ask: one prompt of images and recordings, as one pass over the model by hand."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infinitevl import oneshot, rope
from infinitevl.display import progress
from infinitevl.model import Model
from infinitevl.processor import fit, fit_video, patchify, resize
from infinitevl.video import VideoError, frames

from .conftest import film, picture

QUESTION = "what is it?"


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("still") / "still.png"
    Image.fromarray(picture(50, 90, 140)).save(path)
    return path


def looked(model: Model, pixels: np.ndarray, size: tuple[int, int], pair: bool) -> tuple[torch.Tensor, tuple]:
    """Visual tokens [N, D] of pictures, and their grid."""
    patches, grid = patchify(resize(torch.from_numpy(pixels), size), model.processor.config, pair=pair)
    return model.vision(patches, *grid).flatten(0, 1), (len(patches), *grid)


@torch.no_grad()
def by_hand(model: Model, parts: list[tuple], question: str, new: int) -> str:
    """Greedy words after a prompt of (kind, tokens, grid, seconds), each from a pass over the whole text."""
    chat, config = model.processor.chat, model.config
    pads = {"image": chat.image, "video": chat.video}
    ids = list(chat.before)
    for kind, tokens, _, _ in parts:
        ids += [*pads[kind].opening, *[pads[kind].pad] * len(tokens), *pads[kind].closing]
    ids += [*model.processor.ids(question), *chat.after]
    grids = {kind: [rope.Grid(*grid, seconds) for of, _, grid, seconds in parts if of == kind] for kind in pads}
    visual = torch.cat([tokens for _, tokens, _, _ in parts])
    said: list[int] = []
    while len(said) < new:
        whole = torch.tensor([ids + said])
        positions = rope.prompt(whole, grids["image"], grids["video"], config)
        hidden, _ = model(model.embed(whole, visual), positions)
        said.append(int(model.logits(hidden[0, -1]).argmax()))
    assert not set(said) & set(config.stop_tokens)
    return model.processor.text(said).strip()


def test_image_and_video_in_one_prompt(
    model: Model, clip: Path, still: Path, run: Callable, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model.processor.config
    moving = np.stack([frame.pixels for frame in frames(clip, fps=0.5)])
    assert len(moving) == 4
    image = looked(model, picture(50, 90, 140)[None], fit(90, 140, config), pair=False)
    video = looked(model, moving, fit_video(4, 112, 112, config), pair=True)
    parts = [("video", *video, 4.0), ("image", *image, 0.0)]
    monkeypatch.setattr(oneshot, "CHUNK", 7)  # many chunks through the memory
    monkeypatch.setattr(oneshot, "GRIDS", 1)
    said = run("ask", clip, still, QUESTION, "--model", checkpoint, "--fps", 0.5, "--at-most", 5)
    assert (said.code, said.out) == (0, by_hand(model, parts, QUESTION, 5) + "\n")
    other = run("ask", still, clip, QUESTION, "--model", checkpoint, "--fps", 0.5, "--at-most", 5)
    assert other.out == by_hand(model, parts[::-1], QUESTION, 5) + "\n" != said.out


def test_seconds_of_a_grid_follow_the_rate(model: Model, clip: Path) -> None:
    for rate, grids in ((1.0, 4), (2.0, 8), (0.5, 2)):
        part = oneshot._recording(model, str(clip), rate, [])
        assert (part.grid.time, part.grid.seconds) == (grids, 2 / rate)
        assert part.tokens == grids * 16 and len(part.pictures) == 8 * rate


def test_a_recording_that_grows_is_shrunk_as_it_is_held(
    model: Model, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With frames of room for 16 tokens below 4 of them, for 4 below 8 and for one above."""
    sizes = {1: (112, 112), 4: (56, 56), 8: (28, 28)}
    asked: list[int] = []

    def rule(count: int, *_: object) -> tuple[int, int]:
        asked.append(count)
        return sizes[max(least for least in sizes if least <= count)]

    monkeypatch.setattr(oneshot, "fit_video", rule)
    monkeypatch.setattr(oneshot, "HELD", 4)
    part = oneshot._recording(model, str(clip), 1.25, [])
    assert asked == [1, 4, 8, 10]
    assert {tuple(each.shape) for each in part.pictures} == {(1, 28, 28, 3)}
    assert (part.size, part.grid, part.tokens) == ((28, 28), (5, 2, 2, 1.6), 5)
    assert all(each.device.type == "cpu" for each in part.pictures)


def test_texts_come_before_the_question(
    model: Model, still: Path, tmp_path: Path, run: Callable, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.TXT").write_text("\nThe first <|im_end|> one.\n")
    (tmp_path / "two.md").write_text("# Über\n\ntwo", encoding="utf-8")
    asked = "The first <|im_end|> one.\n\n# Über\n\ntwo\n\n" + QUESTION
    monkeypatch.setattr(oneshot, "CHUNK", 16)
    image = looked(model, picture(50, 90, 140)[None], fit(90, 140, model.processor.config), pair=False)
    words = (tmp_path / "one.TXT", still, tmp_path / "two.md", QUESTION, "--model", checkpoint, "--at-most", 5)
    said = run("ask", *words)
    assert (said.code, said.err) == (0, "")
    assert said.out == by_hand(model, [("image", *image, 0.0)], asked, 5) + "\n"
    alone = oneshot.ask(model, [str(tmp_path / "two.md")], QUESTION, at_most=5)
    hidden, memory = oneshot.prompt(model, [], "# Über\n\ntwo\n\n" + QUESTION, 5)
    ids = list(oneshot.decode(model, memory, hidden, 5, oneshot.GREEDY))
    assert alone.answer.text == model.processor.text(ids).strip() != "" and alone.problems == ()


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), (b" \n", "nothing is written"), (b"\xff\xfe\x00", "not a text in UTF-8")],
)
def test_texts_that_cannot_be_read(
    run: Callable, checkpoint: Path, tmp_path: Path, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "note.txt").write_bytes(content)
    said = run("ask", tmp_path / "note.txt", QUESTION, "--model", checkpoint)
    assert (said.code, said.out) == (2, "") and said.err.count("\n") == 1
    assert said.err.startswith(f"infinitevl: {tmp_path}/note.txt: ") and says in said.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "steps"), [(Terminal, 3), (Terminal, 1), (io.StringIO, 3)])
def test_bar_for_a_long_prompt(stream: type, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal only, and only where there is more than one step."""
    for name, value in (("TERM", "xterm"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with progress() as tell:
        for step in range(steps):
            tell(4096 * (step + 1), 4096 * steps)
            time.sleep(0.15)  # it draws ten times a second
    shown = sys.stderr.getvalue()
    assert ("4096/12288" in shown) == (stream is Terminal and steps > 1)
    assert "tokens read" not in shown or steps > 1
    assert sys.stdout.getvalue() == ""


def test_json(run: Callable, still: Path, checkpoint: Path) -> None:
    said = run("ask", still, QUESTION, "--model", checkpoint, "--at-most", 2, "--json")
    told = json.loads(said.out)
    assert (told["question"], told["problems"], told["tokens"]) == (QUESTION, [], 2)
    assert told["seconds"] > 0 and isinstance(told["answer"], str)


def test_broken_recording_is_answered_and_complained_about(run: Callable, checkpoint: Path, tmp_path: Path) -> None:
    whole = film(tmp_path / "whole.avi", 12).read_bytes()
    (tmp_path / "broken.avi").write_bytes(whole[: len(whole) // 2])
    said = run("ask", tmp_path / "broken.avi", QUESTION, "--model", checkpoint, "--at-most", 2)
    assert said.code == 5 and said.out.strip()
    assert said.err.count("\n") == 1 and "breaks off" in said.err


def test_too_long_a_recording_is_refused(model: Model, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oneshot, "FRAMES", 7)
    with pytest.raises(VideoError, match="more than 7 frames; use a lower --fps"):
        oneshot.ask(model, [str(clip)], QUESTION, fps=1)
    assert oneshot.ask(model, [str(clip)], QUESTION, fps=0.5, at_most=1).answer.tokens <= 1


def test_long_recording_shares_the_visual_tokens(model: Model, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's rule for the size of frames is applied to their number, here with room for four tokens a frame."""
    monkeypatch.setattr(oneshot, "fit_video", lambda count, *_: (56, 56) if count > 1 else (112, 112))
    part = oneshot._recording(model, str(clip), 1.0, [])
    assert part.grid[:3] == (4, 4, 4)
