"""infinitevl watch: what is asked when, what it leaves behind, and how it ends."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from infinitevl import cli
from infinitevl.config import SOFTMAX
from infinitevl.display import display
from infinitevl.model import Model
from infinitevl.stream import Stream
from infinitevl.video import frames
from infinitevl.watch import (
    Answered,
    Ended,
    Event,
    InputError,
    Question,
    Seen,
    Settings,
    Started,
    Warned,
    _Stop,
    _Watch,
    watch,
)

from .conftest import PATIENCE, album, film


def events(model: Model, source: Path, *asked: Question, **settings: object) -> list[Event]:
    told: list[Event] = []
    settings = {"at_most": 4, "fps": 1, **settings}
    ended = watch(model, Settings(str(source), asked, **settings), told.append)
    assert told[-1] is ended
    return told


def only(kind: type, told: list[Event]) -> list:
    return [event for event in told if isinstance(event, kind)]


# Questions


@pytest.mark.parametrize(
    ("words", "text", "at"),
    [
        ("12s: what does the sign say?", "what does the sign say?", 12.0),
        ("2.5s: what?", "what?", 2.5),
        ("12 s:what?", "what?", 12.0),
        ("12: what?", "what?", 12.0),
        ("0:12: what?", "what?", 12.0),
        ("61:07: what?", "what?", 3667.0),
        ("1:02:03: what?", "what?", 3723.0),
        ("end: what?", "what?", None),
        ("what: now?", "what: now?", None),
        ("12:30 was what?", "12:30 was what?", None),
        ("  what?  ", "what?", None),
    ],
)
def test_question_is_read(words: str, text: str, at: float | None) -> None:
    assert Question.parse(words) == Question(text, at)


@pytest.mark.parametrize("words", ["", "12s:", "0:12: ", "end:  "])
def test_empty_question_is_refused(words: str) -> None:
    with pytest.raises(InputError, match="asks nothing"):
        Question.parse(words)


def test_questions_come_right_after_the_last_frame_of_their_time(model: Model, clip: Path) -> None:
    wanted = [0.0, 3.0, 2.5, 6.999]
    told = events(model, clip, *(Question(f"at {at}?", at) for at in wanted), Question("at last?"))
    assert [(said.wanted, said.time) for said in only(Answered, told)] == [
        (0.0, 0.0),
        (2.5, 2.0),
        (3.0, 3.0),
        (6.999, 6.0),
        (None, 7.0),
    ]
    assert not only(Warned, told)
    for place, event in enumerate(told):
        if isinstance(event, Answered):
            seen = [each for each in told[:place] if isinstance(each, Seen)][-1]
            assert (event.time, event.tokens, event.memory_bytes) == (seen.time, seen.tokens, seen.memory_bytes)


def test_answers_are_those_of_a_stream_by_hand(model: Model, clip: Path) -> None:
    asked = [Question("what is it?", 2.0), Question("and now?", 5.0), Question("at last?")]
    stream, said = Stream(model), []
    for frame in frames(clip, fps=1):
        stream.observe(frame)
        said += [stream.ask(question.text, 4).text for question in asked if question.at == frame.time]
    said.append(stream.ask("at last?", 4).text)
    told = events(model, clip, *asked)
    assert [event.answer for event in only(Answered, told)] == said
    assert len(set(said)) > 1  # the model tells its streams apart
    ended = told[-1]
    assert (ended.frames, ended.tokens, ended.time) == (stream.frames, stream.tokens, stream.time)


def test_question_beyond_the_end_is_asked_there_with_a_note(model: Model, clip: Path) -> None:
    told = events(model, clip, Question("late?", 100.0), Question("just after?", 7.5))
    assert [(said.question, said.time) for said in only(Answered, told)] == [("just after?", 7.0), ("late?", 7.0)]
    (note,) = only(Warned, told)
    assert "'late?' was meant for 1:40" in note.message


def test_memory_is_one_number(model: Model, clip: Path) -> None:
    told = events(model, clip, Question("what?", 4.0), fps=8)
    assert len(only(Seen, told)) == 8 * 8 - 3  # the last picture begins at 7.5 s
    assert {event.memory_bytes for event in told if not isinstance(event, Warned)} == {Stream(model).nbytes}
    assert told[-1].tokens > model.config.text.window  # the window was overflown


def test_checkpoint_without_stamps_says_so_once(checkpoint: Path, clip: Path, tmp_path: Path, run: Callable) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in checkpoint.iterdir():
        (plain / file.name).symlink_to(file)
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    (plain / "preprocessor_config.json").unlink()
    (plain / "preprocessor_config.json").write_text(json.dumps({**settings, "stamp_seconds": None}))
    said = run("watch", clip, "--model", plain, "--ask", "2s: when?", "--ask", "when?", "--at-most", 2, "--json")
    assert said.code == 0
    assert [event["message"] for event in said.told("warning")] == [
        "this checkpoint has no time stamps: its answers to 'when' are unsupported"
    ]


# Saving and going on


def test_save_and_resume_equal_one_run(checkpoint: Path, tmp_path: Path, run: Callable) -> None:
    whole = album(tmp_path / "whole", range(20))  # more than a window
    first, second = album(tmp_path / "first", range(7)), album(tmp_path / "second", range(7, 20))
    ask = ("--ask", "16s: what?", "--ask", "and?", "--at-most", 4, "--json", "--model", checkpoint)
    once = run("watch", whole, *ask, "--save", tmp_path / "once")
    run("watch", first, "--model", checkpoint, "--save", tmp_path / "part")
    twice = run("watch", second, *ask, "--resume", tmp_path / "part", "--save", tmp_path / "twice")
    assert once.code == twice.code == 0
    assert twice.told("start")[0]["resumed_at"] == 6.0
    keys = ("question", "answer", "time", "tokens")
    assert [[said[key] for key in keys] for said in once.told("answer")] == [
        [said[key] for key in keys] for said in twice.told("answer")
    ]
    assert [said["time"] for said in twice.told("answer")] == [16.0, 19.0]
    one, other = load_file(tmp_path / "once"), load_file(tmp_path / "twice")
    assert one.keys() == other.keys()
    assert all(one[name].numpy().tobytes() == other[name].numpy().tobytes() for name in one)
    assert twice.told("end")[0]["saved"] == str(tmp_path / "twice")


def test_refreshes_count_frames_of_the_stream(model: Model, checkpoint: Path, tmp_path: Path, run: Callable) -> None:
    """Not those of a run: what is resumed fades when the whole would have."""
    whole = album(tmp_path / "whole", range(7))
    first, second = album(tmp_path / "first", range(4)), album(tmp_path / "second", range(4, 7))
    fading = ("--model", checkpoint, "--refresh-every", 3, "--keep", 0.5)
    codes = [run("watch", whole, *fading, "--save", tmp_path / "once").code]
    codes.append(run("watch", first, *fading, "--save", tmp_path / "part").code)
    codes.append(run("watch", second, *fading, "--resume", tmp_path / "part", "--save", tmp_path / "twice").code)
    by_hand = Stream(model)
    for number, frame in enumerate(frames(whole, fps=1), 1):
        by_hand.observe(frame)
        if number in (3, 6):
            by_hand.refresh(0.5)
    by_hand.save(tmp_path / "by_hand")
    once, twice, right = (load_file(tmp_path / name) for name in ("once", "twice", "by_hand"))
    assert codes == [0, 0, 0] and once.keys() == twice.keys() == right.keys()
    for name, leaf in right.items():
        assert once[name].numpy().tobytes() == twice[name].numpy().tobytes() == leaf.numpy().tobytes(), name


def test_refreshes_that_cannot_be_are_refused(model: Model, clip: Path, run: Callable) -> None:
    """Before anything is watched."""
    refused = run("watch", clip, "--keep", 0.5)
    assert refused.code == 2 and "give both" in refused.err
    for wrong in ({"refresh_every": 0}, {"refresh_every": 5, "keep": 1.5}):
        with pytest.raises(InputError, match="1 or more, and 0 to 1"):
            Settings(str(clip), **wrong)
    shape = replace(model.config.text, layers=(SOFTMAX,) * 4)
    softmax = Model(replace(model.config, text=shape), model.processor)
    with pytest.raises(InputError, match="no delta layers"):
        watch(softmax, Settings(str(clip), refresh_every=5), lambda event: None)


def test_question_about_before_the_resumed_memory_gets_a_note(model: Model, clip: Path, tmp_path: Path) -> None:
    events(model, clip, save=tmp_path / "memory")
    told = events(model, clip, Question("early?", 2.0), resume=tmp_path / "memory")
    (said,) = only(Answered, told)
    assert (said.time, said.ms_per_frame) == (7.0, None)  # before the first new frame
    assert "'early?' was meant for 0:02; the memory is already at 0:07" in only(Warned, told)[0].message
    assert [event.time for event in only(Seen, told)] == [8.0 + second for second in range(8)]


def test_report_is_a_picture(checkpoint: Path, clip: Path, tmp_path: Path, run: Callable) -> None:
    report = tmp_path / "report.png"
    said = run("watch", clip, "--model", checkpoint, "--ask", "2s: what?", "--report", report, "--at-most", 3)
    assert said.code == 0 and f"report drawn to {report}" in said.out
    with Image.open(report) as image:
        assert image.format == "PNG" and image.width > 1000 and image.height > 500


# What is shown


def test_lines_in_a_pipe(checkpoint: Path, clip: Path, run: Callable) -> None:
    said = run("watch", clip, "--model", checkpoint, "--ask", "0:03: what?", "--at-most", 3)
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0].startswith(f"watching {clip} (0:08), 1 fps, on ")
    assert "[0:03] what?" in lines
    assert lines[lines.index("[0:03] what?") + 1].startswith("    -> ")
    assert lines[-1].startswith("end of the source at 0:07: 8 frames, ")
    assert "\x1b" not in said.out


def test_json_has_one_object_a_line(checkpoint: Path, clip: Path, run: Callable) -> None:
    said = run("watch", clip, "--model", checkpoint, "--ask", "3s: what?", "--json", "--at-most", 3)
    assert said.code == 0
    assert [event["event"] for event in said.events if event["event"] != "frame"] == ["start", "answer", "end"]
    (answer,) = said.told("answer")
    assert (answer["question"], answer["time"], answer["wanted"]) == ("what?", 3.0, 3.0)
    assert answer["ms_per_frame"] > 0 and answer["tokens"] > 4 * 16
    (end,) = said.told("end")
    assert (end["reason"], end["frames"], end["dropped"]) == ("end", 8, 0)


def seen(second: int) -> Seen:
    return Seen(time=float(second), frames=second + 1, tokens=16, memory_bytes=1000, ms=2.0, rate=3.0, dropped=4)


def test_frames_are_shown_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    for every, lines in ((0.0, 3), (60.0, 0)):
        with display(as_json=True, every=every) as tell:
            for second in range(3):
                tell(seen(second))
        assert len(capsys.readouterr().out.splitlines()) == lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    for name, value in (("TERM", "xterm"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)
    with display() as tell:
        tell(Started("film", False, 9.0, 1.0, "cpu", "float32", 1000, None, False))
        tell(seen(5))
        tell(Answered("what?", "a \x1b[31mred\nthing", 5.0, None, 16, 1000, 2.0, 2.0, 3, 0.1))
    shown = sys.stdout.getvalue()
    assert "\x1b[?25l" in shown and "memory 1,000 bytes, dropped 4" in shown and "3.0 a second" in shown
    assert "    -> a ?[31mred thing\n" in shown  # an answer cannot steer the terminal


# Ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_it_cleanly(model: Model, clip: Path, tmp_path: Path, number: int) -> None:
    told: list[Event] = []

    def tell(event: Event) -> None:
        told.append(event)
        if isinstance(event, Seen) and event.time == 2.0:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    asked = (Question("later?", 6.0), Question("at last?"))
    files = {"save": tmp_path / "memory", "report": tmp_path / "report.png"}
    ended = watch(model, Settings(str(clip), asked, fps=1, at_most=3, **files), tell)
    assert (ended.reason, ended.frames, ended.time) == ("interrupted", 3, 2.0)
    assert [said.question for said in only(Answered, told)] == ["at last?"]
    assert "1 questions for later than 0:02 were not asked" in only(Warned, told)[0].message
    assert Stream.load(files["save"], model).frames == 3 and files["report"].is_file()
    assert signal.getsignal(number) is before


def test_second_signal_gives_up_answers_but_not_files(model: Model, clip: Path, tmp_path: Path) -> None:
    told: list[Event] = []

    def tell(event: Event) -> None:
        told.append(event)
        if isinstance(event, Answered) or (isinstance(event, Seen) and event.time == 2.0):
            os.kill(os.getpid(), signal.SIGINT)

    asked = (Question("first?"), Question("second?"))
    ended = watch(model, Settings(str(clip), asked, fps=1, at_most=3, save=tmp_path / "memory"), tell)
    assert ended.reason == "interrupted" and len(only(Answered, told)) == 1
    assert Stream.load(tmp_path / "memory", model).frames == 3


def test_two_signals_at_once_leave_the_files(model: Model, clip: Path, tmp_path: Path) -> None:
    told: list[Event] = []

    def tell(event: Event) -> None:
        told.append(event)
        if isinstance(event, Seen) and event.time == 2.0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    ended = watch(model, Settings(str(clip), (Question("last?"),), fps=1, save=tmp_path / "memory"), tell)
    assert ended.reason == "interrupted" and only(Answered, told) == []
    assert Stream.load(tmp_path / "memory", model).frames == 3


def test_signal_breaks_off_a_wait() -> None:
    class Silent:
        def __next__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

        def __iter__(self) -> Silent:
            return self

    began = time.monotonic()
    with _Stop() as stop:
        assert list(stop.frames(Silent(), paced=False)) == []
        assert stop.heard
    assert time.monotonic() - began < 10


def test_control_c_in_a_process_of_its_own(started: Callable, checkpoint: Path, model: Model, tmp_path: Path) -> None:
    long = film(tmp_path / "long.mp4", 600, fps=1)
    memory, report = tmp_path / "memory", tmp_path / "report.png"
    words = ("watch", long, "--model", checkpoint, "--fps", 8, "--save", memory, "--report", report, "--json")
    process = started(*words)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["event"] == "start"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    end = json.loads(out.splitlines()[-1])
    assert (process.returncode, err, end["event"], end["reason"]) == (130, "", "end", "interrupted")
    assert Stream.load(memory, model).frames == end["frames"] < 600 and report.is_file()


def test_control_c_before_a_pipe_brings_anything(started: Callable, checkpoint: Path) -> None:
    process = started("watch", "-", "--model", checkpoint, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("#" * 16)
    process.stdin.flush()
    while _unread(process.stdin.fileno()):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)  # it waits for more
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE) == 130  # the pipe is still open
    assert process.communicate() == ("", "infinitevl: interrupted\n")


def _unread(pipe: int) -> int:
    """Bytes in a pipe that its reader has not taken yet."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_broken_file_is_watched_as_far_as_it_goes(
    checkpoint: Path, model: Model, tmp_path: Path, run: Callable
) -> None:
    whole = film(tmp_path / "whole.avi", 20).read_bytes()
    broken = tmp_path / "broken.avi"
    broken.write_bytes(whole[: len(whole) // 2])
    memory = tmp_path / "memory"
    said = run(
        "watch", broken, "--model", checkpoint, "--ask", "2s: a?", "--ask", "b?", "--save", memory, "--at-most", 2
    )
    assert said.code == cli.BROKEN_OFF == 5 and said.err == ""
    assert said.out.count("breaks off") == 1 and "[0:02] a?" in said.out and "] b?" in said.out
    assert 3 < Stream.load(memory, model).frames < 20


def test_typed_questions_are_answered_while_it_goes_on(started: Callable, checkpoint: Path, tmp_path: Path) -> None:
    words = (
        "watch",
        film(tmp_path / "short.mp4", 3),
        "--model",
        checkpoint,
        "--interactive",
        "--json",
        "--at-most",
        3,
        "--fps",
        2,
    )
    process = started(*words, "--ask", "1s: planned?", stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    assert json.loads(process.stdout.readline())["interactive"]
    process.stdin.write("typed?\n\n")
    process.stdin.flush()
    lines = [json.loads(process.stdout.readline()) for _ in range(2)]
    process.stdin.write("and at last?")  # the end of input ends the last line too
    out, err = process.communicate(timeout=PATIENCE)
    told = [*lines, *map(json.loads, out.splitlines())]
    said = [event["question"] for event in told if event["event"] == "answer"]
    assert (process.returncode, err) == (0, "")
    assert sorted(said) == ["and at last?", "planned?", "typed?"] and said[0] == "typed?"
    assert told[-1]["frames"] == 6 and told[-1]["rate"] < 4  # a recording keeps its own pace


def test_answer_is_about_the_moment_it_was_asked(model: Model, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where frames come in while it is being found."""
    told: list[Event] = []
    stream, source = Stream(model), frames(clip, fps=1)
    asker = _Watch(stream, source, Settings(str(clip), fps=1, at_most=2), told.append, 1.0)
    stream.observe(next(source))
    tokens, asking = stream.tokens, Stream.asking

    def slow(self: Stream, *words: object) -> object:
        answering = asking(self, *words)
        return lambda: stream.observe(next(source)) or answering()

    monkeypatch.setattr(Stream, "asking", slow)
    asker._ask(Question("what?"))
    (said,) = only(Answered, told)
    assert (said.time, said.tokens) == (0.0, tokens) and stream.time == 1.0


def test_real_footage_with_one_memory(shared: Path, model: Model) -> None:
    told = events(model, shared / "media" / "1.mp4", Question("what is there?", 5.0))
    assert isinstance(told[-1], Ended) and (told[-1].reason, told[-1].frames) == ("end", 10)
    assert len({event.memory_bytes for event in only(Seen, told)}) == 1
    assert [said.time for said in only(Answered, told)] == [5.0]
