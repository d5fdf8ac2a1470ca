import sys

import pytest
import torch

from shadowlit.grafting import swap
from shadowlit.grafting.swap import Swap


@pytest.fixture
def small_windows(monkeypatch):
    def windows(tensor):
        for start in range(0, tensor.numel(), 4):
            yield slice(start, min(start + 4, tensor.numel()))

    monkeypatch.setattr(swap, "windows", windows)


def test_apply_swaps_and_undo_swaps_back():
    live, held = torch.arange(10.0).reshape(2, 5), -torch.arange(10.0).reshape(2, 5)
    swap = Swap(live, held)
    swap.apply()
    swap.apply()  # a second call changes nothing
    assert swap.begun
    assert torch.equal(live, -torch.arange(10.0).reshape(2, 5))
    assert torch.equal(held, torch.arange(10.0).reshape(2, 5))
    swap.undo()
    swap.undo()
    assert not swap.begun
    assert torch.equal(live, torch.arange(10.0).reshape(2, 5))


class Interrupt(BaseException):
    pass


def interrupted_after(lines: int, function) -> bool:
    """Call ``function`` and strike before its ``lines``-th line in the swap; return whether it struck."""
    left = lines

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename != swap.__file__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        function()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("direction", ["apply", "undo"])
def test_an_interrupt_before_any_line_loses_nothing(small_windows, direction):
    first, second = torch.arange(10.0), -torch.arange(10.0)
    strikes = 0
    while True:
        live, held = first.clone(), second.clone()
        swap = Swap(live, held)
        if direction == "undo":
            swap.apply()
        struck = interrupted_after(strikes, getattr(swap, direction))
        swap.undo()
        assert torch.equal(live, first) and torch.equal(held, second), f"interrupted before line {strikes}"
        if not struck:
            break
        strikes += 1
    assert strikes > 20  # three ranges of several lines each were really interrupted
