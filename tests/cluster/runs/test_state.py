"""Lives, attempts and the state of a run, on both kinds of store."""

import pytest

from cluster.runs.state import NONE_YET, Attempt, State, Superseded, assert_newest_life, newest_attempt, open_life, read_state, write_state
from cluster.storage import Store


def test_a_later_attempt_is_newer_and_a_later_life_is_newer_than_all_attempts_of_the_one_before() -> None:
    in_order = [Attempt(1, NONE_YET), Attempt(1, 0), Attempt(1, 2), Attempt(1, 10), Attempt(2, NONE_YET), Attempt(2, 0)]
    assert sorted(in_order, reverse=True)[::-1] == in_order
    assert [Attempt.parse(str(one)) for one in in_order[1:4]] == in_order[1:4] and Attempt.parse("000002") == Attempt(2, NONE_YET)


def test_what_is_older_than_the_newest_life_or_attempt_may_not_write(store: Store) -> None:
    life = open_life(store, {})
    assert_newest_life(store, life, 0)
    store.create("lives/000001.0.json", b"{}")
    store.create("lives/000001.1.json", b"{}")
    assert newest_attempt(store) == (1, 1)
    assert_newest_life(store, life)
    assert_newest_life(store, life, 1)
    with pytest.raises(Superseded, match=r"attempt 000001\.1 of .* has begun; 000001\.0 stops without writing any more"):
        assert_newest_life(store, life, 0)
    assert open_life(store, {}) == 2
    for attempt in (None, 0, 1, 7):
        with pytest.raises(Superseded, match=r"life 2 of .* has begun; life 1 stops"):
            assert_newest_life(store, life, attempt)


def test_a_life_that_is_over_leaves_the_state_alone_also_before_its_successor_has_written_one(store: Store) -> None:
    write_state(store, State("RUNNING", open_life(store, {}), "", ""))
    open_life(store, {})
    with pytest.raises(Superseded):
        write_state(store, State("FAILED", 1, "", ""))
    write_state(store, State("RUNNING", 2, "", ""))
    with pytest.raises(Superseded, match=r"life 2 of .* owns state\.json"):
        write_state(store, State("DONE", 1, "", ""))
    state = read_state(store)
    assert state and (state.status, state.life) == ("RUNNING", 2)
