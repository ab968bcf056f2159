"""Follow a frame: `watch` takes it from a source into a stream, asks what is due, and tells what happened.

One loop for every source. What it has to say are events (`Started`, `Seen`, ...), told to whoever shows them.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np

from infinitevl import report
from infinitevl.config import DELTA
from infinitevl.memory import MemoryFileError
from infinitevl.model import Model
from infinitevl.processor import fit_frame
from infinitevl.report import Curve, Moment, Point, shown
from infinitevl.stream import Stream
from infinitevl.video import Frame, Source, VideoError, frames

CARDS = 16  # questions in a report: the latest ones
RECENT = 64  # frames of the recent latency
_CLOCK = re.compile(r"\s*(?:(\d+):)?(\d+):([0-5]\d(?:\.\d+)?)\s*:\s+(.*)", re.DOTALL)
_SECONDS = re.compile(r"\s*(\d+(?:\.\d+)?)(?:\s*s\s*:|\s*:\s)\s*(.*)", re.DOTALL)
_END = re.compile(r"\s*end\s*:\s*(.*)", re.DOTALL | re.IGNORECASE)


class InputError(ValueError):
    """Something asked for that cannot be done; the message says what and why."""


@dataclass(frozen=True)
class Question:
    """A question, and the stream's time in seconds right after whose frame it is asked; None: at the end."""

    text: str
    at: float | None = None

    @classmethod
    def parse(cls, words: str) -> Question:
        """ "12s: ...", "0:12: ...", "1:00:12: ...", "end: ..." or a question alone. InputError where it is empty."""
        if clock := _CLOCK.fullmatch(words):
            question = cls(clock[4].strip(), int(clock[1] or 0) * 3600 + int(clock[2]) * 60 + float(clock[3]))
        elif seconds := _SECONDS.fullmatch(words):
            question = cls(seconds[2].strip(), float(seconds[1]))
        else:
            end = _END.fullmatch(words)
            question = cls((end[1] if end else words).strip())
        if not question.text:
            raise InputError(f"{words!r} asks nothing: write the question after its time, as in '12s: what is it?'")
        return question


@dataclass(frozen=True)
class Settings:
    """What to watch and what to do about it.

    source, fps   as `video.frames` takes them; fps None: the checkpoint's own
    asked         questions with their times; at_most: tokens of an answer
    interactive   also read questions from standard input, a line each, while the stream goes on; a recording is then
                  shown at its own pace instead of as fast as it can be read
    resume, save  memory files to begin from and to leave behind
    report        a picture of it all, see `report.draw`
    eager         run each step unrecorded, which matters on CUDA only
    refresh_every after so many frames of the stream, always again, `Stream.refresh(keep)`; None: never
    """

    source: str
    asked: tuple[Question, ...] = ()
    interactive: bool = False
    fps: float | None = None
    save: Path | None = None
    resume: Path | None = None
    report: Path | None = None
    at_most: int = 64
    eager: bool = False
    refresh_every: int | None = None
    keep: float = 0.0

    def __post_init__(self) -> None:
        if self.interactive and self.source == "-":
            raise InputError("--interactive reads questions from standard input, so the source cannot be '-'")
        if (self.refresh_every is not None and self.refresh_every < 1) or not 0 <= self.keep <= 1:
            raise InputError(f"refreshed every {self.refresh_every} frames to {self.keep}: 1 or more, and 0 to 1")
        if self.report is not None:
            report.check(self.report)
        for path in filter(None, (self.save, self.report)):
            check_place(path)


def check_place(path: Path) -> None:
    """InputError where no file can be written: to be called before hours of work, not after."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{path}: nothing can be written there; give a file in a folder that exists")


# What happens. Times are seconds of the stream, None before its first frame; ms_per_frame is the median of what it took
# to put a frame into the memory, ..._recent that of the latest frames.


@dataclass(frozen=True)
class Started:
    source: str
    live: bool
    seconds: float | None
    frames_per_second: float
    device: str
    dtype: str
    memory_bytes: int
    resumed_at: float | None
    interactive: bool


@dataclass(frozen=True)
class Seen:
    """A frame went into the memory. frames: all of the stream's; rate: of this watch, a second of real time."""

    time: float
    frames: int
    tokens: int
    memory_bytes: int
    ms: float
    rate: float
    dropped: int


@dataclass(frozen=True)
class Answered:
    """wanted: the time it was to be asked at, None for the end or as soon as typed; time: the stream's time it was."""

    question: str
    answer: str
    time: float | None
    wanted: float | None
    tokens: int
    memory_bytes: int
    ms_per_frame: float | None
    ms_per_frame_recent: float | None
    answer_tokens: int
    answer_seconds: float


@dataclass(frozen=True)
class Warned:
    message: str


@dataclass(frozen=True)
class Ended:
    """reason: "end" of the source, "broken" (it broke off) or "interrupted"; saved, report: files written."""

    reason: str
    time: float | None
    frames: int
    tokens: int
    memory_bytes: int
    ms_per_frame: float | None
    ms_per_frame_recent: float | None
    rate: float
    dropped: int
    saved: str | None
    report: str | None


Event = Started | Seen | Answered | Warned | Ended
Tell = Callable[[Event], None]


def watch(model: Model, settings: Settings, tell: Tell) -> Ended:
    """Watch a source to its end, ask what is to be asked, and write what is to be left behind.

    Ctrl-C and SIGTERM end it cleanly: the frame or answer under way is finished, questions for the end are asked,
    files are written. A second one gives up the answers. Raises VideoError where no frame could be decoded, InputError,
    MemoryFileError. Must run in the main thread, where signals arrive.
    """
    if settings.refresh_every is not None and DELTA not in model.config.text.layers:
        raise InputError("this checkpoint has no delta layers: there is nothing that could be refreshed")
    stream = _stream(model, settings.resume, settings.eager)
    rate = model.processor.config.frames_per_second if settings.fps is None else settings.fps
    with _Stop() as stop, _opened(settings.source, rate, stop) as source:
        return _Watch(stream, source, settings, tell, rate).run(stop)


def _opened(source: str, rate: float, stop: _Stop) -> Source:
    """The source; Ctrl-C while it is waited for is a KeyboardInterrupt."""
    with stop.waiting():
        return frames(source, fps=rate)


def _stream(model: Model, resume: Path | None, eager: bool) -> Stream:
    if model.config.text.window is None:
        raise InputError("this checkpoint has no window and keeps every token: a stream needs a memory of fixed size")
    if resume is None:
        return Stream(model, eager=eager)
    try:
        return Stream.load(resume, model, eager=eager)
    except MemoryFileError:
        raise
    except OSError as error:
        raise MemoryFileError(f"{resume}: {(error.strerror or str(error)).lower()}; check the path") from error
    except ValueError as error:  # a memory of several streams
        raise MemoryFileError(f"{resume}: {error}") from error


class _Stop:
    """Ctrl-C and SIGTERM, heard between frames: waiting for a frame is broken off, work on one is not.

    Within its block the signals are its own; a second one is a KeyboardInterrupt wherever it arrives.
    """

    def __init__(self) -> None:
        self.heard = False
        self._waits = False

    def __enter__(self) -> _Stop:
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again, self.heard = self.heard, True
        if again or self._waits:
            raise KeyboardInterrupt

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that a signal ends with KeyboardInterrupt, also one that came before it."""
        self._waits = True
        try:
            if self.heard:
                raise KeyboardInterrupt
            yield
        finally:
            self._waits = False

    def frames(self, source: Source, paced: bool) -> Iterator[Frame]:
        """The source's frames until a signal; paced: not before their time has come."""
        began = time.monotonic()
        while True:
            try:
                with self.waiting():
                    frame = next(source, None)
                    if paced and frame is not None:
                        time.sleep(max(0.0, began + frame.time - time.monotonic()))
            except KeyboardInterrupt:
                return
            if frame is None:
                return
            yield frame


class _Watch:
    """A stream, the source that feeds it, and what is still to be asked."""

    def __init__(self, stream: Stream, source: Source, settings: Settings, tell: Tell, rate: float) -> None:
        self.stream, self.source, self.settings, self._tell = stream, source, settings, tell
        resumed = stream.time
        self._rate, self._resumed = rate, resumed
        self._shift = 0.0 if resumed is None else resumed + 1 / rate  # the source follows what is remembered
        timed = [(question.at, question) for question in settings.asked if question.at is not None]
        self._due = deque(sorted(timed, key=lambda pair: pair[0]))
        self._last = [question for question in settings.asked if question.at is None]
        self._fed, self._began = 0, time.monotonic()
        self._picture: np.ndarray | None = None
        self._curve, self._recent = Curve(), deque[float](maxlen=RECENT)
        self._moments = deque[Moment](maxlen=CARDS)
        self._over = False
        self._mouth, self._hand, self._turn = threading.Lock(), threading.Lock(), threading.Lock()

    def run(self, stop: _Stop) -> Ended:
        self._start()
        talk = threading.Thread(target=self._converse, name="questions", daemon=True)
        if self.settings.interactive:
            talk.start()
        try:
            reason = self._feed(stop)
            if self.settings.interactive and not stop.heard:
                self._outlast(talk, stop)
        except KeyboardInterrupt:  # the second
            self._last.clear()
        return self._finish("interrupted" if stop.heard else reason)

    def tell(self, event: Event) -> None:
        """One event at a time, whichever thread it comes from."""
        with self._mouth:
            self._tell(event)

    def _start(self) -> None:
        model = self.stream.model
        self.tell(
            Started(
                source=self.source.name,
                live=self.source.live,
                seconds=self.source.duration,
                frames_per_second=self._rate,
                device=str(model.device),
                dtype=str(model.dtype).removeprefix("torch."),
                memory_bytes=self.stream.nbytes,
                resumed_at=self._resumed,
                interactive=self.settings.interactive,
            )
        )
        if model.processor.config.stamp_seconds is None:
            self.tell(Warned("this checkpoint has no time stamps: its answers to 'when' are unsupported"))

    # Frames

    def _feed(self, stop: _Stop) -> str:
        """All frames into the stream, questions in between; why it ended. VideoError where there were none."""
        paced = self.settings.interactive and not self.source.live
        try:
            for frame in stop.frames(self.source, paced):
                self._take(Frame(frame.time + self._shift, frame.pixels))
        except VideoError as error:
            if not self._fed:
                raise
            self.tell(Warned(str(error)))
            return "broken"
        if not self._fed and not stop.heard:
            raise VideoError(f"{self.source.name}: it ended before its first picture; check that it is sending")
        return "end"

    def _take(self, frame: Frame) -> None:
        if not self._fed:
            self._check_shape(frame)
        while self._due and self.stream.time is not None and self._due[0][0] < frame.time:
            self._ask_due(*self._due.popleft())
        began = time.perf_counter()
        with self._hand:
            self.stream.observe(frame)
            if self.settings.refresh_every is not None and self.stream.frames % self.settings.refresh_every == 0:
                self.stream.refresh(self.settings.keep)
            self._picture, tokens = frame.pixels, self.stream.tokens  # a number: the device has finished
        self._seen(frame.time, tokens, (time.perf_counter() - began) * 1000)

    def _seen(self, at: float, tokens: int, spent: float) -> None:
        self._fed += 1
        self._recent.append(spent)
        self._curve.add(Point(at, spent, self.stream.nbytes))
        self.tell(
            Seen(
                time=at,
                frames=self.stream.frames,
                tokens=tokens,
                memory_bytes=self.stream.nbytes,
                ms=round(spent, 3),
                rate=self._pace(),
                dropped=self.source.dropped,
            )
        )

    def _pace(self) -> float:
        """Frames a second of real time, so far."""
        return round(self._fed / (time.monotonic() - self._began), 2)

    def _check_shape(self, frame: Frame) -> None:
        try:
            fit_frame(frame.pixels.shape[0], frame.pixels.shape[1], self.stream.model.processor.config)
        except ValueError as error:
            raise InputError(f"{self.source.name}: {error}") from error

    # Questions

    def _ask_due(self, wanted: float, question: Question) -> None:
        """Ask a question whose time has come; say so where that was before what the memory began with."""
        if self._resumed is not None and wanted < self._resumed:
            now = shown(self._resumed)
            self.tell(Warned(f"{question.text!r} was meant for {shown(wanted)}; the memory is already at {now}"))
        self._ask(question)

    def _ask(self, question: Question) -> None:
        """One question at a time, about one moment: what is remembered and what is in view belong together."""
        with self._turn:
            if self._over:
                return
            with self._hand:
                picture, tokens = self._picture, self.stream.tokens
                answering = self.stream.asking(question.text, self.settings.at_most)
            answer = answering()
            if picture is not None and answer.time is not None and self.settings.report:
                self._moments.append(Moment(answer.time, report.key_frame(picture), question.text, answer.text))
            self.tell(
                Answered(
                    question=question.text,
                    answer=answer.text,
                    time=answer.time,
                    wanted=question.at,
                    tokens=tokens,
                    memory_bytes=self.stream.nbytes,
                    ms_per_frame=_median(point.milliseconds for point in self._curve.points),
                    ms_per_frame_recent=_median(self._recent),
                    answer_tokens=answer.tokens,
                    answer_seconds=round(answer.seconds, 3),
                )
            )

    def _converse(self) -> None:
        """Ask what is typed, a line each. Unbuffered: the interpreter could not end while a buffer's lock is held."""
        with open(0, "rb", buffering=0, closefd=False) as lines:
            for line in lines:
                text = line.decode(errors="replace").strip()
                try:
                    if text:
                        self._ask(Question(text))
                except Exception as error:  # one question's trouble must not end the stream
                    self.tell(Warned(f"{text!r} could not be answered: {' '.join(str(error).split())}"))

    def _outlast(self, talk: threading.Thread, stop: _Stop) -> None:
        """The stream has ended; questions about it may still be typed."""
        try:
            with stop.waiting():
                talk.join()
        except KeyboardInterrupt:
            return

    # The end

    def _finish(self, reason: str) -> Ended:
        try:
            self._ask_rest(reason)
        except KeyboardInterrupt:  # the second: the answers are given up, the files are not
            reason = "interrupted"
        with self._turn:
            self._over = True
        ended = self._ended(reason)
        if self.settings.save is not None:
            self.stream.save(self.settings.save)
        if self.settings.report is not None:
            report.draw(self.settings.report, self._title(), self._moments, self._curve.points)
        self.tell(ended)
        return ended

    def _ended(self, reason: str) -> Ended:
        save, drawn = self.settings.save, self.settings.report
        return Ended(
            reason=reason,
            time=self.stream.time,
            frames=self.stream.frames,
            tokens=self.stream.tokens,
            memory_bytes=self.stream.nbytes,
            ms_per_frame=_median(point.milliseconds for point in self._curve.points),
            ms_per_frame_recent=_median(self._recent),
            rate=self._pace(),
            dropped=self.source.dropped,
            saved=None if save is None else str(save),
            report=None if drawn is None else str(drawn),
        )

    def _ask_rest(self, reason: str) -> None:
        now = self.stream.time
        if now is None:
            return
        if self._due and reason == "interrupted":
            self.tell(Warned(f"{len(self._due)} questions for later than {shown(now)} were not asked"))
            self._due.clear()
        for wanted, question in self._due:
            if wanted >= now + 1 / self._rate:
                self.tell(Warned(f"{question.text!r} was meant for {shown(wanted)}; the source ended before"))
            self._ask(question)
        for question in self._last:
            self._ask(question)

    def _title(self) -> str:
        name = Path(self.source.name).name or self.source.name
        return f"{name}: {self.stream.frames:,} frames, {self.stream.tokens:,} tokens, one memory of fixed size"


def _median(milliseconds: Iterable[float]) -> float | None:
    numbers = list(milliseconds)
    return round(statistics.median(numbers), 3) if numbers else None
