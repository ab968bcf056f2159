"""The film: one picture a second, true questions beside it, whole files or none."""

import json

import av
import numpy as np
import pytest

from infinitevl.synth import film
from infinitevl.synth.questions import KINDS
from infinitevl.synth.render import render
from infinitevl.synth.world import HELDOUT, HELDOUT_SETTING, make_stories


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("film") / "world.mp4"
    return path, film.write(path, seed=3, frames=64, fps=4)


def test_the_file_is_h264_with_one_picture_a_second_that_stays_readable(written):
    path, _ = written
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    assert len(frames) == 64 * 4 and frames[-1][0] == pytest.approx(63.75)
    stories = make_stories(3, 1, 64, HELDOUT, HELDOUT_SETTING)
    for second in (0, 31, 63):
        assert np.abs(frames[4 * second][1].astype(int) - render(stories, 0, second)).mean() < 5


def test_questions_beside_it_cover_now_past_order_when_and_never(written):
    path, record = written
    assert json.loads(path.with_suffix(".json").read_text()) == record
    asked = record["questions"]
    assert len(asked) >= 6
    assert [each["time"] for each in asked] == sorted(each["time"] for each in asked)
    assert {each["kind"] for each in asked} <= set(KINDS)
    assert {"sign", "count_past", "order", "when_word"} <= {each["kind"] for each in asked}
    assert any(each["answer"] == "not seen" and each["evidence"] == -1 for each in asked)
    assert any(each["evidence"] >= 0 and each["time"] - each["evidence"] > 15 for each in asked)


def test_the_same_seed_asks_the_same(written, tmp_path):
    again = film.write(tmp_path / "again.mp4", seed=3, frames=64, fps=4)
    assert again == written[1]


def test_too_short_or_misnamed_films_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="at least 32 seconds"):
        film.write(tmp_path / "short.mp4", seed=0, frames=10)
    with pytest.raises(ValueError, match="must not end in .json"):
        film.write(tmp_path / "film.json", seed=0)
    assert not list(tmp_path.iterdir())
