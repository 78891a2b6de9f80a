"""Models that think aloud mark their thoughts, which are told from the answer here while the text comes."""

from __future__ import annotations

from dataclasses import dataclass

from manyheads.frontend.markers import certain


@dataclass(frozen=True)
class ThoughtMarks:
    """Thoughts stand between two texts, at the beginning of a reply."""

    begin: str
    end: str


REASONING_PARSERS = {
    "think": ThoughtMarks("<think>", "</think>"),
    "mistral": ThoughtMarks("[THINK]", "[/THINK]"),
}
"""`think` is the form of DeepSeek R1, Qwen 3, QwQ and most others."""


def find_marks(template: str) -> ThoughtMarks | None:
    """Find how a model with such a chat template marks its thoughts; None if it does not."""
    return next((marks for marks in REASONING_PARSERS.values() if marks.end in template), None)


class ThoughtSplitter:
    """It tells thoughts from the answer.

    Args:
        is_open: the prompt ends with the mark at which thoughts begin.
    """

    def __init__(self, marks: ThoughtMarks, *, is_open: bool) -> None:
        self._marks = marks
        self._state = "thoughts" if is_open else "start"
        self._text = ""
        self._begun = False  # thoughts were given

    def push(self, text: str, *, final: bool = False) -> tuple[str, str]:
        """Take the next text, the last one if `final`; return what is certain of thoughts and answer."""
        if self._state == "answer":
            return "", text
        self._text += text
        if self._state == "start" and not self._start(final):
            return "", ""
        thoughts = self._thoughts(final) if self._state == "thoughts" else ""
        return thoughts, self._answer() if self._state in ("gap", "answer") else ""

    def _start(self, final: bool) -> bool:
        """Look how a reply begins; tell whether that is known."""
        rest = self._text.lstrip()
        if rest.startswith(self._marks.begin):
            self._text, self._state = rest[len(self._marks.begin) :], "thoughts"
        elif final or not self._marks.begin.startswith(rest):
            self._state = "answer"
        return self._state != "start"

    def _thoughts(self, final: bool) -> str:
        end = self._marks.end
        if not self._begun:
            self._text = self._text.lstrip()
            self._begun = bool(self._text)
        thoughts, mark, rest = self._text.partition(end)
        if mark:
            self._text, self._state = rest, "gap"
            return thoughts.rstrip()
        # space before the mark belongs to neither
        cut = len(thoughts) if final else len(thoughts[: certain(thoughts, [end])].rstrip())
        self._text = thoughts[cut:]
        return thoughts[:cut]

    def _answer(self) -> str:
        """Give what there is of the answer, without the space behind the thoughts."""
        text = self._text.lstrip() if self._state == "gap" else self._text
        self._text = ""
        if text:
            self._state = "answer"
        return text
