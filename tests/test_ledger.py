"""attnbench.ledger: every second is counted once, where it was spent."""

from __future__ import annotations

import pytest

from attnbench import ledger
from attnbench.ledger import Ledger


@pytest.fixture
def now(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(ledger.time, "monotonic", lambda: clock[0])
    return clock


def test_what_is_inside_another_part_counts_for_the_inner_one_alone(now):
    books = Ledger()
    with books.spend(ledger.WAITING):
        now[0] += 1
        with books.spend(ledger.CHECK):
            now[0] += 2
            with books.spend(ledger.ORACLE):
                now[0] += 4
            now[0] += 8
        with books.spend(ledger.CHECK):
            now[0] += 16
    now[0] += 32
    shares = books.shares
    assert {part: s for part, s in shares.items() if s} == {
        ledger.WAITING: 1.0,
        ledger.CHECK: 26.0,
        ledger.ORACLE: 4.0,
        "other": 32.0,
    }


def test_an_exception_ends_a_part_too(now):
    books = Ledger()

    def fail():
        with books.spend(ledger.START):
            now[0] += 3
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert books.shares[ledger.START] == 3.0


def test_what_a_worker_says_is_moved(now):
    books = Ledger()
    with books.spend(ledger.WAITING):
        now[0] += 10
    books.move(6.0, ledger.WAITING, ledger.TIMED)
    assert (books.shares[ledger.WAITING], books.shares[ledger.TIMED]) == (4.0, 6.0)
    assert str(books) == "10 s: timed calls 60%, warm-up and waiting 40%"
