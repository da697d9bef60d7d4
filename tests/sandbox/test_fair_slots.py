"""Order in which threads get the slots of a pool."""

from __future__ import annotations

import threading
import time

import pytest

from nemocascade.sandbox.fair_slots import FairSlots


def wait_for(slots: FairSlots[int], waiting: int) -> None:
    deadline = time.monotonic() + 10
    while len(slots._waiting) < waiting:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_slots_are_given_in_the_order_of_requests() -> None:
    """Also to a thread that asks for all, and not to the thread that has just returned one."""
    slots = FairSlots([0, 1])
    order: list[str] = []

    def take(name: str, count: int) -> None:
        with slots.take(count) as held:
            assert len(held) == count
            order.append(name)

    threads = []
    with slots.take() as (first,):
        assert first == 1
        for number in range(3):
            thread = threading.Thread(target=take, args=(str(number), 2))
            thread.start()
            threads.append(thread)
            wait_for(slots, number + 1)
        assert order == [], "a slot is free, but the first in line needs both"
    take("again", 2)
    for thread in threads:
        thread.join()
    assert order == ["0", "1", "2", "again"]
    assert sorted(slots.idle()) == [0, 1]


def test_a_slot_that_was_replaced_or_whose_holder_failed_returns() -> None:
    slots = FairSlots([0])

    def fail() -> None:
        with slots.take() as held:
            held[0] = 7
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert slots.idle() == [7]


def test_slots_are_spare_only_if_nobody_waits() -> None:
    slots = FairSlots([0, 1, 2])
    assert slots.spare == 3

    def take_all() -> None:
        with slots.take(3):
            pass

    thread = threading.Thread(target=take_all)
    with slots.take():
        assert slots.spare == 2
        thread.start()
        wait_for(slots, 1)
        assert slots.spare == 0
    thread.join()
    assert slots.spare == 3
