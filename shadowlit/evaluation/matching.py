"""Whether an answer is right: pure functions of a text and its references."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from shadowlit.errors import DataError
from shadowlit.limits import bounded_matching

Match = Literal["exact", "numeric", "regex", "contains"]

# The sign belongs to the number unless it is a minus between two operands ("10-4"); "v1.2.3" holds no number.
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+−]?)[$€£]?(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?P<exp>[eE][-+]?\d{1,4})?"
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ANSWER = "{answer}"


@dataclass(frozen=True)
class Matcher:
    """How a generated text is compared with its references; white space around either never counts.

    Attributes as the arguments of :class:`shadowlit.evaluation.generated.Generation`. ``exact`` is
    lm-evaluation-harness' ``exact_match``; ``numeric`` reads ``$1,234.50`` as 1234.5 and ``50%`` as 50; ``extract``
    works as the harness' ``regex`` filter with ``group_select: -1``.

    Raises:
        DataError: A pattern is missing, superfluous or no regular expression, or an option does nothing for the match.
    """

    match: Match = "exact"
    pattern: str | None = None
    extract: str | None = None
    ignore_case: bool = False
    ignore_punctuation: bool = False

    def __post_init__(self) -> None:
        if (self.match == "regex") != (self.pattern is not None):
            raise DataError(
                f"match={self.match} has pattern={self.pattern!r}; expected a pattern with match=regex and with no "
                rf"other. Set pattern to a regular expression, e.g. '^{_ANSWER}(?!\w)', or leave it out."
            )
        if self.ignore_case and self.match == "numeric":
            raise DataError("ignore_case=true does nothing for match=numeric. Leave it out.")
        if self.ignore_punctuation and self.match in ("numeric", "regex"):
            raise DataError(f"ignore_punctuation=true does nothing for match={self.match}. Leave it out.")
        for name, pattern in (("pattern", (self.pattern or "").replace(_ANSWER, "x")), ("extract", self.extract or "")):
            try:
                re.compile(pattern)
            except re.error as error:
                raise DataError(f"{name}={pattern!r} is not a regular expression: {error}. Correct it.") from None

    @property
    def needs_reference(self) -> bool:
        """Whether a row without a reference can't be scored."""
        return self.pattern is None or _ANSWER in self.pattern

    def check(self, references: Sequence[str]) -> None:
        """Raise where ``references`` can't be matched by any answer.

        Raises:
            DataError: There is none where one is needed, one is empty, or one holds no number for ``numeric``.
        """
        if self.needs_reference and not references:
            raise DataError(
                "has no reference answer. Set answer to its field, or use match=regex with a pattern without {answer}."
            )
        for reference in references:
            if not self._plain(reference) and self.needs_reference:
                raise DataError(f"has the empty reference {reference!r}. Fill it or remove the row.")
            if self.match == "numeric" and last_number(reference) is None:
                raise DataError(f"has no number in the reference {reference!r}. Correct it, or set match=exact.")

    def compared(self, text: str) -> str | None:
        """Return the part of ``text`` that is compared: all of it, or the last match of ``extract``; None without a
        match.
        """
        if self.extract is None:
            return text.strip()
        with bounded_matching(f"extract is {self.extract!r}"):
            return last_match(self.extract, text)

    def is_match(self, text: str, references: Sequence[str]) -> bool:
        """Return whether ``text`` gives one of ``references``."""
        found = self.compared(text)
        if found is None:
            return False
        if self.match == "regex":
            flags = re.IGNORECASE if self.ignore_case else 0
            with bounded_matching(f"pattern is {self.pattern!r}"):
                return any(re.search(pattern, found, flags) for pattern in self._patterns(references))
        if self.match == "numeric":
            number = last_number(found)
            return number is not None and any(number == last_number(reference) for reference in references)
        found, known = self._plain(found), [self._plain(reference) for reference in references]
        return found in known if self.match == "exact" else any(reference in found for reference in known)

    def _patterns(self, references: Sequence[str]) -> list[str]:
        assert self.pattern is not None
        if not self.needs_reference:
            return [self.pattern]
        return [self.pattern.replace(_ANSWER, re.escape(reference.strip())) for reference in references]

    def _plain(self, text: str) -> str:
        text = text.lower() if self.ignore_case else text
        return (text.translate(_NO_PUNCTUATION) if self.ignore_punctuation else text).strip()


def last_match(pattern: str, text: str) -> str | None:
    """Return the last match of ``pattern`` in ``text``, stripped: its first group that isn't empty, all of it without
    groups.

    None where nothing matches, or where all groups of the last match are empty.
    """
    matches = re.findall(pattern, text)
    if not matches:
        return None
    match = matches[-1]
    if isinstance(match, tuple):
        match = next((group for group in match if group), None)
    return None if match is None else match.strip()


def last_number(text: str) -> Decimal | None:
    """Return the last number in ``text``, exactly; thousands separators, currency signs and a percent sign
    don't count.
    """
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    sign = "-" if match["sign"] in ("-", "−") else ""
    return Decimal(sign + match["digits"].replace(",", "") + (match["exp"] or ""))
