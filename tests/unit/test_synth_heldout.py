"""The held-out test: full rows, fair questions, and counting that cannot flatter."""

import hashlib
import math
from collections import Counter

import pytest

from infinitevl.synth import heldout
from infinitevl.synth.heldout import FRAMES, ROWS, STREAMS, Ask, age
from infinitevl.synth.questions import YES_NO
from infinitevl.synth.world import HELDOUT, Stories


@pytest.fixture(scope="module")
def truth() -> list[str]:
    return [ask.question.answer for ask in heldout.plan()]


def shown(events, frame: int, b: int) -> int:
    return int((events.start[b] <= frame).sum())


def test_every_row_has_at_least_500_questions_and_halves_as_many_of_each(truth):
    table = heldout.score(truth)
    assert set(table) == {row.name for row in ROWS}
    for result in table.values():
        assert result.seen.asked + result.never.asked >= 500
        if result.row.halves:
            assert min(result.seen.asked, result.never.asked) >= 500
            assert abs(result.seen.asked - result.never.asked) < 20
        else:
            assert result.never.asked == 0


def test_the_plan_never_changes():
    """A new plan is a new test: its numbers no longer compare with those published."""
    told = "\n".join(f"{a.world} {a.stream} {a.frame} {a.question} {a.rows}" for a in heldout.plan())
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "7c855f149661f3f3"


def test_streams_are_as_rich_as_promised():
    stories: Stories = heldout.worlds()[HELDOUT.name]
    for b in range(STREAMS):
        assert shown(stories.signs, FRAMES - 1, b) >= 12
        assert shown(stories.groups, FRAMES - 1, b) >= 8
        for state in (stories.door[b], stories.light[b]):
            assert (state[1:] != state[:-1]).sum() >= 3


def recalled() -> list[Ask]:
    return [ask for ask in heldout.plan() if ask.question.evidence >= 0 and ask.question.evidence < ask.frame]


def test_ages_are_those_of_the_rows():
    ages = {row.name: row.ages for row in ROWS if row.ages}
    for ask in recalled():
        for name in set(ask.rows) & set(ages):
            assert ages[name][0] <= age(ask.question) < ages[name][1]
    old = [ask for ask in heldout.plan() if "relay" in ask.rows]
    assert min(age(ask.question) for ask in old) >= 3
    assert {name for ask in old for name in ask.rows} >= {"age2", "age4", "age8"}
    assert age(heldout.plan()[0].question) >= 0


def test_two_distractors_of_its_kind_were_seen_before_each_question_about_the_past():
    stories = heldout.worlds()[HELDOUT.name]
    for ask in recalled():
        assert shown(stories.signs, ask.frame, ask.stream) >= 3
        assert shown(stories.groups, ask.frame, ask.stream) >= 3


def test_named_pairs_have_two_like_ones_in_their_stream():
    """For a colour and shape that a question names or wants: two others of the stream with that colour or shape."""
    stories = heldout.worlds()[HELDOUT.name]
    for b in range(STREAMS):
        signs, groups = shown(stories.signs, FRAMES - 1, b), stories.groups.start[b] < FRAMES
        pairs = [*stories.sign_pair[b, :signs], *stories.group_pair[b][groups]]
        for pair in pairs:
            assert sum((pair // 8 == other // 8) != (pair % 8 == other % 8) for other in pairs) >= 2


def test_a_blind_model_stays_under_a_quarter():
    table = heldout.score(heldout.blind())
    for name, result in table.items():
        limit = {"states": 0.55, "never": 0.55}.get(name, 0.25)
        assert result.total.share < limit, name


def test_yes_and_no_come_in_pairs_of_one_kind_and_moment():
    asked = Counter()
    for ask in heldout.plan():
        if "never" in ask.rows and ask.question.kind in YES_NO:
            asked[ask.stream, ask.frame, ask.question.kind, ask.question.answer] += 1
    moments = {key[:3] for key in asked}
    assert sum(asked[*key, "yes"] == asked[*key, "no"] for key in moments) > 0.97 * len(moments)


def test_score_counts_exact_matches_and_the_worse_half(truth):
    perfect = heldout.score(truth)
    assert all(result.total.share == 1 for result in perfect.values())
    always_no = heldout.score(["no"] * len(truth))
    assert always_no["never"].never.share == 1 and always_no["never"].total.share == 0
    assert heldout.score([answer.lower() for answer in truth])["fonts"].total.share < 0.01  # only strings of digits
    assert heldout.score([f" {answer}\n" for answer in truth])["now"].total.share == 1


def test_one_wrong_answer_costs_one(truth):
    place = next(at for at, ask in enumerate(heldout.plan()) if ask.rows == ("now",))
    kind = heldout.plan()[place].question.kind
    result = heldout.score([*truth[:place], "wrong", *truth[place + 1 :]])["now"]
    assert result.total.right == result.total.asked - 1
    assert result.kinds[kind].right == result.kinds[kind].asked - 1


def test_a_wrong_number_of_answers_is_refused(truth):
    with pytest.raises(ValueError, match="answers for .* questions; give one for each"):
        heldout.score(truth[:-1])


def test_tables_for_people_and_for_programs(truth):
    table = heldout.score(truth)
    text = heldout.markdown({"model": table, "blind": heldout.score(heldout.blind())})
    lines = text.splitlines()
    assert lines[0] == "| row | questions | model | blind |" and len(lines) == 2 + len(ROWS)
    assert "| 100.0% |" in lines[2]
    plain = heldout.as_json(table)
    assert plain["never"]["share"] == 1.0 and plain["never"]["seen"][0] == plain["never"]["seen"][1]
    assert math.isnan(heldout.Count(0, 0).share)


def test_a_part_of_the_plan_is_scored_by_its_own_lines(truth):
    half = [place for place, ask in enumerate(heldout.plan()) if ask.stream % 2]
    part = heldout.score([truth[place] for place in half], [heldout.plan()[place] for place in half])
    assert part["now"].total.share == 1
    assert part["now"].total.asked == sum("now" in heldout.plan()[place].rows for place in half)
