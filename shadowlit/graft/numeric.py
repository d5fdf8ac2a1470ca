"""The equation on bytes of checkpoints, in numpy: importing torch would take longer than grafting a small model.

Widening is exact, arithmetic is float32 (float64 where a stored dtype is float64), rounding happens once and to
nearest even: bit for bit what :mod:`shadowlit.graft.arithmetic` and torch's own conversions give, which a test proves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from shadowlit.errors import CheckpointError

Array = npt.NDArray[np.floating]
Raw = npt.NDArray[np.generic]

_STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
# All bits of the exponent, as an unsigned integer of the stored width: set in NaN and infinities only.
_EXPONENTS: dict[str, tuple[Any, int]] = {
    "F64": (np.uint64, 0x7FF << 52),
    "F32": (np.uint32, 0xFF << 23),
    "F16": (np.uint16, 0x1F << 10),
    "BF16": (np.uint16, 0xFF << 7),
}
FLOATS = frozenset(_EXPONENTS)
"""Codes of the dtypes that can be computed with."""


def widen(raw: npt.NDArray[np.uint8], code: str) -> Array:
    """The values of stored bytes.

    Args:
        raw: flat bytes, whole elements; may be shared with the result.
        code: of their dtype, one of :data:`FLOATS`.

    Returns:
        Flat, float32, or float64 for ``F64``.
    """
    if code == "BF16":
        bits = raw.view(np.uint16).astype(np.uint32)
        np.left_shift(bits, 16, out=bits)
        return bits.view(np.float32)
    stored = raw.view(_STORED[code])
    return stored.astype(np.float32) if code == "F16" else stored


def narrow(values: Array, code: str) -> Raw:
    """Finite values rounded to nearest even into a stored dtype; what is too large becomes infinite.

    Args:
        values: flat, float32 or float64.
        code: one of :data:`FLOATS`.

    Returns:
        Flat; ``uint16`` for ``BF16``, which numpy lacks.
    """
    with np.errstate(over="ignore"):
        if code in ("F64", "F32"):
            return values.astype(_STORED[code], copy=False)
        single = values.astype(np.float32, copy=False)  # half precision from float64 in two steps, as in torch
        if code == "F16":
            return single.astype(np.float16)
    bits = single.view(np.uint32)
    rounded = bits >> 16
    np.bitwise_and(rounded, 1, out=rounded)
    np.add(rounded, 0x7FFF, out=rounded)
    np.add(rounded, bits, out=rounded)
    return np.ascontiguousarray(rounded.view(np.uint16)[1::2])


def graft_part(
    raw: npt.NDArray[np.uint8], code: str, update: Array, scale: float, target: str
) -> tuple[Raw, float, float]:
    """``instruct + scale * update``, rounded once.

    Args:
        raw: flat bytes of the Instruct's part.
        code: of their dtype.
        update: flat, the same elements.
        scale: λ.
        target: the code of the result's dtype.

    Returns:
        The part in the target dtype, and two squared norms: of the scaled update, and of what rounding took from it.
        They are not finite if and only if a value of the part isn't (or a square overflows float32).
    """
    values = widen(raw, code)
    if scale != 1:
        update = update * np.asarray(scale, update.dtype)
    exact: Array = values + update
    stored = narrow(exact, target)
    with np.errstate(invalid="ignore"):  # infinities leave NaN in the squares, which is how they are found
        lost = widen(stored.view(np.uint8), target) - exact
    return stored, float(np.dot(update, update)), float(np.dot(lost, lost))


def is_finite(stored: Raw, code: str) -> bool:
    """Whether no element of a stored part is NaN or infinite; one pass over its bits."""
    unsigned, exponent = _EXPONENTS[code]
    bits = stored.view(unsigned)
    return not bits.size or int((bits & unsigned(exponent)).max()) < exponent


def require_finite(name: str, stored: Raw, code: str) -> None:
    """Refuse NaN and infinities: a model that holds one is useless, and loads without a word.

    Args:
        name: the tensor's name, for the message.
        stored: a part of it.
        code: of its dtype; others than :data:`FLOATS` pass.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    if code in FLOATS and not is_finite(stored, code):
        unsigned, exponent = _EXPONENTS[code]
        count = int(np.count_nonzero((stored.view(unsigned) & unsigned(exponent)) == exponent))
        raise not_finite(name, count, stored.view(unsigned).size)


def not_finite(name: str, count: int, size: int) -> CheckpointError:
    """The error for a tensor with NaN or infinities."""
    return CheckpointError(
        f"Tensor '{name}' has {count} of {size} values that are NaN or infinite. Nothing was exported; look for a "
        "diverged run (lower the learning rate), or a dtype too small for the values (use bfloat16)."
    )


def finite_squares(*squares: float) -> bool:
    """Whether the squared norms of :func:`graft_part` say that all is well."""
    return all(map(math.isfinite, squares))
