"""Which of the requests that were under way in a crash runs again, and when."""

import pytest

from hhh_router.errors import Quarantined
from hhh_router.model.quarantine import Quarantine, chat_digest, read_digest
from hhh_router.types import ChatRequest, Message, ReadRequest, Sampling


def test_without_a_crash_everything_starts_at_once() -> None:
    quarantine, started = Quarantine(), []
    for name in ("a", "b", "a"):
        quarantine.admit(name, lambda name=name: started.append(name))

    assert started == ["a", "b", "a"]


def test_suspects_run_one_at_a_time_and_others_are_not_held_up() -> None:
    quarantine, started = Quarantine(), []
    quarantine.crashed({"a", "b"})
    for name in ("a", "b", "new"):
        quarantine.admit(name, lambda name=name: started.append(name))
    assert started == ["a", "new"]

    quarantine.ended("a")

    assert started == ["a", "new", "b"]
    quarantine.ended("b")
    quarantine.admit("a", lambda: started.append("a"))
    quarantine.admit("b", lambda: started.append("b"))
    assert started[3:] == ["a", "b"]  # neither is suspect any more


def test_the_suspect_that_ran_in_a_second_crash_is_refused_and_those_beside_it_are_not() -> None:
    quarantine, started = Quarantine(), []
    quarantine.crashed({"a", "b"})
    quarantine.admit("b", lambda: started.append("b"))
    quarantine.crashed({"b", "new"})

    with pytest.raises(Quarantined):
        quarantine.admit("b", lambda: started.append("b"))
    for name in ("a", "new"):
        quarantine.admit(name, lambda name=name: started.append(name))
    assert started == ["b", "a", "new"]


def test_a_suspect_whose_caller_left_stays_suspect_and_lets_the_next_one_run() -> None:
    quarantine, started = Quarantine(), []
    quarantine.crashed({"a", "b"})
    for name in ("a", "b"):
        quarantine.admit(name, lambda name=name: started.append(name))
    quarantine.ended("a", cancelled=True)
    quarantine.admit("a", lambda: started.append("a again"))

    assert started == ["a", "b"]
    quarantine.ended("b")
    assert started == ["a", "b", "a again"]


def test_suspicion_ends_after_a_while() -> None:
    now = [0.0]
    quarantine, started = Quarantine(lambda: now[0]), []
    quarantine.crashed({"a"})
    quarantine.admit("a", lambda: None)
    quarantine.crashed({"a"})
    now[0] = 601.0

    quarantine.admit("a", lambda: started.append("a"))

    assert started == ["a"]


def test_digests_name_what_is_asked_and_not_who_asks() -> None:
    one = ChatRequest(messages=(Message(role="user", content="x"),), request_id="1", timeout_s=5)
    same = ChatRequest(messages=(Message(role="user", content="x"),), request_id="2")
    other = ChatRequest(messages=(Message(role="user", content="x"),), sampling=Sampling(max_tokens=3))

    assert chat_digest(one) == chat_digest(same) != chat_digest(other)
    assert read_digest((ReadRequest(response="a"),)) != read_digest((ReadRequest(response="b"),))
