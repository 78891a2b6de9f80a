"""Follows one text through a grammar: what may come next, and what has to.

Where the grammar leaves one text only, such as the name of the next field, that text is written in the tokenizer's own
tokens: a *chain*. Its tokens are then the only ones that are allowed, one after the other. (Otherwise a model might
spell the same text in other tokens, and nothing could be known in advance.) What is allowed is a function of the
tokens up to there and of nothing else, so it is the same on every way to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from manyheads.engine.vocabulary import Vocabulary, holds

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = NDArray[np.int32]
"""[W], the bits of a mask: bit t % 32 of word t // 32 says whether token t is allowed."""
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
        self._vocabulary = vocabulary
        self._ends = frozenset(ends)
        self.error: str | None = None
        """Why nothing more can be said; from then on everything is allowed."""
        self._chain: tuple[int, ...] | None = None  # until it is looked for

    @property
    def num_words(self) -> int:
        """W, of a mask."""
        return self._vocabulary.num_words

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
            if token in self._ends:
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
        words = np.zeros(self.num_words, dtype=np.int32)
        tried = self._followed.deep_copy()
        tried.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        tokens = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        return not len(tokens) or not tried.consume_token(int(tokens[0])) or bool(tried.rollback(1))

    def walk(
        self,
        below: Mapping[int, Sequence[int]],
        tokens: Sequence[int],
        early_stops: Callable[[int], Iterable[int]] = lambda depth: (),
    ) -> tuple[list[int], NDArray[np.int32]]:
        """Go down a tree and back.

        Args:
            below: for each place the places of those below it; -1 is the root's.
            tokens: what stands at each place.
            early_stops: as of `write`, behind a node of such depth.

        Returns:
            The places that there is a way to; and what may come behind each, [N, W] words as `write` writes them.
        """
        followed = self._followed
        words = np.zeros((1 + sum(map(len, below.values())), self.num_words), dtype=np.int32)  # the root's are first
        start, size = words.ctypes.data, words[0].nbytes
        places: list[int] = []
        depths: list[int] = []
        ended: list[int] = []

        def visit(parent: int, row: int, depth: int) -> None:
            for place in below.get(parent, ()):
                token = tokens[place]
                is_allowed = holds(words[row], token) and self._vocabulary.is_writable(token)
                if token in self._ends or not is_allowed:  # nothing stands behind what ends a text
                    continue
                if not followed.consume_token(token):
                    self._fail()
                    return
                places.append(place)
                depths.append(depth)
                if followed.is_stopped():
                    ended.append(len(places))
                else:
                    here = len(places)
                    followed.unsafe_compute_mask_ptr(start + here * size, size)
                    visit(place, here, depth + 1)
                if not followed.rollback(1):
                    self._fail()
                if self.error is not None:
                    return

        if self.error is None and not self.is_complete:
            followed.unsafe_compute_mask_ptr(start, size)
            visit(-1, 0, 1)
            if self.error is None and followed.is_error():
                self._fail()
        self._complete(words, [early_stops(depth) for depth in (0, *depths)])
        words[[*ended, *np.flatnonzero(~words.any(1))]] = -1
        return places, words[1 : 1 + len(places)]

    def write(self, words: Words, early_stops: Iterable[int] = ()) -> None:
        """Write what may come next: the bits of a mask of `Vocabulary.num_words` words.

        Args:
            early_stops: tokens that would end the text before it may end; they are forbidden unless nothing else is
                allowed.
        """
        if self.error is None and not self.is_complete:
            if not self._chain:
                self._followed.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
                if self._chain is None and _count(words) > 1:
                    self._chain = ()
            else:
                words.fill(0)
                _set(words, self.chain[:1], True)
            self._complete(words[None], [early_stops])
            if self._followed.is_error() or not words.any():
                self._fail()
        if self.error is not None or self.is_complete:
            # what is drawn here is no part of the text
            words.fill(-1)

    def _complete(self, words: NDArray[np.int32], early_stops: Sequence[Iterable[int]]) -> None:
        """Make masks of what the library says, in place: its end of a text becomes those that this text may have.

        Args:
            words: [N, W].
            early_stops: as of `write`, for each of the first of them.
        """
        bits = words.view(np.uint32)
        may_end = np.zeros(len(words), dtype=bool)
        for end in self._vocabulary.tokens.eos_tokens:
            may_end |= bits[:, end >> 5] >> (end & 31) & 1 != 0
        words &= self._vocabulary.writable
        if may_end.any():
            for token in self._ends:
                bits[may_end, token >> 5] |= np.uint32(1 << (token & 31))
        for out, early in zip(words, early_stops, strict=False):
            if early:
                others = out.copy()
                _set(others, early, False)
                if others.any():
                    out[:] = others

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
        return tuple(takewhile(self._vocabulary.is_writable, chain))

    def _fail(self) -> None:
        self._chain = ()
        error = first_line(self._followed.get_error())
        is_stuck = error in ("", "NoExtensionBias")
        self.error = "no token of the model's vocabulary goes on with the text" if is_stuck else error


def first_line(message: str) -> str:
    """The part of the library's message that says what is wrong; the rest shows the place, or what it was about."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if "(limit for this grammar" in message or message.startswith("panic:"):
        return "it is more than a grammar may take here; make it smaller, or simpler"  # not what limits to raise
    return " ".join(lines[:1] + [line for line in lines[1:] if line.startswith("error:")])[:300]


def is_alone(words: Words, token: int) -> bool:
    """Whether a mask allows a token and no other."""
    return holds(words, token) and _count(words) == 1


def _count(words: Words) -> int:
    return int.from_bytes(words.tobytes(), "little").bit_count()


def _set(words: Words, tokens: Iterable[int], allowed: bool) -> None:
    for token in tokens:
        word, bit = token >> 5, np.uint32(1 << (token & 31))
        if word < len(words):
            unsigned = words.view(np.uint32)
            unsigned[word] = unsigned[word] | bit if allowed else unsigned[word] & ~bit
