"""The equation on bytes of checkpoints, in numpy: importing torch would take longer than grafting a small model.

Widening is exact, arithmetic is float32 (float64 where a stored dtype is float64), rounding happens once and to nearest
even: bit for bit what :mod:`shadowlit.grafting.arithmetic` and torch's own conversions give, as a test proves.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from shadowlit.errors import CheckpointError

Array = npt.NDArray[np.floating]
Raw = npt.NDArray[np.generic]
Words = npt.NDArray[np.uint32]

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
# Arrays without dimensions: operations on Python's integers and numpy's scalars take up to half as long again.
_UPPER_HALF, _HALF, _LAST, _BELOW_MIDDLE = (np.array(k, np.uint32) for k in (0xFFFF0000, 16, 1, 0x7FFF))
_WINDOW_WORDS = 2**16
_ROW = 4096  # elements of a product that is added in float32
_PAGE_BYTES, _LINE_BYTES = 4096, 64
_of_thread = threading.local()


def widen(raw: npt.NDArray[np.uint8], code: str) -> Array:
    """Return the values of flat bytes of a dtype in :data:`FLOATS`: flat, float32 (float64 for ``F64``),
    maybe shared.
    """
    if code == "BF16":
        bits = raw.view(np.uint16).astype(np.uint32)
        np.left_shift(bits, 16, out=bits)
        return bits.view(np.float32)
    stored = raw.view(_STORED[code])
    return stored.astype(np.float32) if code == "F16" else stored


def narrow(values: Array, code: str) -> Raw:
    """Flat, finite values rounded to nearest even into a stored dtype; what is too large becomes infinite.

    The result for ``BF16``, which numpy lacks, is ``uint16``.
    """
    with np.errstate(over="ignore"):
        if code in ("F64", "F32"):
            return values.astype(_STORED[code], copy=False)
        single = values.astype(np.float32, copy=False)  # half precision from float64 in two steps, as in torch
        if code == "F16":
            return single.astype(np.float16)
    return np.ascontiguousarray(_round_to_bfloat16(single.view(np.uint32)).view(np.uint16)[1::2])


def graft_part(
    raw: npt.NDArray[np.uint8], code: str, update: Array, scale: float, target: str
) -> tuple[Raw, float, float]:
    """``instruct + scale * update``, rounded once to the dtype ``target``; ``raw`` are the Instruct's bytes, flat.

    Returns:
        The part in the target dtype, and the squared norms of the scaled update and of what it lost in rounding. They
        are not finite if and only if a value of the part isn't (or a square overflows float32).
    """
    values = widen(raw, code)
    if scale != 1:
        update = update * np.asarray(scale, update.dtype)
    exact: Array = values + update
    stored = narrow(exact, target)
    with np.errstate(invalid="ignore"):  # infinities leave NaN in the squares, which is how they are found
        lost = widen(stored.view(np.uint8), target) - exact
    return stored, _square(update), _square(lost)


def graft_bfloat16(
    base: npt.NDArray[np.uint8],
    tuned: npt.NDArray[np.uint8],
    instruct: npt.NDArray[np.uint8],
    scale: float,
    out: npt.NDArray[np.uint8] | None = None,
) -> tuple[Raw, float, float]:
    """``instruct + scale * (tuned - base)`` in bfloat16: what :func:`graft_part` returns, in half the time.

    Two neighbours are computed at once, as the halves of one 32-bit word, in memory that stays in the cache. All
    arguments are flat bytes of an even number of elements; without ``out`` the result has memory of its own.
    """
    stored = (np.empty(instruct.size, np.uint8) if out is None else out).view(np.uint32)
    words = base.view(np.uint32), tuned.view(np.uint32), instruct.view(np.uint32)
    update_square = lost_square = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, stored.size, _WINDOW_WORDS):
            window = slice(start, start + _WINDOW_WORDS)
            cut = words[0][window], words[1][window], words[2][window]
            squares = _graft_words(*cut, scale=scale, out=stored[window])
            update_square, lost_square = update_square + squares[0], lost_square + squares[1]
    return stored.view(np.uint16), update_square, lost_square


def _graft_words(base: Words, tuned: Words, instruct: Words, scale: float, out: Words) -> tuple[float, float]:
    """The same for so few words that the two vectors it needs fit a core's cache."""
    update, exact = (memory[: 2 * out.size] for memory in _thread_vectors())
    split_bfloat16(tuned, update)
    split_bfloat16(base, exact)
    np.subtract(update, exact, out=update)
    if scale != 1:
        np.multiply(update, np.float32(scale), out=update)
    update_square = _square(update)
    split_bfloat16(instruct, exact)
    np.add(exact, update, out=exact)
    rounded = _round_to_bfloat16(exact.view(np.uint32), out=update.view(np.uint32))
    np.bitwise_and(rounded, _UPPER_HALF, out=rounded)
    lower, upper = rounded.reshape(2, -1)
    np.right_shift(lower, _HALF, out=out)
    np.bitwise_or(out, upper, out=out)
    lost = np.subtract(rounded.view(np.float32), exact, out=exact)
    return update_square, _square(lost)


def _square(values: Array) -> float:
    """``‖values‖²``, in rows too short for BLAS to split among threads, so that sums don't depend on their number."""
    whole = values.size // _ROW * _ROW
    rows, rest = values[:whole].reshape(-1, _ROW), values[whole:]
    return float(np.vecdot(rows, rows).sum(dtype=np.float64)) + float(np.dot(rest, rest))


def split_bfloat16(words: Words, out: npt.NDArray[np.float32]) -> None:
    """Two bfloat16 per word, [n], in float32, [2 n]: all lower halves first, then all upper ones."""
    lower, upper = out.view(np.uint32).reshape(2, -1)
    np.left_shift(words, _HALF, out=lower)
    np.bitwise_and(words, _UPPER_HALF, out=upper)


def _round_to_bfloat16(bits: Words, out: Words | None = None) -> Words:
    """float32 whose upper halves are the nearest bfloat16, of two the even one; the lower halves mean nothing."""
    out = np.right_shift(bits, _HALF, out=out)
    np.bitwise_and(out, _LAST, out=out)
    np.add(out, _BELOW_MIDDLE, out=out)
    return np.add(out, bits, out=out)


def _thread_vectors() -> list[npt.NDArray[np.float32]]:
    """Memory for the values of a window, twice, which the thread keeps."""
    if not hasattr(_of_thread, "vectors"):
        _of_thread.vectors = vectors(2, 2 * _WINDOW_WORDS)
    return _of_thread.vectors


def vectors(count: int, size: int) -> list[npt.NDArray[np.float32]]:
    """``count`` vectors [size] of zeros, aligned for speed.

    Each begins at a cache line, or every operation on it takes a third longer (numpy guarantees 16 bytes only), and at
    another place of its page than the others, or loads wait for stores that only seem to be to the same address.
    """
    stride = -(-4 * size // _PAGE_BYTES) * _PAGE_BYTES + 5 * _LINE_BYTES
    memory = np.zeros(count * stride + _PAGE_BYTES, np.uint8)
    start = -memory.ctypes.data % _PAGE_BYTES
    return [memory[start + i * stride :][: 4 * size].view(np.float32) for i in range(count)]


def is_finite(stored: Raw, code: str) -> bool:
    """Return whether no element of a stored part is NaN or infinite; one pass over its bits."""
    unsigned, exponent = _EXPONENTS[code]
    bits = stored.view(unsigned)
    return not bits.size or int((bits & unsigned(exponent)).max()) < exponent


def require_finite(name: str, stored: Raw, code: str, of: str = "") -> None:
    """Raise a CheckpointError for NaN and infinities in a part of a tensor; only :data:`FLOATS` are checked.

    ``of`` is that of :func:`not_finite`.
    """
    if code in FLOATS and not is_finite(stored, code):
        unsigned, exponent = _EXPONENTS[code]
        count = int(np.count_nonzero((stored.view(unsigned) & unsigned(exponent)) == exponent))
        raise not_finite(name, count, stored.view(unsigned).size, of)


def not_finite(name: str, count: int, size: int, of: str = "") -> CheckpointError:
    """Return the error for a tensor with NaN or infinities; ``of`` names the untrained model that holds them, if one
    does.
    """
    found = f"Tensor '{name}' has {count} of {size} values that are NaN or infinite"
    if of:
        return CheckpointError(f"{found} in the {of}. Nothing was exported; download or save this model again.")
    return CheckpointError(
        f"{found}. Nothing was exported; look for a diverged run (lower the learning rate), or a dtype too small for "
        "the values (use bfloat16)."
    )
