"""Every kind of source, made here: files in all states of health, pictures, pipes, and servers on loopback."""

from __future__ import annotations

import gc
import http.server
import io
import itertools
import os
import select
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from infinitevl import video
from infinitevl.video import Frame, Reconnect, VideoError, frames

MEDIA = Path(os.environ.get("INFINITEVL_SHARED", Path(__file__).parents[2] / ".." / "shared")) / "media"
HASTY = Reconnect(attempts=3, first=0.02, longest=0.05, silence=2.0)
INTRA = {"g": "1", "tune": "zerolatency", "preset": "ultrafast"}


def painted(number: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A picture that says its number (0 to 99) in two greys, tens left and units right: survives lossy coding."""
    pixels = np.empty((*size, 3), np.uint8)
    half = size[1] // 2
    pixels[:, :half], pixels[:, half:] = 30 + 20 * (number // 10), 30 + 20 * (number % 10)
    return pixels


def number(pixels: np.ndarray) -> int:
    width = pixels.shape[1]
    tens, units = (pixels[:, part].mean() for part in (slice(2, width // 2 - 2), slice(width // 2 + 2, width - 2)))
    return round((tens - 30) / 20) * 10 + round((units - 30) / 20)


def write(
    path: Path | str | io.BytesIO,
    pictures: list[np.ndarray],
    times: list[float] | None = None,
    rate: int = 25,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    muxer: str | None = None,
    muxer_options: dict[str, str] | None = None,
    prepare: Callable[[av.VideoStream], object] = lambda stream: None,
) -> None:
    """A video of `pictures`, one every 1/rate seconds or at `times`."""
    target = path if isinstance(path, io.BytesIO) else str(path)
    with av.open(target, "w", format=muxer, options=muxer_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {"g": "10"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixel_format
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        prepare(stream)
        for index, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[index] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def transport_stream(count: int = 50) -> bytes:
    """MPEG-TS, each picture a key frame."""
    target = io.BytesIO()
    write(target, [painted(n) for n in range(count)], options=INTRA, muxer="mpegts")
    return target.getvalue()


def until_error(source: video.Source) -> tuple[list[Frame], VideoError]:
    """All frames before the one error, after which the source must be at its end."""
    seen: list[Frame] = []
    with pytest.raises(VideoError) as caught:
        for frame in source:
            seen.append(frame)
    assert next(source, None) is None
    assert "\n" not in str(caught.value)
    return seen, caught.value


def count_video_threads() -> int:
    return sum(thread.name.startswith("video ") for thread in threading.enumerate())


# Files


def test_h264_gives_every_picture_in_order_at_its_own_time(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", [painted(n) for n in range(60)])
    source = frames(tmp_path / "a.mp4")
    assert (source.live, source.dropped, source.duration) == (False, 0, 2.4)
    seen = list(source)
    assert [number(frame.pixels) for frame in seen] == list(range(60))
    assert [frame.time for frame in seen] == [n / 25 for n in range(60)]
    assert all(frame.pixels.dtype == np.uint8 and frame.pixels.shape == (48, 64, 3) for frame in seen)


@pytest.mark.parametrize("fps", [1, 4, 10, 12.5, 25, 60])
def test_a_sample_is_the_newest_picture_at_or_before_its_instant(tmp_path: Path, fps: float) -> None:
    write(tmp_path / "a.mp4", [painted(n) for n in range(60)])
    seen = list(frames(tmp_path / "a.mp4", fps=fps))
    instants = [n / fps for n in range(1000) if n / fps <= 59 / 25 + 1e-9]
    assert [frame.time for frame in seen] == pytest.approx(instants, abs=1e-12)
    assert [number(frame.pixels) for frame in seen] == [int(at * 25 + 1e-9) for at in instants]


def test_variable_rate_is_sampled_by_timestamps(tmp_path: Path) -> None:
    times = [0.0, 0.05, 0.1, 0.7, 0.71, 0.72, 2.0, 2.25]
    for name in ("v.mp4", "v.mkv"):
        write(tmp_path / name, [painted(n) for n in range(8)], times)
        seen = list(frames(tmp_path / name, fps=4))
        newest = [max(n for n in range(8) if times[n] <= k / 4) for k in range(10)]
        assert [(frame.time, number(frame.pixels)) for frame in seen] == [(k / 4, newest[k]) for k in range(10)]
        assert [frame.time for frame in frames(tmp_path / name)] == pytest.approx(times, abs=1e-9)


def test_times_begin_at_zero_whatever_the_file_says(tmp_path: Path) -> None:
    write(tmp_path / "late.mkv", [painted(n) for n in range(5)], [7 + n / 10 for n in range(5)])
    assert [frame.time for frame in frames(tmp_path / "late.mkv")] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_millisecond_timestamps_lose_and_repeat_nothing_at_the_own_rate(tmp_path: Path) -> None:
    write(tmp_path / "m.mkv", [painted(n) for n in range(90)], rate=30)
    assert [number(frame.pixels) for frame in frames(tmp_path / "m.mkv", fps=30)] == list(range(90))


def test_hours_do_not_drift() -> None:
    film, rate = Fraction(24000, 1001), video._checked_rate(3.1)
    assert rate == Fraction(31, 10) and video._checked_rate(24000 / 1001) == film
    pictures = ((n / film, n) for n in range(int(2 * 3600 * film)))
    for k, (at, n) in enumerate(video._sample(pictures, rate)):
        assert at == Fraction(10 * k, 31)
        assert n == (at + video.ROUNDING) * film // 1
    assert k == 2 * 3600 * 31 // 10 - 1


def test_streams_put_end_to_end_go_on_counting() -> None:
    line = video._Timeline(Fraction(1, 10), Fraction(10), jumps=True)
    stamps = [500, 501, None, 503, 20, 21, 900_000, 900_001]
    assert [float(line(pts, 1)) for pts in stamps] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    still = video._Timeline(Fraction(1, 10), None, jumps=False)  # a slide shown for a minute is no jump
    assert [float(still(pts, 0)) for pts in (0, 600, 599)] == [0, 60, 60]


def test_one_frame(tmp_path: Path) -> None:
    write(tmp_path / "one.mp4", [painted(7)])
    for fps in (None, 0.1, 30):
        [frame] = frames(tmp_path / "one.mp4", fps=fps)
        assert (frame.time, number(frame.pixels)) == (0.0, 7)


@pytest.mark.parametrize(
    ("codec", "pixel_format", "name"), [("libx264", "yuv444p", "o.mp4"), ("mpeg4", "yuv420p", "o.avi")]
)
def test_odd_sizes(tmp_path: Path, codec: str, pixel_format: str, name: str) -> None:
    write(tmp_path / name, [painted(n, (47, 65)) for n in range(5)], codec=codec, pixel_format=pixel_format)
    seen = list(frames(tmp_path / name))
    assert [number(frame.pixels) for frame in seen] == list(range(5))
    assert {frame.pixels.shape for frame in seen} == {(47, 65, 3)}
    assert {frame.pixels.shape for frame in frames(tmp_path / name, size=(31, 31))} == {(22, 31, 3)}


def flag() -> np.ndarray:
    """48 x 64: red top left, green top right, blue bottom left, black bottom right."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32, 0] = pixels[:24, 32:, 1] = pixels[24:, :32, 2] = 220
    return pixels


def corners(pixels: np.ndarray) -> str:
    """One letter for each quarter, row by row."""
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    quarters = [
        pixels[rows, columns]
        for rows in (slice(height), slice(height, None))
        for columns in (slice(width), slice(width, None))
    ]
    means = [quarter.reshape(-1, 3).mean(0) for quarter in quarters]
    return "".join("rgb"[int(mean.argmax())] if mean.max() > 90 else "-" for mean in means)


@pytest.mark.parametrize(
    ("angle", "shape", "expected"),
    [(0, (48, 64), "rgb-"), (90, (64, 48), "g-rb"), (180, (48, 64), "-bgr"), (-90, (64, 48), "br-g")],
)
def test_rotated(tmp_path: Path, angle: int, shape: tuple[int, int], expected: str) -> None:
    """Angles counter-clockwise."""
    write(tmp_path / "r.mp4", [flag()] * 2, prepare=lambda stream: stream.set_display_rotation(angle))
    for box in (None, (shape[0] // 2, 1000), (1000, shape[1] // 2)):
        for frame in frames(tmp_path / "r.mp4", size=box):
            assert corners(frame.pixels) == expected
            assert frame.pixels.shape[:2] == (shape if box is None else (shape[0] // 2, shape[1] // 2))


def test_mirrored(tmp_path: Path) -> None:
    write(tmp_path / "l.mp4", [flag()], prepare=lambda stream: stream.set_display_rotation(0, hflip=True))
    write(tmp_path / "u.mp4", [flag()], prepare=lambda stream: stream.set_display_rotation(90, hflip=True))
    assert corners(next(frames(tmp_path / "l.mp4")).pixels) == "gr-b"
    assert corners(next(frames(tmp_path / "u.mp4")).pixels) == "-gbr"


@pytest.mark.parametrize(
    ("aspect", "shape"), [(Fraction(2), (24, 64)), (Fraction(3, 4), (48, 48)), (Fraction(1), (48, 64))]
)
def test_pixels_are_made_square(tmp_path: Path, aspect: Fraction, shape: tuple[int, int]) -> None:
    def prepare(stream: av.VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = aspect

    write(tmp_path / "s.mp4", [flag()], prepare=prepare)
    [frame] = frames(tmp_path / "s.mp4")
    assert (frame.pixels.shape[:2], corners(frame.pixels)) == (shape, "rgb-")


@pytest.mark.parametrize(
    ("box", "shape"),
    [((24, 24), (18, 24)), ((12, 64), (12, 16)), ((48, 64), (48, 64)), ((500, 500), (48, 64)), ((1, 1), (1, 1))],
)
def test_the_box_shrinks_and_never_enlarges(tmp_path: Path, box: tuple[int, int], shape: tuple[int, int]) -> None:
    write(tmp_path / "a.mp4", [flag()])
    Image.fromarray(flag()).save(tmp_path / "a.png")
    for name in ("a.mp4", "a.png"):
        [frame] = frames(tmp_path / name, size=box)
        assert frame.pixels.shape[:2] == shape
        assert min(shape) < 8 or corners(frame.pixels) == "rgb-"


def test_pixels_are_the_readers_own(tmp_path: Path) -> None:
    """A gap repeats a picture: writing into one frame must not show in the next."""
    write(tmp_path / "a.mov", [painted(1), painted(2)], rate=1, codec="png", pixel_format="rgb24")
    source = frames(tmp_path / "a.mov", fps=10)
    first = next(source).pixels
    assert first.flags.writeable and first.flags.c_contiguous
    first[:] = 0
    assert number(next(source).pixels) == 1


def test_pictures_are_freed_without_waiting_for_the_garbage_collector(tmp_path: Path) -> None:
    """A cycle would keep hundreds of decoded pictures: gigabytes at 4K."""
    write(tmp_path / "a.mp4", [flag()] * 60, prepare=lambda stream: stream.set_display_rotation(90))
    gc.collect()
    gc.disable()
    try:
        assert len(list(frames(tmp_path / "a.mp4"))) == 60
        assert sum(type(thing) is av.VideoFrame for thing in gc.get_objects()) <= 2
    finally:
        gc.enable()


# Damage


def noisy(count: int) -> list[np.ndarray]:
    """Painted pictures with still noise, so that they outweigh a file's headers."""
    noise = np.random.default_rng(0).integers(0, 20, (48, 64, 1), np.uint8)
    return [painted(n) + noise - 10 for n in range(count)]


def halved(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("name", "muxer_options"), [("t.mp4", {"movflags": "faststart"}), ("t.mkv", {}), ("t.avi", {})]
)
def test_truncated_in_the_middle(tmp_path: Path, name: str, muxer_options: dict[str, str]) -> None:
    write(tmp_path / name, noisy(80), options={"g": "5"}, muxer_options=muxer_options)
    halved(tmp_path / name, 0.6)
    seen, error = until_error(frames(tmp_path / name))
    assert 20 <= len(seen) < 70
    assert [frame.time for frame in seen] == [n / 25 for n in range(len(seen))]
    assert error.frames == len(seen)
    assert name in str(error) and "breaks off" in str(error)


def test_an_avi_whose_writer_did_not_know_its_size_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    write(path, noisy(20))
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 4 + data[8:])
    assert len(list(frames(path))) == 20


def test_damaged_in_the_middle_gives_what_is_before_and_after(tmp_path: Path) -> None:
    path = tmp_path / "d.mp4"
    write(path, noisy(60), options=INTRA)
    data = bytearray(path.read_bytes())
    media = data.index(b"mdat") + 4
    span = (data.index(b"moov") - media) // 3
    data[media + span : media + 2 * span] = b"\xff" * span
    path.write_bytes(data)
    seen, error = until_error(frames(path))
    numbers = [number(frame.pixels) for frame in seen]
    assert numbers[:15] == list(range(15)) and numbers[-15:] == list(range(45, 60)) and len(numbers) < 50
    assert error.frames == len(seen) and "damaged" in str(error)


def audio_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        sound.rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())


def header_only(path: Path) -> None:
    write(path, [painted(n) for n in range(20)])
    data = bytearray(path.read_bytes())
    media, index = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[media:index] = bytes(index - media)
    path.write_bytes(data)


def unknown_codec(path: Path) -> None:
    write(path, [painted(n) for n in range(20)])
    data = path.read_bytes()
    at = data.rindex(b"avc1")
    path.write_bytes(data[:at] + b"zz9z" + data[at + 4 :])


def never_finished(path: Path) -> None:
    write(path, [painted(n) for n in range(20)])
    halved(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("Dear diary, today I was renamed.\n" * 50), "not a video"),
        (audio_only, "no video in it, only audio"),
        (header_only, "no picture in it could be decoded"),
        (unknown_codec, "no decoder"),
        (never_finished, "never finished"),
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "no pictures in this folder"),
    ],
)
def test_nothing_decodes(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    path = tmp_path / "x.mp4"
    make(path)
    with pytest.raises(VideoError) as caught:
        next(frames(path, fps=2))
    message = str(caught.value)
    assert caught.value.frames == 0
    assert words in message and str(path) in message and "\n" not in message


def test_a_picture_attached_to_music_is_no_video(tmp_path: Path) -> None:
    cover = io.BytesIO()
    Image.fromarray(flag()).save(cover, "PNG")
    sound = tmp_path / "sound.mp3"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("libmp3lame", rate=16000, layout="mono")
        quiet = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        quiet.rate = 16000
        container.mux(stream.encode(quiet))
        container.mux(stream.encode())
    picture = b"\0image/png\0\x03\0" + cover.getvalue()
    body = b"APIC" + len(picture).to_bytes(4, "big") + b"\0\0" + picture
    length = len(body)
    header = b"ID3\x03\0\0" + bytes([length >> 21 & 127, length >> 14 & 127, length >> 7 & 127, length & 127])
    sound.write_bytes(header + body + sound.read_bytes())
    with pytest.raises(VideoError, match="no video in it"):
        frames(sound)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fps": 0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"size": (0, 5)}, "size"),
        ({"drop": "some"}, "drop"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path: Path, arguments: dict, words: str) -> None:
    write(tmp_path / "a.mp4", [flag()])
    with pytest.raises(VideoError, match=words):
        frames(tmp_path / "a.mp4", **arguments)


def test_closing_early_ends_the_iteration(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", [painted(n) for n in range(20)])
    with frames(tmp_path / "a.mp4") as source:
        next(source)
    assert list(source) == []
    source.close()


# Pictures in files of their own


def test_a_folder_is_shown_in_natural_order(tmp_path: Path) -> None:
    for n in (1, 2, 9, 10, 11, 20):
        Image.fromarray(painted(n)).save(tmp_path / f"shot {n}.{'PNG' if n == 9 else 'png'}")
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "._shot 3.png").write_bytes(b"not one either")
    seen = list(frames(tmp_path))
    assert [(frame.time, number(frame.pixels)) for frame in seen] == list(enumerate([1, 2, 9, 10, 11, 20]))
    with frames(tmp_path, fps=4) as source:
        assert (source.duration, source.live) == (1.5, False)
        assert [frame.time for frame in source] == [0, 0.25, 0.5, 0.75, 1, 1.25]
    assert [number(frame.pixels) for frame in frames(str(tmp_path / "shot 1*.png"))] == [1, 10, 11]
    [single] = frames(tmp_path / "shot 20.png")
    assert (single.time, number(single.pixels)) == (0.0, 20)


def test_pictures_are_turned_by_exif_and_made_rgb(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    Image.fromarray(flag()).save(tmp_path / "p.jpg", exif=exif, quality=95)
    Image.fromarray(flag()).convert("L").save(tmp_path / "q.png")
    turned, grey = frames(str(tmp_path / "[pq].*"))
    assert (turned.pixels.shape, corners(turned.pixels)) == ((64, 48, 3), "br-g")
    assert grey.pixels.shape == (48, 64, 3)


def test_a_bad_picture_leaves_its_time_empty_and_is_named_at_the_end(tmp_path: Path) -> None:
    for n in range(4):
        Image.fromarray(painted(n)).save(tmp_path / f"{n}.png")
    (tmp_path / "1.png").write_bytes(b"")
    halved(tmp_path / "2.png")
    seen, error = until_error(frames(tmp_path))
    assert [frame.time for frame in seen] == [0, 3]
    assert error.frames == 2
    assert "1.png" in str(error) and "2 of 4" in str(error)


@pytest.mark.parametrize("name", ["x.png", "*.png"])
def test_no_picture_at_all(tmp_path: Path, name: str) -> None:
    with pytest.raises(VideoError) as caught:
        frames(tmp_path / name)
    assert caught.value.frames == 0 and name in str(caught.value)


# Pipes and what reaches the terminal

CHILD = """
import importlib.util, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without it
spec = importlib.util.spec_from_file_location("video", sys.argv[1])
video = sys.modules["video"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(video)
print("ready", flush=True)
for source in sys.argv[2:]:
    times = []
    try:
        for frame in video.frames(source):
            times.append(frame.time)
            if len(times) == 1:
                print("first", flush=True)
    except video.VideoError as error:
        print("error", error.frames)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(len(times), max(times, default=None))
"""


@contextmanager
def child(*sources: object, stdin: object = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
    """A process that prints what it got; only the module itself is imported, not the whole package."""
    command = [sys.executable, "-c", CHILD, video.__file__, *map(str, sources)]
    process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_pipe() -> None:
    with child("-") as process:
        out, err = process.communicate(transport_stream(50), timeout=30)
    assert (out.split(), err) == ([b"ready", b"first", b"50", b"1.96"], b"")


def test_a_file_on_standard_input_and_silence_about_damage(tmp_path: Path) -> None:
    """FFmpeg's own complaints about a damaged file must not reach the terminal."""
    write(tmp_path / "a.mp4", [painted(n) for n in range(50)])
    for name in ("b.avi", "b.mkv"):
        write(tmp_path / name, noisy(50))
        halved(tmp_path / name)
    header_only(tmp_path / "c.mp4")
    with (tmp_path / "a.mp4").open("rb") as stdin, child("-", *tmp_path.glob("[bc].*"), stdin=stdin) as process:
        out, err = process.communicate(timeout=30)
    assert out.split()[:4] == [b"ready", b"first", b"50", b"1.96"]
    assert out.count(b"error") == 3
    assert err == b""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("copies", [0, 3])
def test_ctrl_c_ends_a_pipe_that_waits(copies: int) -> None:
    """Before the first byte, and in the middle."""

    def line() -> bytes:
        assert process.stdout and select.select([process.stdout], [], [], 10)[0], "it still waits"
        return process.stdout.readline()

    with child("-") as process:
        assert process.stdin and line() == b"ready\n"
        process.stdin.write(transport_stream(50) * copies)
        process.stdin.flush()
        assert not copies or line() == b"first\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert line() == b"interrupted\n"


# Live sources, served on loopback

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextmanager
def web(answer: Answer) -> Iterator[str]:
    """An http server whose GET is `answer`; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                answer(self)
            except OSError:
                self.close_connection = True  # the reader went away

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def answer_with(handler: http.server.BaseHTTPRequestHandler, data: bytes, length: bool = True, rate: int = 0) -> None:
    """Send `data`, at once or in pieces of two transport packets, `rate` a second."""
    handler.send_response(200)
    if length:
        handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    step = 2 * 188 if rate else len(data)
    for start in range(0, len(data), step):
        handler.wfile.write(data[start : start + step])
        time.sleep(1 / rate if rate else 0)


def wait_until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert count_video_threads() == 0


def test_a_lost_connection_is_taken_up_again_and_given_up_in_the_end() -> None:
    counts = [20, 30, 5, 5, 5]
    pieces = [transport_stream(count) for count in counts]

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        if pieces:
            answer_with(handler, pieces.pop(0), length=False, rate=200)
        else:
            handler.send_error(404)

    with web(answer) as address:
        source = frames(address, reconnect=HASTY)
        assert (source.live, source.duration) == (True, None)
        seen, error = until_error(source)
    assert [number(frame.pixels) for frame in seen] == [n for count in counts for n in range(count)]
    times = [frame.time for frame in seen]
    assert all(a < b for a, b in zip(times, times[1:], strict=False))
    assert 0 <= times[0] < 1 and times[20] - times[19] > HASTY.first
    assert (source.dropped, error.frames) == (0, 65)
    assert address in str(error) and "3 attempts" in str(error) and "404" in str(error)


@pytest.mark.parametrize(("drop", "kept"), [("oldest", range(42, 50)), ("newest", range(8))])
def test_a_slow_reader_loses_frames_and_they_are_counted(drop: str, kept: range) -> None:
    with web(lambda handler: answer_with(handler, transport_stream(50), length=False)) as address:
        source = frames(address, drop=drop, reconnect=Reconnect(attempts=0))
        wait_until(lambda: count_video_threads() == 0)
        assert source.dropped == 50 - video.QUEUE
        seen, error = until_error(source)
    assert [number(frame.pixels) for frame in seen] == list(kept)
    assert error.frames == 50


def test_a_slow_reader_of_a_recording_on_the_web_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", [painted(n) for n in range(30)], muxer_options={"movflags": "faststart"})
    for data, duration in ((transport_stream(30), None), ((tmp_path / "a.mp4").read_bytes(), 1.2)):
        with web(lambda handler, data=data: answer_with(handler, data)) as address:
            source = frames(address)
            time.sleep(0.1)
            assert (source.live, source.duration) == (False, duration)
            assert [number(frame.pixels) for frame in source] == list(range(30))
            assert source.dropped == 0


def test_a_recording_on_the_web_goes_on_where_its_connection_broke(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", noisy(90), options=INTRA, muxer_options={"movflags": "faststart"})
    data, starts = (tmp_path / "a.mp4").read_bytes(), []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        start = int(handler.headers["Range"].removeprefix("bytes=").rstrip("-"))
        starts.append(start)
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        handler.wfile.write(data[start:] if start else data[: len(data) // 2])

    with web(answer) as address:
        assert [number(frame.pixels) for frame in frames(address)] == list(range(90))
    assert starts == [0, len(data) // 2]


def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Pictures for ever: what is sent stays one connection, so the numbers of the pictures repeat."""
    handler.send_response(200)
    handler.end_headers()
    data = transport_stream(50)
    while True:
        handler.wfile.write(data)
        time.sleep(0.02)


def test_close_joins_the_thread() -> None:
    with web(endless) as address, frames(address, reconnect=HASTY) as source:
        next(source)
        assert count_video_threads() == 1
        source.close()
        assert count_video_threads() == 0
        assert list(source) == []


def test_a_forgotten_source_ends_its_thread() -> None:
    with web(endless) as address:
        for _ in frames(address):
            break
        gc.collect()
        wait_until(lambda: count_video_threads() == 0)


def test_silence_counts_as_a_lost_connection_and_few_pictures_are_enough_to_begin() -> None:
    hold = threading.Event()

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        answer_with(handler, transport_stream(8), length=False)
        hold.wait(5)

    with web(answer) as address:
        began = time.monotonic()
        seen, error = until_error(frames(address, reconnect=Reconnect(attempts=0, silence=0.4)))
        took = time.monotonic() - began
        hold.set()
    assert len(seen) >= 1 and "nothing arrived in time" in str(error)
    assert 0.4 <= took < 2


@pytest.mark.parametrize(
    "source", ["http://user:secret@127.0.0.1:9/", "tcp://127.0.0.1:9", "rtsp://127.0.0.1:9/", "gopher://x", 987]
)
def test_a_live_source_that_is_not_there_is_refused_at_once(source: str | int) -> None:
    with pytest.raises(VideoError) as caught:
        frames(source)
    message = str(caught.value)
    assert caught.value.frames == 0 and "\n" not in message and "secret" not in message
    assert str(source).replace("secret", "***") in message


def test_back_off_doubles_up_to_a_limit() -> None:
    patience = Reconnect()
    assert [patience.wait(n) for n in range(patience.attempts)] == [0.5, 1, 2, 4, 8, 15, 15, 15]
    assert patience.wait(2000) == 15


@pytest.mark.parametrize(("own", "fps", "kept"), [(25, 25, 1000), (30, 25, 833), (10, 25, 1000), (30, 2, 67)])
def test_live_pictures_are_thinned_evenly_in_spite_of_jitter(own: int, fps: int, kept: int) -> None:
    rng = np.random.default_rng(0)
    arrivals = [(n + rng.uniform(-0.3, 0.3)) / own for n in range(1, 1001)]
    thin = video._Thin(Fraction(fps))
    passed = [at for at in arrivals if thin(at)]
    assert abs(len(passed) - kept) <= 0.03 * kept
    assert np.diff(passed).max() < 2.1 / min(own, fps)


def test_tcp() -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(transport_stream(8))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        source = frames(f"tcp://127.0.0.1:{server.server_address[1]}", reconnect=Reconnect(attempts=0))
        seen, _ = until_error(source)
        server.shutdown()
    assert [number(frame.pixels) for frame in seen] == list(range(8)) and source.live


@contextmanager
def sending(packets: Iterator[bytes], send: Callable[[bytes], object], rate: float) -> Iterator[None]:
    """A thread that sends a packet every 1/rate seconds."""
    over = threading.Event()

    def work() -> None:
        for packet in packets:
            if over.wait(1 / rate):
                return
            send(packet)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def transport_packets() -> Iterator[bytes]:
    data = transport_stream(50)
    while True:
        yield from (data[start : start + 7 * 188] for start in range(0, len(data), 7 * 188))


def test_udp() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        with sending(transport_packets(), lambda packet: sender.sendto(packet, address), rate=100):
            with frames(f"udp://127.0.0.1:{address[1]}", reconnect=HASTY) as source:
                seen = [next(source) for _ in range(5)]
    assert source.live and len({number(frame.pixels) for frame in seen}) == 5


class Camera(socketserver.StreamRequestHandler):
    """The least of an rtsp camera: MPEG-TS in RTP, interleaved in its one connection (RFC 2326, 3551)."""

    def handle(self) -> None:
        sdp = b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=test\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track\r\n"
        extra = {
            "DESCRIBE": ("Content-Type: application/sdp\r\n", sdp),
            "SETUP": ("Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n", b""),
        }
        while line := self.rfile.readline().decode():
            method, number = line.split(" ")[0], ""
            while header := self.rfile.readline().decode().strip():
                number = header.split(": ")[1] if header.startswith("CSeq") else number
            head, body = extra.get(method, ("", b""))
            self.wfile.write(
                f"RTSP/1.0 200 OK\r\nCSeq: {number}\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
            )
            if method == "PLAY":
                return self.play()

    def play(self) -> None:
        for count, payload in enumerate(transport_packets()):
            packet = struct.pack(">BBHII", 0x80, 33, count & 0xFFFF, count * 3600, 1) + payload
            try:
                self.wfile.write(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
            except OSError:
                return
            time.sleep(0.01)


def test_rtsp() -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Camera) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with frames(f"rtsp://127.0.0.1:{server.server_address[1]}/cam", reconnect=HASTY) as source:
            seen = [next(source) for _ in range(5)]
        server.shutdown()
    assert source.live and len({number(frame.pixels) for frame in seen}) == 5


@pytest.fixture(scope="module")
def playlist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HLS recording of 3 seconds in 6 pieces."""
    path = tmp_path_factory.mktemp("hls") / "list.m3u8"
    options = {"hls_time": "0.5", "hls_list_size": "0"}
    write(
        path, [painted(n) for n in range(60)], rate=20, options=INTRA | {"g": "10"}, muxer="hls", muxer_options=options
    )
    return path


def test_a_finished_playlist_is_a_recording(playlist: Path) -> None:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        answer_with(handler, (playlist.parent / handler.path[1:]).read_bytes())

    with web(answer) as address:
        source = frames(address + playlist.name)
        assert (source.live, source.duration) == (False, 3.0)
        assert [number(frame.pixels) for frame in source] == list(range(60))


def test_of_several_qualities_only_one_is_downloaded(playlist: Path) -> None:
    asked: list[str] = []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        variants = "".join(f"#EXT-X-STREAM-INF:BANDWIDTH={n}00000\n{n}/{playlist.name}\n" for n in (1, 2))
        main = ("#EXTM3U\n" + variants).encode()
        name = handler.path.rpartition("/")[2]
        answer_with(handler, main if name == "main.m3u8" else (playlist.parent / name).read_bytes())

    with web(answer) as address:
        assert len(list(frames(address + "main.m3u8"))) == 60
    pieces = [sum(path.startswith(f"/{n}/") and path.endswith(".ts") for path in asked) for n in (1, 2)]
    assert max(pieces) >= 6 and min(pieces) <= 2, asked


def test_a_running_playlist_is_shown_at_its_own_pace_and_ends_with_its_broadcast(playlist: Path) -> None:
    """Pieces of half a second appear in real time; the pictures of each must be spread over that half second."""
    began: list[float] = []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        began.append(time.monotonic())
        if not handler.path.endswith("m3u8"):
            return answer_with(handler, (playlist.parent / handler.path[1:]).read_bytes())
        *pieces, end = playlist.read_text().split("#EXTINF")
        pieces[1:] = ["#EXTINF" + piece for piece in pieces[1:]]
        last, close = end.split("#EXT-X-ENDLIST")
        pieces.append("#EXTINF" + last)
        shown = 3 + int((time.monotonic() - began[0]) / 0.5)
        text = "".join(pieces[: 1 + shown]) + ("#EXT-X-ENDLIST" + close if shown > 6 else "")
        answer_with(handler, text.encode())

    with web(answer) as address:
        with frames(address + playlist.name, fps=10, reconnect=HASTY) as source:
            assert source.live
            seen = list(itertools.islice(source, 60))
    gaps = np.diff([frame.time for frame in seen])
    assert 24 <= len(seen) <= 33
    assert gaps.max() < 0.6 and np.median(gaps) == pytest.approx(0.1, abs=0.03)


# Real footage

needs_media = pytest.mark.skipif(
    not MEDIA.is_dir(), reason="no shared media here; INFINITEVL_SHARED names their folder"
)


@needs_media
@pytest.mark.parametrize(
    ("name", "count", "rate", "shape"),
    [("1.mp4", 243, 25, (360, 640)), ("3.mp4", 146, 24000 / 1001, (360, 640)), ("2.avi", 270, 359 / 12, (240, 320))],
)
def test_real_footage(name: str, count: int, rate: float, shape: tuple[int, int]) -> None:
    seen = [
        (frame.time, frame.pixels.shape[:2], float(frame.pixels[::16, ::16].std())) for frame in frames(MEDIA / name)
    ]
    assert len(seen) == count
    assert {part[1] for part in seen} == {shape}
    assert [part[0] for part in seen] == pytest.approx([n / rate for n in range(count)], abs=1e-3)
    assert min(part[2] for part in seen) > 5
    sampled = list(frames(MEDIA / name, fps=2, size=(112, 112)))
    assert [frame.time for frame in sampled] == [n / 2 for n in range(int((count - 1) / rate * 2) + 1)]
    assert {max(frame.pixels.shape[:2]) for frame in sampled} == {112}
