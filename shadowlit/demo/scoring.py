"""Is a generated answer right? One pure function over the rows of the demonstration's data files."""

from __future__ import annotations

import re
from collections.abc import Mapping

from shadowlit.demo.world import END_OF_TEXT, END_OF_TURN, FORMATS, NEW_SKILL, OLD_SKILLS
from shadowlit.errors import DataError


def is_correct(row: Mapping[str, object], generated: str) -> bool:
    """Return whether ``generated`` answers the question of ``row``.

    What counts depends on the row's skill, and never on which model speaks:

    * old skills and the new one: the text begins with the value, and the value ends there. ``Oslo``,
      ``Oslo.`` and ``Oslo. Glad to help!`` are right for ``Oslo``; ``Oslofjord``, ``[Oslo]`` and ``It is
      Oslo`` are not. So the bare style and the house style count alike, and a value buried in other text does
      not.
    * ``format``: the text is the value in the form that was asked for, and nothing else. A right value in
      another form is wrong, and so is a wrong value in the right form.
    * ``refusal``: the text says sorry first. Which words follow does not matter.

    Args:
        row: A row with the fields ``skill`` and ``answer``, and ``format`` where the skill is ``format``.
        generated: The generated continuation; what follows an end-of-turn or end-of-text mark is ignored.

    Raises:
        DataError: If the row's skill is not one of the demonstration's.
    """
    skill, answer = row.get("skill"), str(row.get("answer"))
    text = re.split(f"{re.escape(END_OF_TURN)}|{re.escape(END_OF_TEXT)}", generated, maxsplit=1)[0].strip()
    if skill == "format":
        return text == FORMATS[str(row["format"])][1](answer)
    if skill == "refusal":
        return re.match(r"sorry\b", text, re.IGNORECASE) is not None
    if skill == NEW_SKILL or skill in OLD_SKILLS:
        return re.match(re.escape(answer) + r"(?!\w)", text) is not None
    known = (*OLD_SKILLS, NEW_SKILL, "format", "refusal")
    raise DataError(f"a row has skill {skill!r}; expected one of {', '.join(known)}. Score only the demo's own rows.")
