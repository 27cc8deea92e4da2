"""What one rank meets alone, all end with: the same error, told by rank 0."""

import threading
import time
from pathlib import Path

import pytest

from preftune.distributed.folders import look_at_folder
from preftune.distributed.ranks import ALONE
from preftune.errors import (
    CacheError,
    ConfigError,
    DataError,
    Interrupted,
    PreftuneError,
    PushFailed,
)
from tests.ranks import on_ranks


def raised(outcomes, kind, text):
    """All ranks raise the same, which rank 0 tells."""
    assert {type(error) for error in outcomes} == {kind}
    assert {str(error) for error in outcomes} == {text}
    assert [error.rank for error in outcomes] == list(range(len(outcomes)))


def test_alone_nothing_is_asked_and_errors_stay_as_they_are():
    error = DataError("no")
    assert ALONE.together(lambda: 3) == ALONE.decide(lambda: 3) == 3
    assert ALONE.leaders_first(lambda: 3, is_leader=False) == 3
    ALONE.agree({"a": object()}, "")

    def fail():
        raise error

    for method in (ALONE.together, ALONE.decide):
        with pytest.raises(DataError) as caught:
            method(fail)
        assert caught.value is error
        assert error.rank is None


def test_slow_work_of_rank_0_is_awaited_by_all_in_short_waits(monkeypatch):
    monkeypatch.setattr("preftune.distributed.ranks._BEAT_SECONDS", 0.02)
    threads = []

    def work(ranks):
        def slow():
            time.sleep(0.2)
            threads.append(ranks.rank)
            return 7

        return ranks.decide_slowly(slow, lambda: None)

    assert on_ranks(3, work) == [7, 7, 7]
    assert threads == [0]
    assert ALONE.decide_slowly(lambda: 3, lambda: None) == 3


def test_slow_work_that_fails_or_is_broken_off_ends_all_ranks(monkeypatch):
    monkeypatch.setattr("preftune.distributed.ranks._BEAT_SECONDS", 0.02)
    error, never = PushFailed("no luck"), threading.Event()

    def fail():
        raise error

    raised(on_ranks(2, lambda r: r.decide_slowly(fail, lambda: None)), PushFailed, "no luck")
    outcomes = on_ranks(2, lambda r: r.decide_slowly(never.wait, lambda: "SIGTERM"))
    never.set()
    raised(outcomes, Interrupted, "SIGTERM")


def test_together_gives_each_rank_its_own_value():
    assert on_ranks(3, lambda ranks: ranks.together(lambda: ranks.rank + 10)) == [10, 11, 12]


def test_a_failure_of_one_rank_is_the_failure_of_all():
    def work(ranks):
        def fail():
            if ranks.rank == 2:
                raise DataError(["no file", "no row"])

        ranks.together(fail)

    where = "on rank 2 of 4 (host host1): "
    raised(on_ranks(4, work), DataError, str(DataError([where + "no file", where + "no row"])))


def test_the_first_of_several_is_told():
    def work(ranks):
        def fail():
            if ranks.rank:
                raise CacheError(f"fault {ranks.rank}")

        ranks.together(fail)

    text = "on rank 1 of 3 (host host0, and on 1 other ranks): fault 1"
    raised(on_ranks(3, work), CacheError, text)


def test_what_all_ranks_find_is_told_as_by_one():
    def work(ranks):
        def fail():
            raise ConfigError("wrong everywhere")

        ranks.together(fail)

    raised(on_ranks(2, work), ConfigError, "wrong everywhere")


def test_faults_of_machine_and_program_travel_too(tmp_path):
    missing = tmp_path / "missing"

    def read(ranks):
        ranks.together(lambda: missing.read_text() if ranks.rank else "")

    text = f"on rank 1 of 2 (host host0): No such file or directory ({missing})"
    outcomes = on_ranks(2, read)
    raised(outcomes, PreftuneError, text)
    assert outcomes[0].exit_code == 1

    def divide(ranks):
        ranks.together(lambda: 1 // (1 - ranks.rank))

    for error in on_ranks(2, divide):
        assert str(error).startswith("on rank 1 of 2 (host host0): Traceback")
        assert "ZeroDivisionError" in str(error)


def test_rank_0_decides_and_fails_for_all():
    assert on_ranks(3, lambda ranks: ranks.decide(lambda: ranks.rank + 5)) == [5, 5, 5]

    def work(ranks):
        def fail():
            raise DataError(f"of rank {ranks.rank}")

        ranks.decide(fail)

    raised(on_ranks(3, work), DataError, "of rank 0")


def test_leaders_go_first_and_fail_first():
    order = []

    def work(ranks):
        return ranks.leaders_first(
            lambda: order.append(ranks.rank) or ranks.rank, is_leader=ranks.rank in (1, 2)
        )

    assert on_ranks(4, work) == [0, 1, 2, 3]
    assert (set(order[:2]), set(order[2:])) == ({1, 2}, {0, 3})

    def fail(ranks):
        def refuse():
            order.append(ranks.rank)
            raise DataError("no")

        ranks.leaders_first(refuse, is_leader=ranks.rank == 1)

    order.clear()
    raised(on_ranks(2, fail), DataError, "on rank 1 of 2 (host host0): no")
    assert order == [1]


def test_ranks_that_know_different_things_are_named():
    def work(ranks):
        facts = {"the data": "a", "torch": 1 if ranks.rank < 2 else 2}
        if ranks.rank == 0:
            facts["only here"] = 3
        ranks.agree(facts, "fix it")

    torch = "torch differs between ranks: 1 on rank 0 (host host0), rank 1 (host host0); "
    torch += "2 on rank 2 (host host1); fix it"
    here = "only here differs between ranks: 3 on rank 0 (host host0); "
    here += "not there on rank 1 (host host0), rank 2 (host host1); fix it"
    raised(on_ranks(3, work), ConfigError, str(ConfigError([torch, here])))
    assert on_ranks(3, lambda ranks: ranks.agree({"a": 1}, "")) == [None] * 3


def test_of_many_ranks_a_few_are_named():
    with_error = on_ranks(8, lambda ranks: ranks.agree({"x": ranks.rank == 0}, "r"))
    assert "rank 4 (host host2) and 3 more ranks; r" in str(with_error[0])


def test_ranks_find_who_shares_a_folder(tmp_path):
    """Two hosts of two ranks, each host with a folder of its own; then all with one."""

    def look(ranks):
        return look_at_folder(ranks, "cache_dir", tmp_path / ranks.host / "cache")

    seen = on_ranks(4, look)
    assert {s.leaders for s in seen} == {(0, 0, 2, 2)}
    assert {s.hosts for s in seen} == {("host0", "host0", "host1", "host1")}
    assert not seen[0].is_shared
    assert [seen[0].leads(rank) for rank in range(4)] == [True, False, True, False]
    shared = on_ranks(4, lambda ranks: look_at_folder(ranks, "cache_dir", tmp_path / "one"))
    assert {(s.leaders, s.is_shared) for s in shared} == {((0, 0, 0, 0), True)}
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_that_one_rank_cannot_write_is_told_by_all(tmp_path):
    file = tmp_path / "file"
    file.write_text("")

    def look(ranks):
        return look_at_folder(ranks, "cache_dir", (file if ranks.rank == 3 else tmp_path) / "x")

    text = f"on rank 3 of 4 (host host1): cache_dir is '{file}/x', where nothing can be written "
    text += "(Not a directory); free some space there, or give another --cache_dir"
    raised(on_ranks(4, look), ConfigError, text)
    assert list(Path(tmp_path / "x").iterdir()) == []


def test_alone_no_folder_is_made(tmp_path):
    assert look_at_folder(ALONE, "cache_dir", tmp_path / "x").is_shared
    assert list(tmp_path.iterdir()) == []
