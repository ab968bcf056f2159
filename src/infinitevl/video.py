"""source -> `video.frames` -> Frame(time, uint8): whatever shows pictures, as pictures with times at a constant rate.

Recordings (files, folders, pipes, downloads of known length) are read as fast as they are asked for and never lose a
frame. Live sources (cameras, rtsp, udp, tcp, endless http, running playlists) are read by a thread into a short queue:
a slow reader sees the newest pictures, and what was thrown away is counted.

The two rules of sampling:
recording  at the instants 0, 1/fps, 2/fps, ... up to the last picture: the newest picture at or before the instant
           (a gap repeats a picture). Instants and timestamps are exact fractions, so hours later nothing has drifted.
live       a picture as it arrives, at most fps a second, stamped with its arrival; nothing is ever repeated.
"""

from __future__ import annotations

import glob
import math
import os
import re
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.error import ExitError, FFmpegError, HTTPError, InvalidDataError
from av.sidedata.sidedata import SideData
from av.stream import Discard, Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps

PICTURES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
WEB = frozenset({"http", "https"})
LIVE = frozenset({"rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp"})
DROPS = ("oldest", "newest")

QUEUE = 8  # frames of a live source that wait for their reader: a third of a second at 24 a second
ROUNDING = Fraction(1, 1000)  # seconds: Matroska and FLV round their times to the millisecond
BACKWARD, FORWARD = Fraction(-1), Fraction(10)  # seconds: a jump of timestamps beyond these begins a new count
BEHIND, AHEAD = -1.0, 10.0  # seconds: the same for a running playlist against the wall clock
CUT_SHORT = (Fraction(1), Fraction(1, 20))  # seconds, share of the length: what may be missing at the end of a file
GENPTS = 0x0001  # FFmpeg's AVFMT_FLAG_GENPTS, which PyAV sets: in AVI it invents times in the wrong order
TS_DISCONT = 0x0200  # FFmpeg's AVFMT_TS_DISCONT: the clock of such a format may be set anew in the middle
USUAL_RATE = 25  # pictures a second of a stream that states neither times nor rate

Box = tuple[int, int]
T = TypeVar("T")


class VideoError(ValueError):
    """A source that cannot be read, or not to its end: one line that names it and says what to do.

    `frames` is how many pictures were decoded before; 0 means that nothing came out of it at all.
    """

    def __init__(self, message: str, frames: int = 0) -> None:
        super().__init__(message)
        self.frames = frames


class Frame(NamedTuple):
    """A picture with its time: seconds since the source began, and RGB pixels, uint8 [H, W, 3], the reader's own."""

    time: float
    pixels: np.ndarray


@dataclass(frozen=True)
class Reconnect:
    """How patient a live source is, in seconds; the default gives up after about a minute without a picture.

    After `attempts` connections in a row that failed or brought no picture the source ends with a VideoError. Attempt
    n (from 0) is made after `first` * 2^n, at most `longest`. A connection that stays silent for `silence` is lost;
    closing a silent source takes that long at most.
    """

    attempts: int = 8
    first: float = 0.5
    longest: float = 15.0
    silence: float = 10.0

    def wait(self, attempt: int) -> float:
        """Seconds before attempt `attempt`, counted from 0."""
        return min(self.first * 2 ** min(attempt, 32), self.longest)


PATIENT = Reconnect()


class Source:
    """Frames one after the other, in a `for` loop or by `next`; close it, or leave its `with` block, to end it early.

    name      what messages call it (a password in an address is hidden)
    duration  seconds, None where unknown
    live      True where it runs on by itself and can lose frames, False where it waits for its reader
    dropped   frames thrown away so far because the reader of a live source was too slow

    Iteration raises VideoError once, after the frames that could be decoded, and then stops.
    """

    def __init__(self, name: str, duration: float | None, feed: Iterator[Frame], held: _Video | _Live | None) -> None:
        self.name, self.duration = name, duration
        self._feed, self._held = feed, held
        if isinstance(held, _Live):
            weakref.finalize(self, held.stop.set)  # a source that is merely forgotten ends its thread too

    @property
    def live(self) -> bool:
        return isinstance(self._held, _Live)

    @property
    def dropped(self) -> int:
        return self._held.dropped if isinstance(self._held, _Live) else 0

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> Frame:
        return next(self._feed)

    def close(self) -> None:
        """End the source: its thread is joined, its file or connection closed, iteration over. May be repeated."""
        self._feed = iter(())
        if self._held is not None:
            self._held.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def frames(
    source: str | int | os.PathLike[str],
    fps: float | None = None,
    size: Box | None = None,
    drop: str = "oldest",
    reconnect: Reconnect = PATIENT,
) -> Source:
    """Open a source of pictures.

    source     a video file; a picture, a folder of pictures or a glob of them (in natural order: 2 before 10); "-" for
               a pipe on standard input; a camera's number (Linux, v4l2: 0 is /dev/video0); an address: rtsp, http(s)
               with HLS, tcp, udp, rtmp, srt. tcp connects to a server; "?listen=1" makes it wait for one
    fps        frames a second, see the module's rules; None gives every picture at its own time. Pictures in files
               have no times: fps of them are shown a second, 1 by default
    size       (height, width) of a box in pixels: pictures are shrunk to fit inside, keep their shape, never grow
    drop       what a live source throws away when its reader is slow: "oldest" or "newest" of the waiting frames
    reconnect  patience of a live source

    Times of a recording begin at 0; those of a live source are wall-clock seconds since it was opened and go on across
    reconnections. Rotation and mirroring noted in the file are applied, pixels that are not square are made square.
    Raises VideoError at once for a source that cannot be opened, and while iterating for one that breaks off.
    """
    rate, fit = _checked_rate(fps), _Fit(_checked_box(size))
    if drop not in DROPS:
        raise VideoError(f"drop must be one of {', '.join(DROPS)}, got {drop!r}")
    place = _place(source)
    if place.kind in ("camera", "web", "live"):
        return _from_afar(place, rate, fit, drop, reconnect)
    files = _picture_files(place.address) if place.kind == "path" else None
    if files is not None:
        return _album(place.name, files, rate or Fraction(1), fit)
    return _recording(_open(place, reconnect.silence), rate, fit)


def _checked_rate(fps: float | None) -> Fraction | None:
    """fps as an exact fraction; 23.976... becomes 24000/1001."""
    if fps is None:
        return None
    rate = Fraction(fps).limit_denominator(100_000) if math.isfinite(fps) else Fraction(0)
    if rate <= 0:
        raise VideoError(f"fps must be a number above 0, got {fps}")
    return rate


def _checked_box(size: Box | None) -> Box | None:
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise VideoError(f"size must be (height, width) in pixels, both at least 1, got {size}")
    return size


# Where pictures come from


@dataclass(frozen=True)
class _Place:
    """kind: path, pipe, camera, web or live; name for messages; address, format and options for FFmpeg."""

    kind: str
    name: str
    address: str
    format: str | None = None
    options: dict[str, str] = field(default_factory=dict)


def _place(source: str | int | os.PathLike[str]) -> _Place:
    text = str(source) if isinstance(source, int) else os.fspath(source)
    if text == "-":
        return _Place("pipe", "standard input", text)
    if camera := re.fullmatch(r"(?:/dev/video)?(\d+)", text):
        return _camera(camera[1])
    if address := re.match(r"([a-z][a-z0-9+.-]+)://", text, re.IGNORECASE):
        return _address(address[1].lower(), text)
    return _Place("path", text, text)


def _camera(number: str) -> _Place:
    if sys.platform != "linux":
        raise VideoError(
            f"camera {number}: cameras are read on Linux only; stream it to an rtsp or tcp address instead"
        )
    device = f"/dev/video{number}"
    return _Place("camera", f"camera {number} ({device})", device, "video4linux2")


def _address(scheme: str, text: str) -> _Place:
    """fpsprobesize 0: do not hold back the first 20 pictures to guess a rate that nobody asks for."""
    name = re.sub(r"(?<=://)([^/@:]*):[^/@]*@", r"\1:***@", text)
    options = {"fpsprobesize": "0"}
    if scheme in WEB:
        return _Place("web", name, text, options=options | {"reconnect": "1", "reconnect_delay_max": "10"})
    if scheme in LIVE:
        return _Place("live", name, text, options=options | ({"rtsp_transport": "tcp"} if "rtsp" in scheme else {}))
    raise VideoError(f"{name}: {scheme}:// is not known; use one of {', '.join(sorted(WEB | LIVE))}")


def _open(place: _Place, silence: float) -> _Video:
    """Connect or open; every failure becomes one VideoError."""
    if place.kind == "path":
        _refuse_missing(place.address)
    pipe = _Pipe() if place.kind == "pipe" else None
    patience = None if place.kind in ("path", "pipe") else silence
    file = pipe or place.address
    try:
        container = av.open(file, "r", format=place.format, options=place.options, timeout=patience)
    except FFmpegError as error:
        if pipe and pipe.interrupt:
            raise pipe.interrupt from None
        raise VideoError(f"{place.name}: {_explain(error)}") from error
    return _Video(container, place, pipe)


def _refuse_missing(path: str) -> None:
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file or folder, and no picture matches it as a pattern; check the path")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes); copy or record it again")


def _words(error: OSError | FFmpegError) -> str:
    return "nothing arrived in time" if isinstance(error, ExitError) else (error.strerror or str(error)).lower()


def _explain(error: FFmpegError) -> str:
    """What FFmpeg's error means and what to do about it."""
    if isinstance(error, InvalidDataError):
        return "not a video that can be read, or one that was never finished; check it with a player or record it again"
    if isinstance(error, HTTPError):
        return f"{_words(error)}; check the address"
    if isinstance(error, (PermissionError, FileNotFoundError)):
        return f"{_words(error)}; check the path and its permissions"
    return f"{_words(error)}; check that it is there, sends and can be reached from here"


class _Pipe:
    """Standard input for PyAV. Ctrl-C inside its callback would be lost, so it ends the pipe and is raised later."""

    name = "standard input"

    def __init__(self) -> None:
        self.interrupt: KeyboardInterrupt | None = None

    def read(self, size: int) -> bytes:
        """At most `size` bytes, as soon as there are any; none at the end, however often FFmpeg asks again."""
        try:
            return b"" if self.interrupt else os.read(0, size)
        except KeyboardInterrupt as interrupt:
            self.interrupt = interrupt
            return b""


# Pictures out of a container


class _Video:
    """An open container and its best video stream.

    frames   pictures decoded so far
    damaged  packets after the first picture that gave none
    failure  why reading stopped early, None at a clean end
    aspect   width of a pixel over its height
    """

    def __init__(self, container: InputContainer, place: _Place, pipe: _Pipe | None = None) -> None:
        self.name, self.place = place.name, place
        self._container, self._pipe = container, pipe
        container.flags &= ~GENPTS
        self.stream = _choose(container, place.name)
        self.aspect = self.stream.sample_aspect_ratio or Fraction(1)
        self.playlist = "hls" in container.format.name.split(",")
        self.frames = self.damaged = 0
        self.failure: FFmpegError | None = None

    @property
    def duration(self) -> Fraction | None:
        """Seconds, as the stream or else the container states them."""
        whole = self._container.duration
        return _stated(self.stream) or (Fraction(whole, av.time_base) if whole else None)

    @property
    def endless(self) -> bool:
        """True where the server told no length: neither in seconds nor, unless these are a playlist's, in bytes."""
        return self.duration is None and (self.playlist or self._container.size <= 0)

    @property
    def jumps(self) -> bool:
        """True for formats whose clock may be set anew in the middle (MPEG transport streams)."""
        return bool(self._container.format.flags & TS_DISCONT)

    def pictures(self) -> Iterator[av.VideoFrame]:
        """Every picture that decodes, in the order of showing. Never raises for bad data: see `failure`, `damaged`."""
        try:
            for packet in self._container.demux(self.stream):
                if packet.size:
                    yield from self._decoded(packet)
        except FFmpegError as error:
            self.failure = error
        yield from self._decoded(None)  # what the decoder still held

    def _decoded(self, packet: av.Packet | None) -> Iterator[av.VideoFrame]:
        try:
            pictures = self.stream.codec_context.decode(packet)
        except FFmpegError:
            self.damaged += self.frames > 0  # a stream joined between key frames begins with packets of no use
            return
        for picture in pictures:
            self.frames += 1
            yield picture

    def complain(self, end: Fraction) -> None:
        """Raise what went wrong in a recording that was read up to `end` seconds; nothing if all went well."""
        if self._pipe is not None and self._pipe.interrupt is not None:
            raise self._pipe.interrupt
        if trouble := self._trouble(end):
            raise VideoError(f"{self.name}: {trouble}", self.frames)

    def _trouble(self, end: Fraction) -> str | None:
        again = "copy or record it again for the rest"
        if not self.frames:
            return "no picture in it could be decoded; check it with a player or record it again"
        if self.failure is not None:
            return f"reading failed after {float(end):.1f} s ({_words(self.failure)}); {again}"
        whole = self._length_to_hold()
        if whole and whole - end > max(CUT_SHORT[0], whole * CUT_SHORT[1]):
            return f"it breaks off after {float(end):.1f} of {float(whole):.1f} s; {again}"
        if self.place.kind == "path" and _cut_riff(self.place.address):
            return f"it breaks off after {float(end):.1f} s; {again}"
        return f"{self.damaged} damaged pieces were skipped; {again}" if self.damaged else None

    def _length_to_hold(self) -> Fraction | None:
        """The length that this very stream must have; sound beside it may be longer than the pictures."""
        alone = len(self._container.streams) == 1
        return self.duration if alone else _stated(self.stream)

    def close(self) -> None:
        self._container.close()


def _choose(container: InputContainer, name: str) -> VideoStream:
    """The stream to watch; the others (sound, other qualities of a playlist) are not even downloaded."""
    kinds = sorted({stream.type for stream in container.streams})
    chosen = container.streams.best("video")
    if not isinstance(chosen, VideoStream) or chosen.disposition & Disposition.attached_pic:
        container.close()
        raise VideoError(
            f"{name}: no video in it, only {' and '.join(kinds) or 'nothing'}; give a source with pictures"
        )
    if chosen.codec_context is None:
        container.close()
        raise VideoError(f"{name}: its kind of video has no decoder here; convert it to H.264")
    for stream in container.streams:
        if stream is not chosen:
            stream.discard = Discard.all
    return chosen


def _stated(stream: VideoStream) -> Fraction | None:
    """Seconds that a stream says it has: in its header (MP4, AVI) or in a tag 01:02:03.5 (Matroska)."""
    if stream.duration and stream.time_base:
        return stream.duration * stream.time_base
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return int(tag[1]) * 3600 + int(tag[2]) * 60 + Fraction(tag[3]) if tag else None


def _cut_riff(path: str) -> bool:
    """True for an AVI file shorter than its first eight bytes say: FFmpeg trims its stated length to what is there."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        name, size = file.read(4), int.from_bytes(file.read(4), "little")
    return name == b"RIFF" and os.path.getsize(path) < size + 8 < 2**32  # all ones: a writer that did not know


class _Timeline:
    """Exact seconds since the first picture, from a stream's own timestamps; never backwards.

    A picture without a timestamp follows the one before at the stream's rate. A jump of the timestamps (recordings put
    end to end) is taken out: the picture after it follows at the stream's rate too. `end` is when the last picture
    ends; `stamp` is the same as the first timestamp counts, from which some formats state their length.
    """

    def __init__(self, base: Fraction, rate: Fraction | None, jumps: bool) -> None:
        self._base, self._step = base, 1 / (rate or Fraction(USUAL_RATE))
        self._forward = FORWARD if jumps else None
        self._origin: Fraction | None = None
        self._last = Fraction(0)
        self.end = self._first = Fraction(0)

    @property
    def stamp(self) -> Fraction:
        return self.end + max(Fraction(0), self._first)

    def __call__(self, pts: int | None, duration: int) -> Fraction:
        self._last = max(self._last, self._read(pts))
        self.end = self._last + (duration * self._base if duration else self._step)
        return self._last

    def _read(self, pts: int | None) -> Fraction:
        if pts is None:
            return self.end
        stamp = pts * self._base
        if self._origin is None:
            self._first, self._origin = stamp, stamp - self.end
        leap = stamp - self._origin - self._last
        if leap < BACKWARD or (self._forward is not None and leap > self._forward):
            self._origin = stamp - self.end
        return stamp - self._origin


def _stamp(picture: av.VideoFrame) -> int | None:
    """When to show a picture, in its stream's time base; formats that keep only the order of decoding give that."""
    return picture.dts if picture.pts is None else picture.pts


def _sample(stamped: Iterable[tuple[Fraction, T]], rate: Fraction | None) -> Iterator[tuple[Fraction, T]]:
    """At each instant k / rate the newest item at or before it, up to the last item; all of them if rate is None.

    Items come with times that never go back. An item that is late by no more than ROUNDING counts as in time.
    """
    if rate is None:
        yield from stamped
        return
    count, held, at = 0, None, Fraction(0)
    for at, item in stamped:
        while held is not None and count / rate < at - ROUNDING:
            yield count / rate, held
            count += 1
        held = item
    while held is not None and count / rate <= at + ROUNDING:
        yield count / rate, held
        count += 1


def _recording(video: _Video, rate: Fraction | None, fit: _Fit) -> Source:
    video.stream.thread_type = "AUTO"  # all cores; it costs delay, which a recording does not mind
    duration = video.duration
    return Source(video.name, float(duration) if duration else None, _recorded(video, rate, fit), video)


def _recorded(video: _Video, rate: Fraction | None, fit: _Fit) -> Iterator[Frame]:
    with closing(video):
        stream = video.stream
        timeline = _Timeline(stream.time_base or Fraction(1), stream.average_rate, video.jumps)
        stamped = ((timeline(_stamp(picture), picture.duration), picture) for picture in video.pictures())
        for at, picture in _sample(stamped, rate):
            yield Frame(float(at), fit(picture, video.aspect))
        video.complain(timeline.stamp)


# Pictures in files of their own


def _picture_files(path: str) -> list[Path] | None:
    """The pictures that a path, folder or glob names, in natural order; None where it is something else."""
    if os.path.isdir(path):
        return _folder(path)
    if os.path.exists(path) or not glob.has_magic(path):
        return _only_pictures([Path(path)]) or None
    found = _only_pictures(Path(match) for match in glob.glob(path, recursive=True))
    if not found:
        raise VideoError(f"{path}: no picture matches this pattern; it must match files ending in {_endings()}")
    return found


def _folder(path: str) -> list[Path]:
    try:
        found = _only_pictures(Path(path).iterdir())
    except OSError as error:
        raise VideoError(f"{path}: {_words(error)}; check the folder's permissions") from error
    if not found:
        raise VideoError(f"{path}: no pictures in this folder; it needs files ending in {_endings()}")
    return found


def _endings() -> str:
    return ", ".join(sorted(PICTURES))


def _only_pictures(paths: Iterable[Path]) -> list[Path]:
    """Hidden files are left out: some systems keep one beside each picture."""
    named = (path for path in paths if path.suffix.lower() in PICTURES and not path.name.startswith("."))
    return sorted(named, key=_natural)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Digits compare as numbers: 2 before 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"([0-9]+)", str(path))]


def _album(name: str, files: list[Path], rate: Fraction, fit: _Fit) -> Source:
    if len(files) == 1:
        _refuse_missing(str(files[0]))
    return Source(name, float(len(files) / rate), _shown(files, rate, fit), None)


def _shown(files: list[Path], rate: Fraction, fit: _Fit) -> Iterator[Frame]:
    """A picture that cannot be read leaves its time empty and is named at the end."""
    bad: list[Path] = []
    for index, path in enumerate(files):
        try:
            pixels = _picture(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            bad.append(path)
            continue
        yield Frame(float(index / rate), fit.array(pixels))
    if bad:
        trouble = f"not a picture that can be read ({len(bad)} of {len(files)} failed); replace or remove it"
        raise VideoError(f"{bad[0]}: {trouble}", len(files) - len(bad))


def _picture(path: Path) -> np.ndarray:
    """RGB pixels, uint8 [H, W, 3], turned as its EXIF data says."""
    with Image.open(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


# Shape of a picture


class _Fit:
    """Pictures as upright RGB arrays with square pixels inside a box. It keeps scaling tables: one for each source."""

    def __init__(self, box: Box | None) -> None:
        self._box = box
        self._scaler = VideoReformatter()
        self._angle: int | None = None
        self._turn = (False, False, False)

    def __call__(self, picture: av.VideoFrame, aspect: Fraction = Fraction(1)) -> np.ndarray:
        swap, up, left = self._turned(picture)
        box = self._box[::-1] if self._box and swap else self._box
        height, width = _inside(picture.height, picture.width, aspect, box)
        scaled = self._scaler.reformat(picture, width, height, "rgb24", interpolation="BICUBIC")
        pixels = scaled.to_ndarray()
        if swap:
            pixels = pixels.transpose(1, 0, 2)
        pixels = pixels[:: -1 if up else 1, :: -1 if left else 1]
        return np.array(pixels, order="C")  # a copy: PyAV's array shares memory with the decoder's picture

    def _turned(self, picture: av.VideoFrame) -> tuple[bool, bool, bool]:
        """Reads the matrix anew only when its angle changes: PyAV's side data keep their picture alive in a cycle."""
        if picture.rotation != self._angle:
            self._angle, self._turn = picture.rotation, _turn(picture)
        return self._turn

    def array(self, pixels: np.ndarray) -> np.ndarray:
        """The same for uint8 [H, W, 3] that is upright already."""
        if _inside(pixels.shape[0], pixels.shape[1], Fraction(1), self._box) == pixels.shape[:2]:
            return pixels
        return self(av.VideoFrame.from_ndarray(pixels, "rgb24"))


def _inside(height: int, width: int, aspect: Fraction, box: Box | None) -> Box:
    """(height, width) with square pixels, inside the box, same shape; no side grows."""
    tall, wide = (height / aspect, Fraction(width)) if aspect > 1 else (Fraction(height), width * aspect)
    scale = min(Fraction(1), box[0] / tall, box[1] / wide) if box else Fraction(1)
    return max(1, round(tall * scale)), max(1, round(wide * scale))


def _turn(picture: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(swap rows and columns, then flip up-down, then flip left-right) from the display matrix, to the nearest quarter.

    The matrix (a b u; c d v; x y w) takes a point (column, row) to (a column + c row, b column + d row).
    """
    matrix = picture.side_data.get("DISPLAYMATRIX")
    if not isinstance(matrix, SideData):
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    swap = abs(b) > abs(a)
    return swap, (b if swap else d) < 0, (c if swap else a) < 0


# Live sources


def _from_afar(place: _Place, rate: Fraction | None, fit: _Fit, drop: str, reconnect: Reconnect) -> Source:
    video = _open(place, reconnect.silence)
    if place.kind == "web" and not video.endless:
        return _recording(video, rate, fit)
    live = _Live(video, rate, fit, drop, reconnect)
    return Source(place.name, None, iter(live.take, None), live)


class _Live:
    """A thread that reads a source that does not wait, and a short queue of frames for whoever takes them."""

    def __init__(self, video: _Video, rate: Fraction | None, fit: _Fit, drop: str, reconnect: Reconnect) -> None:
        self.dropped = 0
        self.stop = threading.Event()
        self._place, self._fit, self._drop, self._reconnect = video.place, fit, drop, reconnect
        self._thin = _Thin(rate)
        self._queue: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._over = False
        self._error: Exception | None = None
        self._failed, self._frames, self._reason = 0, 0, ""
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(video,), name=f"video {video.name}", daemon=True)
        self._thread.start()

    def take(self) -> Frame | None:
        """The next frame, waiting for it; None when the source has ended. Raises its error once."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._over)
            if self._queue:
                return self._queue.popleft()
            error, self._error = self._error, None
        if error is not None:
            raise error
        return None

    def close(self) -> None:
        self.stop.set()
        self._thread.join()

    def _run(self, first: _Video) -> None:
        try:
            video: _Video | None = first
            while video is not None:
                with closing(video):
                    self._read(video)
                video = self._again()
        except Exception as error:  # handed to the reader, who raises it
            self._error = error
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _read(self, video: _Video) -> None:
        """Queue pictures until the connection is lost or the source closed."""
        pace = _Pace(video)
        for picture in video.pictures():
            if self.stop.wait(pace(picture, time.monotonic())):
                return
            self._failed, self._frames = 0, self._frames + 1
            now = time.monotonic() - self._began
            if self._thin(now):
                self._put(Frame(now, self._fit(picture, video.aspect)))
        self._reason = _explain(video.failure) if video.failure else "the connection ended"

    def _put(self, frame: Frame) -> None:
        with self._changed:
            if len(self._queue) == QUEUE:
                self.dropped += 1
                if self._drop == "newest":
                    return
                self._queue.popleft()
            self._queue.append(frame)
            self._changed.notify()

    def _again(self) -> _Video | None:
        """A new connection; None where the source was closed or has become a recording: its broadcast is over."""
        while self._failed < self._reconnect.attempts:
            if self.stop.wait(self._reconnect.wait(self._failed)):
                return None
            self._failed += 1
            try:
                video = _open(self._place, self._reconnect.silence)
            except VideoError as error:
                self._reason = str(error).removeprefix(f"{self._place.name}: ")
                continue
            if self._place.kind != "web" or video.endless:
                return video
            video.close()
            return None
        tried = f"lost, and {self._reconnect.attempts} attempts to reconnect failed"
        raise VideoError(f"{self._place.name}: {tried}; the last: {self._reason}", self._frames)


class _Thin:
    """Says which of the pictures that arrive to keep so that they are `rate` a second at most, evenly.

    One is kept when it comes no more than half a step before the next instant, so that the jitter of a source that
    already runs at the rate loses nothing.
    """

    def __init__(self, rate: Fraction | None) -> None:
        self._step = float(1 / rate) if rate else 0.0
        self._due = 0.0

    def __call__(self, now: float) -> bool:
        """now in seconds, growing."""
        late = now - self._due
        if late < -self._step / 2:
            return False
        self._due = (self._due if late < self._step / 2 else now) + self._step
        return True


class _Pace:
    """How many seconds to hold a picture back. Playlists bring seconds at once; other sources send in real time."""

    def __init__(self, video: _Video) -> None:
        self._base = video.stream.time_base if video.playlist else None
        self._origin: float | None = None

    def __call__(self, picture: av.VideoFrame, now: float) -> float:
        if self._base is None or picture.pts is None:
            return 0.0
        shown = float(picture.pts * self._base)
        ahead = 0.0 if self._origin is None else self._origin + shown - now
        if self._origin is None or not BEHIND < ahead < AHEAD:
            self._origin, ahead = now - shown, 0.0
        return max(0.0, ahead)
