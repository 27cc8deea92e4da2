"""Values come in order, one step early, and errors at their step."""

import threading

import pytest

from preftune.training.ahead import Ahead


def test_values_come_in_order_and_the_next_one_is_made_meanwhile():
    made = []
    second = threading.Event()

    def make(step: int) -> int:
        made.append((step, threading.current_thread().name))
        if step == 4:
            second.set()
        return step * step

    with Ahead(make, 3, 6) as values:
        taken = iter(values)
        assert next(taken) == 9
        assert second.wait(5)  # made while the first is in use, without being asked for
        assert list(taken) == [16, 25]
    assert [step for step, _ in made] == [3, 4, 5]
    assert {name.startswith("preftune-data") for _, name in made} == {True}


def test_an_error_is_raised_at_its_step():
    def make(step: int) -> int:
        return 1 // (2 - step)

    got = []
    with pytest.raises(ZeroDivisionError), Ahead(make, 0, 5) as values:
        got.extend(values)
    assert got == [0, 1]


def test_nothing_is_made_for_no_steps():
    with Ahead(lambda step: 1 // 0, 2, 2) as values:
        assert list(values) == []
