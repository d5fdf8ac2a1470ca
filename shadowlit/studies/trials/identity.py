"""What must stay the same between the trials of one undertaking, compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def changes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The names of what differs, with commas between; empty if nothing does."""
    return ", ".join(sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)))
