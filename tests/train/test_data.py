"""Data: what a conversation becomes, how rows are packed, what is skipped and named, and that order lasts."""

from __future__ import annotations

import base64
import io
import json
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infinitevl import rope, weights
from infinitevl.config import tiny
from infinitevl.processor import Processor, patchify
from infinitevl.train import recipes
from infinitevl.train.conversations import Reader, pieces
from infinitevl.train.data import BrokenSample, DataError, Feed, Order, Rows, Sample, packed, parts
from infinitevl.train.forward import embedded, head_weight, place, through, visual_tokens
from infinitevl.train.losses import IGNORED, cross_entropy
from infinitevl.train.recipes import Recipe
from infinitevl.train.sources import open_source
from infinitevl.video import Frame

from .conftest import LAYERS, WINDOW, record, toy

Make = Callable[..., Recipe]


@pytest.fixture
def reader(processor: Processor, toy_recipe: Make, data: Path) -> Reader:
    return Reader(processor, toy(LAYERS, WINDOW), toy_recipe("stage2_instruct"), data.parent)


def text_of(processor: Processor, ids: torch.Tensor) -> str:
    return processor.tokenizer.decode(ids.tolist())


# Conversations


def test_a_conversation_is_spelled_as_it_is_asked(reader: Reader, processor: Processor) -> None:
    """The ids before the answer are those of a one-shot prompt, and only the answer with its end is learned."""
    sample = reader.sample(record("<image>what is this?", "a door", images=["b.png"]))
    tokens = (84 // 28) * (56 // 28)
    prompt = processor.chat.one_shot([("image", tokens)], "what is this?")
    answer = (*processor.ids("a door"), reader.config.stop_tokens[0])
    assert tuple(sample.ids.tolist()) == prompt + answer
    learned = (sample.labels != IGNORED).nonzero()[:, 0].tolist()
    assert learned == list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
    assert tuple(sample.labels[learned].tolist()) == answer
    grid = rope.Grid(1, 56 // 14, 84 // 14)
    assert torch.equal(sample.positions, rope.prompt(sample.ids[None], [grid], [], reader.config)[:, 0])
    assert [each.pixels.shape for each in sample.pictures if each.pixels is not None] == [(1, 56, 84, 3)]


def test_several_turns_follow_the_template(reader: Reader, processor: Processor) -> None:
    words = ["be brief.", "one?", "first", "two?", "second"]
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, words, strict=True)]
    sample = reader.sample({"messages": messages})
    from infinitevl.processor import QWEN_TEMPLATE

    template = processor.tokenizer.chat_template or QWEN_TEMPLATE
    whole = processor.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert text_of(processor, sample.ids) == whole.rstrip("\n")  # nothing follows the last answer's end
    said = text_of(processor, sample.labels[sample.labels != IGNORED])
    end = processor.tokenizer.decode([processor.chat.after[0]])
    assert said == f"first{end}second{end}"


def test_sharegpt_names_say_the_same(reader: Reader) -> None:
    other = {"conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}], "system": "be"}
    messages = [{"role": "system", "content": "be"}, *record("one?", "two")["messages"]]  # type: ignore[misc]
    assert torch.equal(reader.sample(other).ids, reader.sample({"messages": messages}).ids)


def test_what_users_write_is_text(reader: Reader, processor: Processor) -> None:
    """A control token spelled out in the data does not end a turn, and none of it becomes a picture."""
    sample = reader.sample(record("say <|im_end|> <|video_pad|>", "no <|im_end|>"))
    plain = reader.sample(record("say", "no"))
    ends, pad = processor.chat.after[0], processor.chat.video.pad
    assert (sample.ids == ends).sum() == (plain.ids == ends).sum() and (sample.ids == pad).sum() == 0


def test_pieces() -> None:
    assert pieces("<image>a<image><video> b") == ["<image>", "a", "<image>", "<video>", " b"]


def test_pictures_as_bytes_and_objects(reader: Reader, data: Path) -> None:
    content = (data.parent / "b.png").read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        given = ["b.png", {"bytes": content, "path": None}, image.copy()]
    samples = [reader.sample(record("<image>?", "a", images=[each])) for each in given]
    for sample in samples[1:]:
        assert sample.pictures[0].pixels is not None and samples[0].pictures[0].pixels is not None
        assert torch.equal(sample.pictures[0].pixels, samples[0].pictures[0].pixels)


def test_pictures_are_at_most_as_large_as_the_recipe_says(processor: Processor, toy_recipe: Make, data: Path) -> None:
    small = Reader(processor, toy(LAYERS, WINDOW), toy_recipe("stage2_instruct", max_pixels=28**2), data.parent)
    assert small.sample(record("<image>?", "a", images=["b.png"])).pictures[0].tokens == 1


def test_a_video_pairs_its_frames(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    from infinitevl.train import conversations

    asked = []

    class Opened:
        """Nine seconds at the rate that is asked for."""

        duration = 9.0

        def __init__(self, path: str, fps: float | None = None) -> None:
            asked.append(fps)
            self.fps = fps

        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *error: object) -> None: ...

        def __iter__(self):  # noqa: ANN204
            count = int(9 * (self.fps or 1)) + 1
            return (Frame(number / (self.fps or 1), np.full((56, 56, 3), number, np.uint8)) for number in range(count))

    monkeypatch.setattr(conversations, "frames", Opened)
    sample = reader.sample(record("<video>?", "a", videos=["x.mp4"]))
    pixels = sample.pictures[0].pixels
    assert asked == [None, 2.0] and pixels is not None and len(pixels) == 20  # 19 and the last again
    assert torch.equal(pixels[-1], pixels[-2]) and sample.pictures[0].tokens == 10 * 4
    assert sample.pictures[0].pair
    grid = rope.Grid(10, 4, 4, 1.0)
    assert torch.equal(sample.positions, rope.prompt(sample.ids[None], [], [grid], reader.config)[:, 0])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("words", "a record is a table"),
        ({"text": "a"}, "no messages"),
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "user"}]}, "a message needs 'role' and 'content'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role is 'tool'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "user and assistant by turns; here: assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, "user and assistant by turns; here: user"),
        (record("<image>?", "a"), "more marks <image> than images"),
        (record("?", "a", images=["a.png"]), "more images than marks"),
        (record("<image>?", "a", images=["none.png"]), "image none.png: "),
        (record("<image>?", "a", images=[3]), "image int: a picture is a file's name or bytes"),
        (record("<video>?", "a", videos=["none.mp4"]), "video none.mp4: "),
    ],
)
def test_broken_samples_say_why(reader: Reader, broken: object, said: str) -> None:
    with pytest.raises(BrokenSample) as error:
        reader.sample(broken)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_picture_is_a_broken_sample(reader: Reader, data: Path) -> None:
    whole = (data.parent / "a.png").read_bytes()
    for content in (whole[:100], b"nothing"):
        with pytest.raises(BrokenSample, match="image dict: "):
            reader.sample(record("<image>?", "a", images=[{"bytes": content}]))


# Files


def source_of(recipe: Recipe, processor: Processor):  # noqa: ANN201
    return open_source(recipe, processor, toy(LAYERS, WINDOW))


def test_json_and_jsonl_hold_the_same(tmp_path: Path, processor: Processor, toy_recipe: Make) -> None:
    records = [record(f"{n}?", str(n)) for n in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    one, other = (
        source_of(toy_recipe("stage2_instruct", data=str(tmp_path / name)), processor) for name in ("a.json", "a.jsonl")
    )
    assert one.size == other.size == 5
    assert (one.name(2), other.name(2)) == ("a.json[2]", "a.jsonl:3")
    assert all(torch.equal(one.sample(n).ids, other.sample(n).ids) for n in range(5))
    both = source_of(toy_recipe("stage2_instruct", data=f"{tmp_path}/a.json,{tmp_path}/a.jsonl"), processor)
    assert (both.size, both.name(7)) == (10, "a.jsonl:3")
    assert torch.equal(both.sample(7).ids, one.sample(2).ids)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.json", None, "no such file"),
        ("a.json", "{", "not JSON"),
        ("a.json", "{}", "it must hold a list of records, not a dict"),
        ("a.json", "[]", "there is no record in it"),
        ("a.jsonl", "\n", "there is no record in it"),
    ],
)
def test_files_that_are_no_data(
    tmp_path: Path, processor: Processor, toy_recipe: Make, name: str, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        source_of(toy_recipe("stage2_instruct", data=str(tmp_path / name)), processor)
    assert name in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_a_broken_line_is_named(tmp_path: Path, processor: Processor, toy_recipe: Make) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record("a?", "b")) + "\n{broken\n")
    source = source_of(toy_recipe("stage2_instruct", data=str(tmp_path / "a.jsonl")), processor)
    assert source.name(1) == "a.jsonl:2"
    with pytest.raises(BrokenSample, match="not JSON"):
        source.sample(1)


def test_hub_data(monkeypatch: pytest.MonkeyPatch, data: Path, processor: Processor, toy_recipe: Make) -> None:
    held = [record("<image>?", "a", images=[{"bytes": (data.parent / "a.png").read_bytes()}]), record("b?", "c")]
    asked = []
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, split: asked.append((name, split)) or held  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    source = source_of(toy_recipe("stage2_instruct", data="hf:own/chat:validation"), processor)
    assert asked == [("own/chat", "validation")] and source.size == 2 and source.name(1) == "own/chat[1]"
    assert source.sample(0).pictures[0].tokens == 4
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'infinitevl\[data\]'"):
        source_of(toy_recipe("stage2_instruct", data="hf:own/chat"), processor)


def test_hub_data_by_the_real_package(tmp_path: Path, processor: Processor, toy_recipe: Make) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "chat"
    folder.mkdir()
    coded = base64.b64encode(b"x").decode()
    (folder / "train.jsonl").write_text("".join(json.dumps(record(f"{n} {coded}?", str(n))) + "\n" for n in range(3)))
    source = source_of(toy_recipe("stage2_instruct", data=f"hf:{folder}"), processor)
    assert source.size == 3 and len(source.sample(2).ids) > 5


# Order and packing


@pytest.mark.parametrize("size", [1, 2, 7, 64, 100])
def test_an_epoch_has_every_sample_once(size: int) -> None:
    order = Order(size, 3, seed=1)
    drawn = [order.number(draw % 3, draw // 3) for draw in range(3 * size)]
    epochs = [drawn[at : at + size] for at in range(0, 3 * size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size >= 7:
        assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
        assert drawn != [Order(size, 3, seed=2).number(draw % 3, draw // 3) for draw in range(3 * size)]


class Lengths:
    """A source whose sample n has so many tokens, or is broken (0)."""

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.size, self.made = lengths, None, Counter[int]()

    def name(self, number: int) -> str:
        return f"n{number}"

    def sample(self, number: int) -> Sample:
        self.made[number] += 1
        length = self.lengths[number % len(self.lengths)]
        if not length:
            raise BrokenSample("empty")
        ids = torch.full((length,), number)
        return Sample(ids, ids, torch.arange(length).expand(3, -1), ())


def test_rows_are_filled_in_order_and_what_is_broken_is_named() -> None:
    source = Lengths(4, 3, 0, 5, 99, 6)
    rows = Rows(source, Order(None, 1, 0), 10)
    samples, place, troubles = rows.next(0, 0)
    assert [len(each.ids) for each in samples] == [4, 3] and place == 3
    assert [tuple(each) for each in troubles] == [("n2", "empty")]
    samples, place, troubles = rows.next(0, place)
    assert [len(each.ids) for each in samples] == [5] and place == 5
    assert troubles[0].name == "n4" and "99 tokens, and a row holds 10" in troubles[0].reason
    assert max(source.made.values()) == 1  # what did not fit was kept for the next row
    again, place, _ = Rows(source, Order(None, 1, 0), 10).next(0, 3)  # as a resumed run asks
    assert [len(each.ids) for each in again] == [5] and place == 5


def test_a_source_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="1000 samples in a row cannot be used; the first, n0: empty"):
        Rows(Lengths(0), Order(None, 1, 0), 10).next(0, 0)


def feed_of(recipe: Recipe, processor: Processor, mine: range, start: list[int]) -> Feed:
    from functools import partial

    return Feed(partial(open_source, recipe, processor, toy(LAYERS, WINDOW)), recipe, mine, start)


def test_parts_are_the_same_for_any_processes_workers_and_start(processor: Processor, toy_recipe: Make) -> None:
    recipe = toy_recipe("stage2_instruct")
    one = list(islice(parts(feed_of(recipe, processor, range(4), [0] * 4), torch.device("cpu")), 8))
    for rank in range(2):
        mine = range(2 * rank, 2 * rank + 2)
        alone = list(islice(parts(feed_of(recipe, processor, mine, [0] * 4), torch.device("cpu")), 4))
        for part, right in zip(alone, one[rank::2], strict=True):
            assert part.rows == right.rows == tuple(mine) and part.after == right.after
            assert torch.equal(part.batch.ids, right.batch.ids)
    after = [place for part in one[2:4] for place in part.after]  # after two steps of two parts
    resumed = list(islice(parts(feed_of(recipe, processor, range(4), after), torch.device("cpu")), 4))
    for part, right in zip(resumed, one[4:], strict=True):
        assert torch.equal(part.batch.ids, right.batch.ids) and part.after == right.after


def test_a_workers_refusal_is_one_line(processor: Processor, toy_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._utils import ExceptionWrapper

    from infinitevl.train import data

    class Loader:
        """What torch's loader does with an exception of a worker."""

        def __init__(self, *given: object, **more: object) -> None: ...

        def __iter__(self):  # noqa: ANN204
            try:
                raise DataError("nothing: of use")
            except DataError:
                wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
            wrapped.reraise()
            yield

    monkeypatch.setattr(data, "DataLoader", Loader)
    with pytest.raises(DataError) as error:
        next(parts(feed_of(toy_recipe("stage2_instruct"), processor, range(4), [0] * 4), torch.device("cpu")))
    assert str(error.value) == "nothing: of use"


@pytest.mark.parametrize(("cores", "workers"), [({0}, 1), ({0, 1}, 2), ({0, 1, 2}, 2), (set(range(16)), 4)])
def test_no_more_workers_than_cores(
    cores: set[int], workers: int, processor: Processor, toy_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 that are asked for, as many as share the 4 parts of a step evenly; torch has nothing to warn of."""
    from infinitevl.train import data

    asked: list[int] = []

    class Loader(data.DataLoader):
        def __iter__(self):  # noqa: ANN204
            asked.append(self.num_workers)
            return iter(())

    monkeypatch.setattr(data.os, "sched_getaffinity", lambda process: cores, raising=False)
    monkeypatch.setattr(data, "DataLoader", Loader)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed = feed_of(toy_recipe("stage2_instruct", workers=8, micro=1), processor, range(4), [0] * 4)
        assert list(parts(feed, torch.device("cpu"))) == [] and asked == [workers]


def test_a_row_that_holds_no_story_is_refused_at_once(processor: Processor, toy_recipe: Make) -> None:
    pytest.importorskip("sklearn")
    recipe = toy_recipe("stage2_instruct", data="synth", synth_frames=6, length=6 * 16)
    source_of(recipe, processor)
    with pytest.raises(DataError, match="length=95: the 6 frames of a story are 96 tokens"):
        source_of(replace(recipe, length=95), processor)


def test_a_worker_process_gives_the_same(processor: Processor, toy_recipe: Make) -> None:
    recipe = toy_recipe("stage2_instruct", workers=1, micro=1)
    right = list(islice(parts(feed_of(recipe, processor, range(2), [0] * 4), torch.device("cpu")), 5))
    there = feed_of(recipe, processor, range(2), [0] * 4)
    state = torch.get_rng_state()
    made = list(islice(parts(there, torch.device("cpu")), 5))
    assert torch.equal(torch.get_rng_state(), state)
    for part, same in zip(made, right, strict=True):
        assert part.rows == same.rows and part.after == same.after and torch.equal(part.batch.ids, same.batch.ids)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["student", "teacher"])
def test_packing_equals_separate_sequences(
    pattern: str, checkpoints: dict[str, str], reader: Reader, processor: Processor
) -> None:
    model = weights.load(checkpoints[pattern])
    long = " ".join(["the red ring came with WHEAT"] * 3)
    records = [
        record("<image>what? <image>", long, images=["a.png", "b.png"]),
        record("one?", "two"),
        record("<image>and?", "a door", images=["b.png"]),
        record(long, "five"),
    ]
    samples = [reader.sample(each) for each in records]
    assert max(len(each.ids) for each in samples) > WINDOW
    length = sum(len(each.ids) for each in samples[:3]) + 5
    together = packed([samples[:3], samples[3:]], length)
    hidden = through(model, embedded(model, together), place(model, together), False)
    total = torch.zeros(())
    at = 0
    for number, sample in enumerate(samples):
        alone = packed([[sample]], len(sample.ids))
        right = through(model, embedded(model, alone), place(model, alone), False)
        row, part = (0, slice(at, at + len(sample.ids))) if number < 3 else (1, slice(0, len(sample.ids)))
        assert torch.allclose(hidden[row, part], right[0], atol=2e-5), number
        total += cross_entropy(right, head_weight(model), alone.labels).total
        at = part.stop
    assert torch.allclose(cross_entropy(hidden, head_weight(model), together.labels).total, total, rtol=1e-5)
    assert together.real.sum() == sum(len(each.ids) for each in samples)


@torch.no_grad()
def test_pictures_seen_together_keep_their_places(checkpoints: dict[str, str], reader: Reader) -> None:
    """They are looked at in groups of one size; each one's tokens go where it stands in the words."""
    model = weights.load(checkpoints["student"])
    pixels = [torch.randint(256, (1, height, 56, 3), dtype=torch.uint8) for height in (56, 84, 56, 28, 84)]
    given = [[Image.fromarray(each[0].numpy()) for each in some] for some in (pixels[:3], pixels[3:])]
    samples = [reader.sample(record("<image>" * len(some) + "?", "a", images=some)) for some in given]
    batch = packed([samples[:1], samples[1:]], max(len(each.ids) for each in samples))
    right = []
    for each in pixels:
        patches, grid = patchify(each, model.processor.config, pair=False)
        right.append(model.vision(patches, *grid)[0])
    assert len(batch.pictures) == 3
    assert torch.allclose(visual_tokens(model, batch), torch.cat(right), atol=1e-5)


# The synthetic world


def test_a_story_is_what_a_stream_is_fed(checkpoints: dict[str, str], processor: Processor, toy_recipe: Make) -> None:
    """The memory after a sample is that of a stream that saw the frames and was told questions and answers."""
    pytest.importorskip("sklearn")
    from infinitevl import generate, stream
    from infinitevl.synth.compose import Composer
    from infinitevl.train.synthetic import asked_in

    model = weights.load(checkpoints["student"])
    recipe = toy_recipe("stage2_instruct", data="synth", synth_frames=6, synth_segment=3, synth_asks=2)
    source = source_of(recipe, processor)
    sample = source.sample(5)
    batch = packed([[sample]], len(sample.ids))
    with torch.no_grad():
        hidden = embedded(model, batch)
        _, memory = model(hidden, batch.positions, model.empty_memory())
    assert memory is not None

    stories, b, rng = source.story(5)
    asked = asked_in(stories, b, rng, recipe)
    assert len(asked) == 2 and max(asked) == 5
    painted = {name: torch.from_numpy(getattr(stories, name)[b]) for name in ("strips", "scene", "grain")}
    pixels = Composer()(painted).numpy()
    chat, watched, said = processor.chat, stream.begin(model), []
    for second in range(6):
        watched = stream.observe(model, watched, Frame(float(stories.t0[b] + second), pixels[second]))
        for question in asked.get(second, ()):
            answer = (*processor.ids(question.answer), chat.after[0])
            for ids in (chat.tail(question.text), answer, chat.reopen):
                _, watched = generate.feed(model, watched, ids)
            said.append(answer)
    for name, leaf in watched.named():
        if name not in ("frames", "origin", "start", "last"):  # clocks of frames: a packed row does not keep them
            assert torch.allclose(leaf.double(), dict(memory.named())[name].double(), atol=2e-5), name
    learned = sample.labels[sample.labels != IGNORED].tolist()
    assert learned == [token for answer in said for token in answer]


def test_stories_never_end_and_differ(processor: Processor, toy_recipe: Make) -> None:
    pytest.importorskip("sklearn")
    recipe = toy_recipe("stage2_instruct", data="synth", synth_frames=4, synth_segment=4)
    source = source_of(recipe, processor)
    assert source.size is None
    assert torch.equal(source.sample(10**9).ids, source.sample(10**9).ids)
    one, other = source.sample(0).pictures[0].painted, source.sample(1).pictures[0].painted
    assert one is not None and other is not None and not torch.equal(one["grain"], other["grain"])


def test_no_answer_of_a_story_is_told_before(processor: Processor, toy_recipe: Make) -> None:
    """About the past nothing is asked whose answer an earlier question of the story gave, in whatever words."""
    pytest.importorskip("sklearn")
    from infinitevl.synth.questions import NOW, STATES
    from infinitevl.train.synthetic import asked_in, things

    recipe = toy_recipe("stage2_instruct", data="synth", synth_frames=68, synth_setting="varied", length=1664)
    source = source_of(recipe, processor)
    firsts, counts = [], []
    for number in range(40):
        stories, b, rng = source.story(number)
        asked = asked_in(stories, b, rng, recipe)
        past = [things(q) for some in asked.values() for q in some if q.kind not in (*NOW, *STATES)]
        assert len(past) == len(set(past))
        assert all(len({q.text for q in some}) == len(some) for some in asked.values())
        firsts.append(min(asked))
        counts.append(sum(map(len, asked.values())))
    assert np.mean(counts) > 12 and sum(first >= 34 for first in firsts) > 8  # of 16; a clean half in a quarter


def test_stories_begin_at_any_time(processor: Processor, toy_recipe: Make) -> None:
    pytest.importorskip("sklearn")
    source = source_of(toy_recipe("stage2_instruct", data="synth", length=1664), processor)
    starts = [int(stories.t0[b]) for stories, b, _ in map(source.story, range(60))]
    assert min(starts) < 120 and max(starts) > 480 and all(start % 4 == 0 for start in starts)


def test_a_stage_has_stories_of_its_own(processor: Processor, toy_recipe: Make) -> None:
    pytest.importorskip("sklearn")
    small = {"data": "synth", "synth_frames": 4, "synth_segment": 4}
    one, other = (source_of(toy_recipe(f"stage{name}", **small), processor) for name in ("1_logits", "2_instruct"))
    mine, theirs = one.sample(0).pictures[0].painted, other.sample(0).pictures[0].painted
    assert mine is not None and theirs is not None and not torch.equal(mine["grain"], theirs["grain"])


@pytest.mark.parametrize(("name", "count"), [("stage1_layers", 40), ("stage2_instruct", 40), ("stage3_long", 8)])
def test_a_story_of_a_tiny_recipe_fills_a_row(processor: Processor, name: str, count: int) -> None:
    """One story to a row of the default checkpoint's shape: none is too long, and little is padding."""
    pytest.importorskip("sklearn")
    recipe = recipes.recipe(f"{name}_tiny")
    source = open_source(recipe, processor, tiny())
    lengths = [len(source.sample(number).ids) for number in range(count)]
    assert recipe.length >= max(lengths) and np.mean(lengths) > 0.9 * recipe.length
