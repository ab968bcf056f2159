"""Follow a frame: right after it was seen, what can be asked, and the one right answer, from the story alone.

A question is exact text with an exact answer. `evidence` is the last frame at which what the answer needs was visible,
so that `asked - evidence` is how long it has been out of view; -1 where the answer is that it was never seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from . import atlas
from .world import GHOSTS, Stories

STAMP = 4  # seconds between the times that questions name
UNSEEN = "not seen"


@dataclass(frozen=True)
class Question:
    """`asked` and `evidence` are frame indices; evidence is -1 for what was never seen."""

    kind: str
    text: str
    answer: str
    evidence: int
    asked: int


@dataclass(frozen=True)
class Moment:
    """Story `b` right after `frame`. never: share of questions about what was not seen (None: each kind's own).

    within: first and last frame between which the evidence of what was seen must lie.
    """

    stories: Stories
    b: int
    frame: int
    rng: np.random.Generator
    never: float | None
    within: tuple[int, int]
    seen: int  # signs that have begun
    groups: tuple[int, ...]  # groups of objects that have begun

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def negative(self, usual: float) -> bool:
        return self.chance(usual if self.never is None else self.never)

    def pick(self, items: list[int]) -> int | None:
        return items[int(self.rng.integers(len(items)))] if items else None

    def last_seen(self, sign: int) -> int:
        return min(int(self.stories.signs.end[self.b, sign]) - 1, self.frame)

    def group_last(self, group: int) -> int:
        return min(int(self.stories.groups.end[self.b, group]) - 1, self.frame)

    def inside(self, evidence: int) -> bool:
        return self.within[0] <= evidence <= self.within[1]

    def signs(self) -> list[int]:
        """Signs seen so far whose last sight lies `within` and whose word is the only one of its kind so far."""
        words = [self.word(sign) for sign in range(self.seen)]
        return [s for s in range(self.seen) if self.inside(self.last_seen(s)) and words.count(words[s]) == 1]

    def word(self, sign: int) -> str:
        return self.stories.word(self.b, sign)

    def pair(self, sign: int) -> str:
        return pair_name(int(self.stories.sign_pair[self.b, sign]))

    def current(self) -> int | None:
        """The sign in view."""
        last = self.seen - 1
        return last if last >= 0 and self.stories.signs.end[self.b, last] > self.frame else None

    def visible(self) -> list[int]:
        return [group for group in self.groups if self.stories.groups.end[self.b, group] > self.frame]

    def time(self, frame: int) -> str:
        """The last multiple of four seconds not after `frame`."""
        second = int(self.stories.t0[self.b]) + frame
        return clock(second - second % STAMP)

    def unseen_word(self) -> str | None:
        """A word not seen so far: one that never comes, or one that is yet to come."""
        total = self.stories.letters.shape[1]
        later = list(range(total - GHOSTS, total)) + list(range(self.seen, total - GHOSTS))[:GHOSTS]
        word = self.word(later[int(self.rng.integers(len(later)))])
        return None if any(self.word(sign) == word for sign in range(self.seen)) else word

    def unseen_pair(self) -> str:
        """A colour and shape not seen so far, on a sign or as an object."""
        later = self.stories.sign_pair[self.b, self.seen : self.seen + 4].tolist()
        spare = self.stories.spare[self.b, :12].tolist() + later
        return pair_name(spare[int(self.rng.integers(len(spare)))])

    def ask(self, kind: str, text: str, answer: str, evidence: int) -> Question:
        return Question(kind, text, answer, evidence, self.frame)

    def now(self, kind: str, text: str, answer: str) -> Question:
        return Question(kind, text, answer, self.frame, self.frame)


def pair_name(pair: int) -> str:
    return f"{atlas.COLOURS[pair // len(atlas.SHAPES)]} {atlas.SHAPES[pair % len(atlas.SHAPES)]}"


def plural(name: str) -> str:
    """red star -> red stars"""
    return f"{name}es" if name.endswith("cross") else f"{name}s"


def article(name: str) -> str:
    return f"an {name}" if name.startswith("orange") else f"a {name}"


def clock(second: int) -> str:
    """m:ss; minutes may exceed 59."""
    return f"{second // 60}:{second % 60:02d}"


def questions(
    stories: Stories,
    b: int,
    frame: int,
    rng: np.random.Generator,
    kinds: Iterable[str] | None = None,
    never: float | None = None,
    within: tuple[int, int] | None = None,
) -> list[Question]:
    """At most one question of each of `kinds` (None: all of `KINDS`), asked right after `frame` of story `b` was seen.

    never: share of questions about what was not seen; None: half for yes/no kinds, a tenth to a fifth for the others.
    within: frames between which the evidence of what was seen must lie (both included).
    """
    begun = stories.signs.start[b] <= frame
    groups = tuple(np.flatnonzero(stories.groups.start[b] <= frame).tolist())
    moment = Moment(stories, b, frame, rng, never, within or (0, frame), int(begun.sum()), groups)
    asked = (KINDS[kind](moment) for kind in (KINDS if kinds is None else kinds))
    return [question for question in asked if question is not None]


def _sign(m: Moment) -> Question | None:
    sign = m.current()
    if sign is None and not m.negative(0.1):
        return None
    return m.now("sign", "what does the sign say?", "no sign" if sign is None else m.word(sign))


def _digit(m: Moment) -> Question | None:
    digits = m.stories.digits
    shown = np.flatnonzero((digits.start[m.b] <= m.frame) & (m.frame < digits.end[m.b]))
    if not len(shown) and not m.negative(0.1):
        return None
    answer = str(m.stories.digit[m.b, shown[0]]) if len(shown) else "none"
    return m.now("digit", "what digit is shown?", answer)


def _count_now(m: Moment) -> Question | None:
    group = m.pick(m.visible())
    if group is None:
        return None
    name = pair_name(int(m.stories.group_pair[m.b, group]))
    return m.now("count_now", f"how many {plural(name)}?", str(m.stories.group_count[m.b, group]))


def _emblem_now(m: Moment) -> Question | None:
    sign = m.current()
    if sign is None:
        return None
    colour, shape = m.pair(sign).split()
    if m.chance(0.5):
        return m.now("emblem_now", "what colour is the emblem?", colour)
    return m.now("emblem_now", "what shape is the emblem?", shape)


def _door(m: Moment) -> Question:
    return m.now("door", "is the door open?", "yes" if m.stories.door[m.b, m.frame] else "no")


def _light(m: Moment) -> Question:
    return m.now("light", "is the light on?", "yes" if m.stories.light[m.b, m.frame] else "no")


def _word_by_emblem(m: Moment) -> Question | None:
    text = "what word came with the {}?".format
    if m.negative(0.15):
        return m.ask("word_by_emblem", text(m.unseen_pair()), UNSEEN, -1)
    sign = m.pick(m.signs())
    return sign if sign is None else m.ask("word_by_emblem", text(m.pair(sign)), m.word(sign), m.last_seen(sign))


def _emblem_by_word(m: Moment) -> Question | None:
    return _about_word(m, "emblem_by_word", "what came with {}?", m.pair)


def _when_word(m: Moment) -> Question | None:
    start = m.stories.signs.start
    return _about_word(m, "when_word", "when was {} shown?", lambda sign: m.time(int(start[m.b, sign])))


def _about_word(m: Moment, kind: str, text: str, answer: Callable[[int], str]) -> Question | None:
    """A question that names a word, seen or not."""
    if m.negative(0.15):
        word = m.unseen_word()
        return None if word is None else m.ask(kind, text.format(word), UNSEEN, -1)
    sign = m.pick(m.signs())
    return None if sign is None else m.ask(kind, text.format(m.word(sign)), answer(sign), m.last_seen(sign))


def _order(m: Moment) -> Question | None:
    """Asked by the word; `within` speaks of the answer."""
    before = m.chance(0.5)
    text = f"what word came {'before' if before else 'after'} {{}}?".format
    if m.negative(0.15):
        word = m.unseen_word()
        return None if word is None else m.ask("order", text(word), UNSEEN, -1)
    answer = m.pick(m.signs())
    if answer is None:
        return None
    named = answer + 1 if before else answer - 1
    if not 0 <= named < m.seen or [m.word(sign) for sign in range(m.seen)].count(m.word(named)) > 1:
        return None
    return m.ask("order", text(m.word(named)), m.word(answer), m.last_seen(answer))


def _word_at(m: Moment) -> Question | None:
    signs, t0 = m.stories.signs, int(m.stories.t0[m.b])
    if m.negative(0.1):
        frame = int(m.rng.integers(0, m.frame // STAMP + 1)) * STAMP
        empty = not ((signs.start[m.b] <= frame) & (frame < signs.end[m.b])).any()
        return m.ask("word_at", f"what word was shown at {clock(t0 + frame)}?", "no sign", frame) if empty else None
    sign = m.pick(m.signs())
    if sign is None:
        return None
    first = -(-int(signs.start[m.b, sign]) // STAMP) * STAMP
    if first > m.last_seen(sign):
        return None
    return m.ask("word_at", f"what word was shown at {clock(t0 + first)}?", m.word(sign), m.last_seen(sign))


def _count_past(m: Moment) -> Question | None:
    text = "how many {} were there?".format
    if m.negative(0.15):
        return m.ask("count_past", text(plural(m.unseen_pair())), UNSEEN, -1)
    gone = set(m.groups) - set(m.visible())
    group = m.pick([group for group in gone if m.inside(m.group_last(group))])
    if group is None:
        return None
    name = pair_name(int(m.stories.group_pair[m.b, group]))
    return m.ask("count_past", text(plural(name)), str(m.stories.group_count[m.b, group]), m.group_last(group))


def _first_word(m: Moment) -> Question | None:
    return _end_word(m, "first_word", "what was the first word?", 0)


def _last_word(m: Moment) -> Question | None:
    return _end_word(m, "last_word", "what was the last word?", m.seen - 1)


def _end_word(m: Moment, kind: str, text: str, sign: int) -> Question | None:
    if not m.seen or not m.inside(m.last_seen(sign)):
        return None
    return m.ask(kind, text, m.word(sign), m.last_seen(sign))


def _when_state(m: Moment) -> Question | None:
    thing = "light" if m.chance(0.5) else "door"
    state = getattr(m.stories, thing)[m.b, : m.frame + 1]
    changes = np.flatnonzero(state[1:] != state[:-1]) + 1
    text = f"when did the {thing} last change?"
    if not len(changes):
        return m.ask("when_state", text, "never", -1) if m.negative(0.15) else None
    last = int(changes[-1])
    return m.ask("when_state", text, m.time(last), last) if m.inside(last) else None


def _was_word(m: Moment) -> Question | None:
    if m.negative(0.5):
        word = m.unseen_word()
        return None if word is None else m.ask("was_word", f"was {word} shown?", "no", -1)
    sign = m.pick(m.signs())
    return None if sign is None else m.ask("was_word", f"was {m.word(sign)} shown?", "yes", m.last_seen(sign))


def _was_pair(m: Moment) -> Question | None:
    if m.negative(0.5):
        return m.ask("was_pair", f"was {article(m.unseen_pair())} shown?", "no", -1)
    seen = [(m.pair(sign), m.last_seen(sign)) for sign in range(m.seen)]
    seen += [(pair_name(int(m.stories.group_pair[m.b, group])), m.group_last(group)) for group in m.groups]
    fit = [place for place, (_, last) in enumerate(seen) if m.inside(last)]
    place = m.pick(fit)
    return None if place is None else m.ask("was_pair", f"was {article(seen[place][0])} shown?", "yes", seen[place][1])


NOW = ("sign", "digit", "count_now", "emblem_now")
STATES = ("door", "light")
RECALL = (
    "word_by_emblem",
    "emblem_by_word",
    "order",
    "word_at",
    "when_word",
    "count_past",
    "first_word",
    "last_word",
    "when_state",
)
YES_NO = ("was_word", "was_pair")
KINDS: dict[str, Callable[[Moment], Question | None]] = {
    "sign": _sign,
    "digit": _digit,
    "count_now": _count_now,
    "emblem_now": _emblem_now,
    "door": _door,
    "light": _light,
    "word_by_emblem": _word_by_emblem,
    "emblem_by_word": _emblem_by_word,
    "order": _order,
    "word_at": _word_at,
    "when_word": _when_word,
    "count_past": _count_past,
    "first_word": _first_word,
    "last_word": _last_word,
    "when_state": _when_state,
    "was_word": _was_word,
    "was_pair": _was_pair,
}
