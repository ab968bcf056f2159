"""What a `Stream` promises: what it feeds, when, where and how large; that asking leaves no trace; that it can wait."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from infinitevl import Frame, Memory, Sampling, Stream, rope, stream, weights
from infinitevl.config import tiny
from infinitevl.generate import feed, pick
from infinitevl.model import Model
from infinitevl.processor import Processor, load_processor
from infinitevl.stream import TimeError, Turns

FRAME = 16  # tokens of a frame of 112x112
QUESTION = "what does the sign say?"


@pytest.fixture(scope="module")
def model() -> Model:
    """Random weights of a size at which what was seen decides what is said."""
    return made(load_processor(weights.locate("tiny")))


@pytest.fixture(scope="module")
def plain(model) -> Model:
    """The same model without time stamps, as the published checkpoint streams."""
    processor = model.processor
    return made(replace(processor, config=replace(processor.config, stamp_seconds=None)))


def made(processor: Processor, **changes: object) -> Model:
    torch.manual_seed(0)
    model = Model(replace(tiny(), text=replace(tiny().text, **changes)), processor)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3 if name == "embedding.weight" else 1.5 * parameter.shape[1] ** -0.5)
    return model.eval()


def pictures(count: int, seed: int = 0, height: int = 112, width: int = 112) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def watching(model: Model, count: int, seed: int = 0) -> Stream:
    """A stream that has seen `count` frames, one a second."""
    watched = Stream(model)
    for second, picture in enumerate(pictures(count, seed)):
        watched.observe(Frame(float(second), picture))
    return watched


def same(one: Memory, other: Memory) -> bool:
    """Bit for bit, NaN equal to NaN."""
    pairs = zip(one.named(), other.named(), strict=True)
    return all(torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) for (_, a), (_, b) in pairs)


def saying(monkeypatch: pytest.MonkeyPatch, model: Model, *ids: int) -> None:
    """From now on the model says these ids over and over, whatever it is asked."""
    place = iter(range(10**6))
    rows = torch.nn.functional.one_hot(torch.tensor(ids), model.config.text.vocab_size).float()
    monkeypatch.setattr(model, "logits", lambda hidden: rows[next(place) % len(ids)][None])


class Tape:
    """All that a model is fed, in order: ids (a frame's are video tokens) and positions; and each frame's grid."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
        self.model, self.ids, self.positions, self.grids = model, [], [], []
        embed, vision, forward = model.embed, model.vision.forward, model.forward

        def embedding(ids):
            self.ids += ids[0].tolist()
            return embed(ids)

        def seeing(patches, rows, columns):
            self.ids += [model.config.video_token] * (rows * columns // 4)
            self.grids.append((rows, columns))
            return vision(patches, rows, columns)

        def forwarding(hidden, positions, memory, count):
            self.positions.append(positions)
            return forward(hidden, positions, memory, count=count)

        monkeypatch.setattr(model, "embed", embedding)
        monkeypatch.setattr(model.vision, "forward", seeing)
        monkeypatch.setattr(model, "forward", forwarding)

    def text(self) -> str:
        """What was fed as text, control tokens spelled out, a frame as [n] by its number of tokens."""
        video, text, run = self.model.config.video_token, "", 0
        for token, after in zip(self.ids, [*self.ids[1:], None], strict=True):
            run += token == video
            if run and (after != video or run == FRAME):
                text, run = f"{text}[{run}]", 0
            elif token != video:
                text += self.model.processor.tokenizer.decode([token])
        return text


# -- what is counted --------------------------------------------------------------------------------------------------


def test_a_stream_knows_its_time_frames_tokens_and_bytes(model):
    watched = Stream(model)
    head, nbytes = len(model.processor.chat.head), watched.nbytes
    assert (watched.time, watched.frames, watched.tokens) == (None, 0, head)
    stamp = len(model.processor.stamp_ids(4.0))
    for number, picture in enumerate(pictures(18)):
        watched.observe(Frame(0.5 + number, picture))
        stamps = 1 + int(0.5 + number) // 4
        assert (watched.time, watched.frames) == (0.5 + number, number + 1)
        assert watched.tokens == head + FRAME * (number + 1) + stamp * stamps
        assert watched.nbytes == nbytes
    assert watched.tokens > model.config.text.window
    assert nbytes == watched.memory.nbytes == model.empty_memory().nbytes


def test_a_frame_without_a_time_comes_one_sampling_step_later(plain):
    watched, picture = Stream(plain), pictures(1)[0]
    times = []
    for time in (None, None, 7.25, None):
        watched.observe(picture, time)
        times.append(watched.time)
    watched.observe(Frame(3.0, picture), time=9.0)
    assert [*times, watched.time] == [0.0, 1.0, 7.25, 8.25, 9.0]


# -- what is fed ------------------------------------------------------------------------------------------------------


def test_a_stamp_comes_before_the_frame_that_reaches_its_time_and_none_without_them(model, plain, monkeypatch):
    times = (1.0, 3.9, 4.0, 5.0, 7.0, 21.5, 21.5, 24.1, 605.0)
    tape = Tape(monkeypatch, model)
    watched = Stream(model)
    for time, picture in zip(times, pictures(9), strict=True):
        watched.observe(picture, time)
    parts = ["", "", "0:00", "[16][16]", "0:04", "[16][16][16]", "0:20", "[16][16]", "0:24", "[16]", "10:04", "[16]"]
    told = tape.text().partition("user\n")[2]
    assert told.replace("<|vision_end|>", "|").replace("<|vision_start|>", "|") == "|".join(parts)
    assert told.startswith("<|vision_start|><|vision_end|>0:00<|vision_start|>[16]")

    tape = Tape(monkeypatch, plain)
    watched = Stream(plain)
    for time, picture in zip(times, pictures(9), strict=True):
        watched.observe(picture, time)
    assert tape.text().endswith("user\n<|vision_start|>" + "[16]" * 9)


def test_the_size_of_the_first_frame_stays(plain, monkeypatch):
    tape = Tape(monkeypatch, plain)
    watched = Stream(plain)
    for height, width in ((240, 480), (480, 240), (112, 112), (57, 1000)):
        watched.observe(pictures(1, 0, height, width)[0])
    twin = watched.fork()
    twin.observe(pictures(1)[0])
    assert tape.grids == [(4, 8)] * 5
    other = Stream(plain)
    other.observe(pictures(1, 0, 480, 240)[0])
    assert tape.grids[-1] == (8, 4)


def test_a_conversation_is_fed_as_the_chat_format_has_it(plain, monkeypatch):
    """Two questions that are kept, each about frames of its own, equal the template's text of the whole."""
    tape, processor = Tape(monkeypatch, plain), plain.processor
    saying(monkeypatch, plain, *processor.ids("ZEBRA"), plain.config.stop_tokens[0])
    watched = Stream(plain)
    for count, question in ((2, QUESTION), (3, "and now, <|im_end|>?")):
        for picture in pictures(count):
            watched.observe(picture)
        assert watched.ask(question, keep=True).text == "ZEBRA"
    watched.observe(pictures(1)[0])
    assert watched.tokens == len(tape.ids)

    def turn(text: str) -> list[dict[str, object]]:
        content = [{"type": "video"}, {"type": "text", "text": text}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": "ZEBRA"}]

    messages = [*turn(QUESTION), *turn("QUESTION"), turn("")[0]]
    whole = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    for count in (2, 3, 1):
        whole = whole.replace("<|video_pad|>", "<|image_pad|>" * FRAME * count, 1)
    before, after = whole.split("QUESTION")
    ids = (*encoded(processor, before), *processor.ids("and now, <|im_end|>?"), *encoded(processor, after))
    end = ids.index(plain.config.image_token, len(ids) - FRAME - 4) + FRAME  # up to the last frame
    video = [plain.config.video_token if each == plain.config.image_token else each for each in ids[:end]]
    assert tape.ids == video


def encoded(processor: Processor, text: str) -> list[int]:
    return processor.tokenizer.encode(text, add_special_tokens=False)


def test_an_answer_cut_short_is_closed_as_any_other(plain, monkeypatch):
    tape = Tape(monkeypatch, plain)
    saying(monkeypatch, plain, *plain.processor.ids("A"))
    watched = watching(plain, 1)
    assert watched.ask(QUESTION, at_most=3, keep=True).text == "AAA"
    assert tape.text().endswith("assistant\nAAA<|im_end|>\n<|im_start|>user\n<|vision_start|>")


@pytest.mark.parametrize("stamps", [True, False])
def test_positions_of_a_stream_are_those_of_a_prompt(model, plain, stamps, monkeypatch):
    """Each run of frames is a video of the prompt's rule, a second a grid; the question is text after it."""
    watcher = model if stamps else plain
    tape = Tape(monkeypatch, watcher)
    watched = watching(watcher, 10)
    watched.ask(QUESTION, at_most=5)
    grids = [rope.Grid(count, 8, 8, 1.0) for count in ((4, 4, 2) if stamps else (10,))]
    right = rope.prompt(torch.tensor([tape.ids]), [], grids, watcher.config)
    assert torch.equal(torch.cat(tape.positions, 2), right)


@torch.no_grad()
def test_a_stream_says_what_one_pass_over_the_whole_prompt_says(plain, monkeypatch):
    with monkeypatch.context() as patch:
        tape = Tape(patch, plain)
        watched = watching(plain, 9)
        watched.ask(QUESTION, keep=True, at_most=4)
        watched.observe(pictures(1, 5)[0], 9.0)
        said = watched.ask("and now?", at_most=6)
    shown = torch.from_numpy(np.concatenate([pictures(9), pictures(1, 5)]))
    patches, grid = stream.pictures.patchify(shown, plain.processor.config, pair=False)
    ids = torch.tensor([tape.ids])
    grids = [rope.Grid(9, 8, 8, 1.0), rope.Grid(1, 8, 8, 1.0)]
    hidden = plain.embed(ids, plain.vision(patches, *grid).flatten(0, 1))
    logits = plain.logits(plain(hidden, rope.prompt(ids, [], grids, plain.config))[0])[0]
    answer = tape.ids[len(tape.ids) - said.tokens :]
    assert said.tokens == 6 and logits[-1 - said.tokens : -1].argmax(-1).tolist() == answer


# -- asking -----------------------------------------------------------------------------------------------------------


def test_asking_leaves_the_memory_bit_identical(model):
    watched = watching(model, 20)
    before = watched.memory
    watched.ask(QUESTION, at_most=20)
    list(watched.ask_pieces(QUESTION, at_most=5))
    next(watched.ask_pieces(QUESTION))
    stream.answer(model, watched._run.memory, QUESTION, at_most=5)
    assert same(watched.memory, before)
    watched.memory.index.zero_()
    assert same(watched.memory, before), "what is handed out is a clone"
    watched.ask(QUESTION, at_most=1, keep=True)
    assert not same(watched.memory, before)


def test_a_question_gets_a_memory_to_consume(model, monkeypatch):
    """A step may write into what it is given (a recorded one does): all ways of asking give it a clone."""

    def wasteful(model, memory, *rest):
        yield from model.processor.ids("AB")
        for _, leaf in memory.named():
            leaf.zero_()
        return memory

    watched = watching(model, 2)
    before = watched.memory
    monkeypatch.setattr(stream, "reply", wasteful)
    assert watched.ask(QUESTION).text == "".join(watched.ask_pieces(QUESTION)) == "AB"
    assert stream.answer(model, watched._run.memory, QUESTION) == "AB"
    assert same(watched.memory, before)
    monkeypatch.setattr(stream, "feed", lambda *_: 1 / 0)  # what is kept is not closed: nothing is kept at all
    with pytest.raises(ZeroDivisionError):
        watched.ask(QUESTION, keep=True)
    assert same(watched.memory, before)


def test_an_answer_carries_its_time_tokens_and_seconds(model):
    watched = Stream(model)
    assert watched.ask(QUESTION, at_most=2).time is None
    watched.observe(pictures(1)[0], 3.5)
    said = watched.ask(QUESTION, at_most=3)
    assert (said.time, said.tokens) == (3.5, 3) and 0 < said.seconds < 60
    assert said.text == stream.answer(model, watched.memory, QUESTION, at_most=3)


def test_pieces_join_to_the_answer_without_half_characters(model, monkeypatch):
    watched = watching(model, 3)
    said = watched.ask(QUESTION, at_most=30).text
    assert "".join(watched.ask_pieces(QUESTION, at_most=30)).strip() == said != ""
    ids = model.processor.ids("ü 日本 ok")
    assert len(ids) > len("ü 日本 ok")
    saying(monkeypatch, model, *ids, model.config.video_token, model.config.stop_tokens[0])
    pieces = list(watched.ask_pieces(QUESTION))
    assert "".join(pieces) == "ü 日本 ok" and "" not in pieces
    assert set("ü日本") <= set(pieces), "each as soon as it is whole"
    saying(monkeypatch, model, *ids[:4], model.config.stop_tokens[0])
    assert "".join(watched.ask_pieces(QUESTION)) == watched.ask(QUESTION).text == "ü \ufffd", "broken off inside one"


def test_pieces_are_about_the_moment_at_which_the_first_is_wanted(model):
    watched = watching(model, 2)
    pieces = watched.ask_pieces(QUESTION, at_most=8)
    watched.observe(pictures(1, 9)[0])
    right = watched.ask(QUESTION, at_most=8).text
    first = next(pieces)
    watched.observe(pictures(1, 10)[0])
    assert (first + "".join(pieces)).strip() == right


def test_every_end_of_turn_ends_an_answer(model, monkeypatch):
    watched, letters = watching(model, 1), model.processor.ids("AB")
    for stop in model.config.stop_tokens:
        saying(monkeypatch, model, *letters, stop)
        said = watched.ask(QUESTION)
        assert (said.text, said.tokens) == ("AB", 2)
    saying(monkeypatch, model, model.config.stop_tokens[0])
    assert watched.ask(QUESTION)[::2] == ("", 0) and list(watched.ask_pieces(QUESTION)) == []
    saying(monkeypatch, model, letters[0])
    assert watched.ask(QUESTION).tokens == 64 and watched.ask(QUESTION, at_most=5).text == "AAAAA"


def test_sampling_is_repeated_by_its_seed(model):
    watched = watching(model, 2)

    def said(*sampling: float) -> str:
        return watched.ask(QUESTION, at_most=12, sampling=Sampling(*sampling)).text

    drawn = said(1.5, 0.95, 7)
    assert drawn == said(1.5, 0.95, 7) != said(1.5, 0.95, 8)
    assert "".join(watched.ask_pieces(QUESTION, 12, Sampling(1.5, 0.95, 7))).strip() == drawn
    assert said(1.5, 1e-6, 3) == said(1e-4, 1.0, 4) == said() != drawn
    assert said(1.5, 0.95) != said(1.5, 0.95), "without a seed every draw is another"


def test_a_token_is_drawn_from_the_smallest_set_of_the_mass_asked_for():
    logits = torch.log(torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])).expand(4000, -1)
    chances = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    for sampling, likely in (
        (Sampling(1.0, 0.64), {1, 2}),
        (Sampling(1.0, 0.66), {1, 2, 3}),
        (Sampling(1.0), set(range(5))),
    ):
        drawn = pick(logits, sampling, chances)
        assert set(drawn.tolist()) == likely
    share = (drawn.bincount() / len(drawn)).tolist()
    assert share == pytest.approx([0.05, 0.4, 0.25, 0.2, 0.1], abs=0.03)
    cold = pick(logits, Sampling(0.5), chances).bincount() / len(drawn)
    assert cold[1] == pytest.approx(0.4**2 / sum(p * p for p in (0.05, 0.4, 0.25, 0.2, 0.1)), abs=0.03)


@pytest.mark.parametrize("wrong", [(-1.0, 1.0), (1.0, 0.0), (1.0, 1.5)])
def test_sampling_that_means_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="temperature must be >= 0 and top_p in"):
        Sampling(*wrong)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("time", "message"),
    [
        (2.25, r"2\.250 s.*3\.000 s"),
        (float("nan"), "got nan"),
        (float("inf"), "got inf"),
        (-5.0, r"-5\.000 s.*3\.000 s"),
    ],
)
@pytest.mark.parametrize("stamps", [True, False])
def test_a_frame_of_a_wrong_time_changes_nothing(model, plain, stamps, time, message):
    watched = watching(model if stamps else plain, 4)
    before = watched.memory
    with pytest.raises(TimeError, match=message):
        watched.observe(Frame(time, pictures(1)[0]))
    assert same(watched.memory, before) and (watched.time, watched.frames) == (3.0, 4)
    watched.observe(pictures(1)[0], 3.0)  # the same time again is no step back
    assert watched.frames == 5


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((112, 112, 3), np.float32),
        np.zeros((112, 112), np.uint8),
        np.zeros((112, 112, 4), np.uint8),
        np.zeros((0, 112, 3), np.uint8),
        np.zeros((2, 900, 3), np.uint8),
    ],
    ids=["floats", "grey", "four channels", "empty", "a line"],
)
def test_pixels_that_are_no_picture_change_nothing(model, pixels):
    watched = Stream(model)
    before = watched.memory
    with pytest.raises(ValueError, match="frame|picture"):
        watched.observe(pixels)
    assert same(watched.memory, before) and watched.time is None


def test_a_refused_first_frame_does_not_set_the_size(plain, monkeypatch, tmp_path):
    watching(plain, 2).save(tmp_path / "memory")
    tape, watched = Tape(monkeypatch, plain), Stream.load(tmp_path / "memory", plain)
    with pytest.raises(TimeError):
        watched.observe(pictures(1, 0, 56, 112)[0], 0.0)
    watched.observe(pictures(1)[0], 2.0)
    assert tape.grids == [(8, 8)]


def test_a_memory_of_several_rows_is_no_stream(model):
    memory = stream.begin(model, 2)
    with pytest.raises(ValueError, match="has one row, this one 2"):
        Stream(model, memory)
    assert Stream(model, memory.rows(torch.tensor([1]))).tokens == len(model.processor.chat.head)


# -- two futures, two streams, two threads ----------------------------------------------------------------------------


def test_a_fork_has_the_same_past_and_a_future_of_its_own(model):
    watched = watching(model, 5)
    before, twin = watched.memory, watched.fork()
    assert same(twin.memory, before)
    for picture in pictures(3, 8):
        twin.observe(picture)
    twin.ask(QUESTION, at_most=2, keep=True)
    assert same(watched.memory, before) and twin.frames == 8
    for picture in pictures(3, 8):
        watched.observe(picture)
    watched.ask(QUESTION, at_most=2, keep=True)
    assert same(watched.memory, twin.memory)


def test_a_refreshed_stream_goes_on_from_a_faded_memory(model):
    watched = watching(model, 5)
    right, twin = watched.memory.refresh(0.5), watched.fork()
    watched.refresh(0.5)
    assert same(watched.memory, right) and not same(twin.memory, right)
    by_hand = Stream(model, right)
    for each in (watched, by_hand):
        each.observe(pictures(1, 8)[0], 9.0)
    assert same(watched.memory, by_hand.memory)
    with pytest.raises(ValueError, match="from 0 to 1, got 1.5"):
        watched.refresh(1.5)


def test_two_interleaved_streams_equal_each_alone(model):
    one, two = Stream(model), Stream(model)
    for second in range(18):
        one.observe(pictures(18, 1)[second], float(second))
        if second % 3:
            two.observe(pictures(18, 2)[second], 2.0 * second)
        if second % 5 == 0:
            one.ask(QUESTION, at_most=2)
    assert same(one.memory, watching(model, 18, 1).memory)
    alone = Stream(model)
    for second in range(18):
        if second % 3:
            alone.observe(pictures(18, 2)[second], 2.0 * second)
    assert same(two.memory, alone.memory)


def in_threads(*works) -> None:
    """Runs functions at once; fails where one raises or does not end."""
    wrong: list[BaseException] = []

    def guarded(work) -> None:
        try:
            work()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    assert not wrong, wrong


def waiting(turns: Turns, count: int) -> None:
    """Until `count` have queued, the one that has the lock included."""
    for _ in range(5000):
        if len(turns._queue) == count:
            return
        threading.Event().wait(0.002)
    raise AssertionError(f"{len(turns._queue)} queued, not {count}")


def test_turns_are_taken_first_come_first_served():
    turns, order = Turns(), []

    def take(name: str) -> None:
        with turns:
            order.append(name)

    threads = [threading.Thread(target=take, args=(name,), daemon=True) for name in "abc"]
    with turns:
        for place, thread in enumerate(threads):
            thread.start()
            waiting(turns, place + 2)
    take("back at once")  # who has just had the lock goes behind those who waited
    for thread in threads:
        thread.join(timeout=10)
    assert order == ["a", "b", "c", "back at once"]


def test_who_leaves_the_queue_keeps_nobody_waiting(monkeypatch):
    turns = Turns()
    with turns:
        with monkeypatch.context() as patched:
            patched.setattr(turns._changed, "wait_for", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt), turns:
                pass
        assert len(turns._queue) == 1
    with turns:
        assert len(turns._queue) == 1


def test_a_camera_and_two_users_in_threads(model):
    """Each answer is about exactly the frames whose observe had returned when the question took its clone."""
    shown = pictures(24, 3)
    alone, right = Stream(model), {}
    for second, picture in enumerate(shown):
        alone.observe(picture, float(second))
        right[float(second)] = alone.ask(QUESTION, at_most=3).text
    assert len(set(right.values())) > 5

    watched, begun, done, told = Stream(model), [0], [0], []
    watched.observe(shown[0], 0.0)
    begun[0] = done[0] = 1

    def camera() -> None:
        for second, picture in enumerate(shown[1:], 1):
            begun[0] = second + 1
            watched.observe(picture, float(second))
            done[0] = second + 1

    def user() -> None:
        while done[0] < len(shown):
            least = done[0]
            said = watched.ask(QUESTION, at_most=3)
            told.append((least, said, begun[0]))

    in_threads(camera, user, user)
    for least, said, most in told:
        assert least <= said.time + 1 <= most and said.text == right[said.time]
    assert len({said.time for _, said, _ in told}) > 2 and same(watched.memory, alone.memory)


def test_a_kept_answer_makes_frames_wait(plain):
    """Whatever the order, the memory is that of some order: no frame is lost, none falls into an answer."""
    watched, before = Stream(plain), []
    keep = Stream.ask

    def camera() -> None:
        for second, picture in enumerate(pictures(12)):
            watched.observe(picture, float(second))

    def user() -> None:
        for _ in range(3):
            before.append(keep(watched, QUESTION, at_most=3, keep=True).time)

    in_threads(camera, user)
    alone, times = Stream(plain), iter(before)
    following = next(times)
    for second, picture in enumerate([None, *pictures(12)], -1):
        if picture is not None:
            alone.observe(picture, float(second))
        while following == (None if second < 0 else float(second)):
            alone.ask(QUESTION, at_most=3, keep=True)
            following = next(times, "no more")
    assert same(watched.memory, alone.memory)


# -- saved, and recorded ----------------------------------------------------------------------------------------------


def test_a_saved_stream_goes_on_as_if_nothing_had_happened(model, tmp_path):
    watched = watching(model, 18)
    watched.save(tmp_path / "memory")
    again = Stream.load(tmp_path / "memory", model)
    assert same(again.memory, watched.memory)
    assert (again.time, again.frames, again.tokens) == (17.0, 18, watched.tokens)
    for each in (watched, again):
        for picture in pictures(4, 6):
            each.observe(picture)
    assert same(again.memory, watched.memory) and again.time == 21.0


CONTINUE = """
import json, sys
import numpy, torch
import infinitevl
torch.set_num_threads(1)
folder = sys.argv[1]
model = infinitevl.load(folder + "/checkpoint")
stream = infinitevl.Stream.load(folder + "/memory", model)
for second, picture in enumerate(numpy.load(folder + "/pictures.npy"), 18):
    stream.observe(picture, float(second))
said = [stream.ask(sys.argv[2], at_most=12).text, stream.frames, stream.tokens, stream.time, stream.nbytes]
stream.save(folder + "/after")
print(json.dumps(said))
"""


def test_a_stream_goes_on_in_another_process(model, tmp_path):
    weights.save(model, tmp_path / "checkpoint")
    watched, later = watching(model, 18), pictures(6, 4)
    watched.save(tmp_path / "memory")
    np.save(tmp_path / "pictures.npy", later)
    for second, picture in enumerate(later, 18):
        watched.observe(picture, float(second))
    words = [sys.executable, "-c", CONTINUE, str(tmp_path), QUESTION]
    root = Path(stream.__file__).parents[1]
    done = subprocess.run(words, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    said = watched.ask(QUESTION, at_most=12).text
    assert json.loads(done.stdout) == [said, 24, watched.tokens, 23.0, watched.nbytes]
    after = Stream.load(tmp_path / "after", model)
    for (name, got), (_, right) in zip(after.memory.named(), watched.memory.named(), strict=True):
        assert torch.allclose(got.double(), right.double(), atol=1e-5, equal_nan=True), name


def fed(model: Model, step, count: int) -> Iterator[Memory]:
    """The memories of a stream whose frames go through `step`, with stamps between them as `observe` feeds them."""
    memory, last = stream.begin(model), None
    for number, picture in enumerate(torch.from_numpy(pictures(count))):
        now = number * 0.9
        stamp = model.processor.stamp_due(last, now)
        if stamp is not None:
            _, memory = feed(model, memory, model.processor.stamp_ids(stamp))
        memory = step(memory, picture[None], torch.tensor([now], dtype=torch.float64))
        last = now
        yield memory


@torch.no_grad()
def test_a_recorded_frame_step_replays_through_three_windows(model):
    """Recorded once, on a memory before its first frame; no number of that moment may be in the record."""
    model = made(model.processor, window=100)
    count = 3 * model.config.text.window // FRAME

    def step(memory: Memory, pixels: torch.Tensor, time: torch.Tensor) -> Memory:
        return stream.frame_step(model, memory, pixels, time)

    recorded = make_fx(step)(stream.begin(model), torch.from_numpy(pictures(1, 9)), torch.zeros(1).double())
    for eager, replayed in zip(fed(model, step, count), fed(model, recorded, count), strict=True):
        for (name, right), (_, got) in zip(eager.named(), replayed.named(), strict=True):
            assert torch.allclose(got.double(), right.double(), atol=1e-5, equal_nan=True), name
    assert int(replayed.seen) > 3 * model.config.text.window and int(replayed.frames) == count


@torch.no_grad()
def test_frames_fed_step_by_step_equal_those_observed(model):
    *_, memory = fed(model, lambda *rest: stream.frame_step(model, *rest), 9)
    watched = Stream(model)
    for number, picture in enumerate(pictures(9)):
        watched.observe(picture, number * 0.9)
    assert same(memory, watched.memory)
