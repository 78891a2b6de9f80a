"""Follows one text through a grammar: what may come next, and what has to.

Where the grammar leaves one text only, such as the name of the next field, that text is written in the tokenizer's own
tokens: a *chain*. Its tokens are then the only ones that are allowed, one after the other. (Otherwise a model might
spell the same text in other tokens, and nothing could be known in advance.) What is allowed is a function of the
tokens up to there and of nothing else, so it is the same on every way to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from manyheads.engine.vocabulary import Vocabulary, holds

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = NDArray[np.int32]
"""[W], the bits of a mask: bit t % 32 of word t // 32 says whether token t is allowed."""
MANY_MASKS = 16
"""Fewer masks are made one after the other, sooner than threads would wake up."""
MAX_CHAIN = 512
"""Tokens that are written at once without a step of the model; what goes on longer goes on with the next step."""


class Matcher:
    """A place in a grammar. It moves on with the text (`take`), and down a tree and back (`walk`).

    Where a chain begins, the library allows its first token alone.

    A text that is complete, and behind which nothing may come, needs no end-of-text token. Where it might also go on,
    such a token is allowed beside.

    Args:
        followed: a matcher of the library at the start of its grammar, of this object alone.
        ends: tokens that may end a text that is complete.
    """

    def __init__(self, followed: LLMatcher, vocabulary: Vocabulary, ends: Iterable[int]) -> None:
        self._followed = followed
        self.vocabulary = vocabulary
        self.ends = frozenset(ends)
        """Tokens that may end a text that is complete."""
        self.error: str | None = None
        """Why nothing more can be said; from then on everything is allowed."""
        self._chain: tuple[int, ...] | None = None  # until it is looked for

    @property
    def chain(self) -> Sequence[int]:
        """The tokens that have to come next; none where there is a choice, or nothing more can be said."""
        if self.error is not None:
            return ()
        if self._chain is None:
            self._chain = self._find_chain()
        return self._chain

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here and cannot go on."""
        return self.error is None and bool(self._followed.is_stopped())

    def take(self, tokens: Iterable[int], most: int) -> tuple[list[int], bool]:
        """Go on by what was drawn.

        Args:
            most: tokens of a chain that may follow at once.

        Returns:
            The tokens as far as the text goes, and of the chain that follows as many as may; whether the text is whole.
        """
        taken: list[int] = []
        for token in tokens:
            if self.is_complete or self.error is not None:
                break
            taken.append(token)
            if token in self.ends:
                return taken, False
            self._consume(token)
        room = min(most, MAX_CHAIN)
        while room > 0 and (chain := self.chain):
            taken.append(chain[0])
            self._consume(chain[0])
            room -= 1
        return taken, self.is_complete

    def can_go_back(self) -> bool:
        """Whether it may `walk`: not where a lexeme of a grammar in Lark counts its tokens, or ends with a text that is
        left out (`max_tokens=`, `stop=`)."""
        words = np.zeros(self.vocabulary.num_words, dtype=np.int32)
        tried = self._followed.deep_copy()
        tried.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        tokens = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        return not len(tokens) or not tried.consume_token(int(tokens[0])) or bool(tried.rollback(1))

    def walk(
        self, below: Mapping[int, Sequence[int]], tokens: Sequence[int], root: Words, room: NDArray[np.int32]
    ) -> tuple[list[int], list[int]]:
        """Go down a tree and back.

        Args:
            below: for each place the places of those below it; -1 is the root's.
            tokens: what stands at each place.
            root: what may come next, as `write_roots` wrote it.
            room: [N, W] for as many places as there are, in one piece. What the library says about those that there is
                a way to is written to the first of it, to be made masks of by `write_nodes`.

        Returns:
            The places that there is a way to, and their depths.
        """
        followed, writable, ends = self._followed, self.vocabulary.writable, self.ends
        start, size = room.ctypes.data, room.shape[1] * room.itemsize
        places: list[int] = []
        depths: list[int] = []

        def visit(parent: int, words: Words, depth: int) -> None:
            for place in below.get(parent, ()):
                token = tokens[place]
                # nothing stands behind what ends a text
                if token in ends or not (holds(words, token) and holds(writable, token)):
                    continue
                if not followed.consume_token(token):
                    self._fail()
                    return
                here = len(places)
                places.append(place)
                depths.append(depth)
                if followed.is_stopped():
                    room[here] = 0
                else:
                    followed.unsafe_compute_mask_ptr(start + here * size, size)
                    if place in below:
                        visit(place, room[here], depth + 1)
                if not followed.rollback(1):
                    self._fail()
                if self.error is not None:
                    return

        if self.error is None and not self.is_complete:
            visit(-1, root, 1)
            if self.error is None and followed.is_error():
                self._fail()
        return places, depths

    def has_begun(self, has_choice: bool, is_empty: bool) -> None:
        """Learn what the words turned out to be.

        Args:
            has_choice: the library allows more than one token.
            is_empty: the mask allows none.
        """
        if self._chain is None and has_choice:
            self._chain = ()
        if is_empty or self._followed.is_error():
            self._fail()

    def _consume(self, token: int) -> None:
        if self.error is not None:
            return
        if not self._followed.consume_token(token):
            self._fail()
            return
        self._chain = self._chain[1:] or None if self._chain else None

    def _find_chain(self) -> tuple[int, ...]:
        """The tokens that have to come, as far as the library knows; none where it would have to guess how a token
        goes on behind what is certain."""
        if self.error is not None or self._followed.is_stopped():
            return ()
        chain = self._followed.compute_ff_tokens()
        # a tokenizer that does not spell what it is asked to leaves the choice to the model
        if self._followed.validate_tokens(chain) < len(chain):
            return ()
        return tuple(takewhile(self.vocabulary.is_writable, chain))

    def _fail(self) -> None:
        self._chain = ()
        error = first_line(self._followed.get_error())
        is_stuck = error in ("", "NoExtensionBias")
        self.error = "no token of the model's vocabulary goes on with the text" if is_stuck else error


def write_roots(
    matchers: Sequence[Matcher],
    words: NDArray[np.int32],
    early_stops: Sequence[Iterable[int]],
    by_threads: bool = False,
) -> None:
    """Write what may come next in texts: the bits of masks of `Vocabulary.num_words` words.

    What is drawn where nothing more can be said, or where the text is whole, is no part of it; all is allowed there.

    Args:
        words: [G, W], to be written, in one piece.
        early_stops: for each text tokens that would end it before it may end; they are forbidden unless nothing else is
            allowed.
        by_threads: have some made by the library's threads, if there are many.
    """
    goes_on = [matcher.error is None and not matcher.is_complete for matcher in matchers]
    asked: list[tuple[LLMatcher, int]] = []
    for i, (matcher, out, goes) in enumerate(zip(matchers, words, goes_on, strict=True)):
        if goes and not matcher._chain:
            asked.append((matcher._followed, i))
        else:
            out.fill(0)
            _set(out, matcher.chain[:1] if goes else (), True)
    start, size = words.ctypes.data, words.shape[1] * words.itemsize
    executor = matchers[0].vocabulary.executor if by_threads and len(asked) >= MANY_MASKS else None
    if executor is not None:
        executor.unsafe_compute_mask_ptr(asked, start, size, len(words))
    else:
        for followed, i in asked:
            followed.unsafe_compute_mask_ptr(start + i * size, size)
    has_choice = _have_choice(words)
    _complete(words, matchers, early_stops)
    is_empty = _joined(words) == 0
    for matcher, goes, choice, empty in zip(matchers, goes_on, has_choice.tolist(), is_empty.tolist(), strict=True):
        if goes:
            matcher.has_begun(choice, empty)
    words[[i for i, matcher in enumerate(matchers) if not goes_on[i] or matcher.error is not None]] = -1


def write_nodes(matchers: Sequence[Matcher], words: NDArray[np.int32], early_stops: Sequence[Iterable[int]]) -> None:
    """Make masks of what `Matcher.walk` left, in place; all is allowed where nothing is.

    Args:
        matchers: those that have been there, for each of the words.
        words: [N, W].
        early_stops: as of `write_roots`.
    """
    _complete(words, matchers, early_stops)
    words[_joined(words) == 0] = -1


def _complete(words: NDArray[np.int32], matchers: Sequence[Matcher], early_stops: Sequence[Iterable[int]]) -> None:
    """Make masks of what the library says, in place: its end of a text becomes those that this text may have."""
    if not len(words):
        return
    vocabulary = matchers[0].vocabulary
    bits = words.view(np.uint32)
    may_end = np.zeros(len(words), dtype=bool)
    for end in vocabulary.ends:
        may_end |= bits[:, end >> 5] >> (end & 31) & 1 != 0
    words &= vocabulary.writable
    for i in np.flatnonzero(may_end).tolist():
        _set(words[i], matchers[i].ends, True)
    for out, early in zip(words, early_stops, strict=True):
        if early:
            others = out.copy()
            _set(others, early, False)
            if others.any():
                out[:] = others


def _joined(words: NDArray[np.int32]) -> NDArray[np.uint32]:
    """[N], the bits that any of a mask's words has."""
    joined: NDArray[np.uint32] = np.bitwise_or.reduce(words.view(np.uint32), axis=1)
    return joined


def _have_choice(words: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[N], whether masks allow more than one token each."""
    joined = _joined(words)
    has_choice: NDArray[np.bool_] = joined & (joined - np.uint32(1)) != 0
    for i in np.flatnonzero(~has_choice).tolist():  # one bit, of one word or of several
        has_choice[i] = np.count_nonzero(words[i]) > 1
    return has_choice


def first_line(message: str) -> str:
    """The part of the library's message that says what is wrong; the rest shows the place, or what it was about."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if "(limit for this grammar" in message or message.startswith("panic:"):
        return "it is more than a grammar may take here; make it smaller, or simpler"  # not what limits to raise
    return " ".join(lines[:1] + [line for line in lines[1:] if line.startswith("error:")])[:300]


def is_alone(words: Words, token: int) -> bool:
    """Whether a mask allows a token and no other."""
    return int(words[token >> 5]) & 0xFFFFFFFF == 1 << (token & 31) and np.count_nonzero(words) == 1


def _set(words: Words, tokens: Iterable[int], allowed: bool) -> None:
    for token in tokens:
        word, bit = token >> 5, np.uint32(1 << (token & 31))
        if word < len(words):
            unsigned = words.view(np.uint32)
            unsigned[word] = unsigned[word] | bit if allowed else unsigned[word] & ~bit
