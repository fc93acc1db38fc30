"""Whether a host takes guests, by load and idle time; and who leads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.load_leader import Follow, Lead, Standing, Wait, decide
from agent.load_policy import Thresholds, Verdict, has_room, judge_host

LIMITS = Thresholds()
QUIET = (0.0, 0.0, 0.0)
IDLE = 3600.0


def verdict(
    before: Verdict | None, loads: tuple[float, float, float], idle: float = IDLE
) -> Verdict:
    return judge_host(before, loads, idle, LIMITS).verdict


def test_an_idle_host_with_little_load_accepts() -> None:
    assert verdict(None, QUIET) is Verdict.ACCEPTS


@pytest.mark.parametrize(
    ("idle", "expected"), [(29.9, Verdict.ACTIVE), (30.0, Verdict.ACCEPTS), (0.0, Verdict.ACTIVE)]
)
def test_it_is_active_for_thirty_seconds_after_input(idle: float, expected: Verdict) -> None:
    assert verdict(Verdict.ACCEPTS, QUIET, idle) is expected


@pytest.mark.parametrize("loads", [(0.8, 0, 0), (0, 1.1, 0), (0, 0, 1.6)])
def test_a_closed_host_stays_closed_while_one_load_is_above_its_limit(
    loads: tuple[float, float, float],
) -> None:
    assert verdict(Verdict.ACTIVE, loads) is Verdict.ACTIVE
    assert verdict(None, loads) is Verdict.ACTIVE


@pytest.mark.parametrize("loads", [(2.4, 0, 0), (0, 2.7, 0), (0, 0, 2.9), (2.4, 2.7, 2.9)])
def test_an_open_host_stays_open_up_to_the_higher_limits(
    loads: tuple[float, float, float],
) -> None:
    assert verdict(Verdict.ACCEPTS, loads) is Verdict.ACCEPTS


@pytest.mark.parametrize("loads", [(2.6, 0, 0), (0, 2.8, 0), (0, 0, 3.1)])
def test_an_open_host_closes_when_one_load_exceeds_its_limit(
    loads: tuple[float, float, float],
) -> None:
    judgement = judge_host(Verdict.ACCEPTS, loads, IDLE, LIMITS)
    assert judgement.verdict is Verdict.ACTIVE
    assert "load" in judgement.reason


def test_an_administrators_word_comes_first() -> None:
    judgement = judge_host(Verdict.ACCEPTS, QUIET, IDLE, LIMITS, refusal="backup tonight")
    assert (judgement.verdict, judgement.reason) == (Verdict.REFUSES, "backup tonight")
    assert judge_host(Verdict.REFUSES, (2, 0, 0), IDLE, LIMITS).verdict is Verdict.ACTIVE


loads = st.tuples(*[st.floats(0, 10)] * 3)


@given(loads, st.floats(0, 1000))
def test_what_accepts_when_closed_accepts_when_open(
    now: tuple[float, float, float], idle: float
) -> None:
    if verdict(Verdict.ACTIVE, now, idle) is Verdict.ACCEPTS:
        assert verdict(Verdict.ACCEPTS, now, idle) is Verdict.ACCEPTS


@pytest.mark.parametrize(
    ("used", "rooms"),
    [
        ((0, 0, 0), (True, True, True)),
        ((1, 0, 0), (False, True, True)),
        ((0, 1, 0), (False, False, True)),
        ((0, 0, 1), (False, False, False)),
        ((1, 1, 0), (False, False, True)),
    ],
)
def test_guests_of_lower_priority_leave_room(
    used: tuple[int, int, int], rooms: tuple[bool, bool, bool]
) -> None:
    assert tuple(has_room(used, 1, priority) for priority in range(3)) == rooms


# ---------------------------------------------------------------------- who leads

ORDER = ("a", "b", "c")
IDLES = Standing(False, 4)
LEADS = Standing(True, 4)


def test_who_leads_keeps_leading() -> None:
    assert decide("a", IDLES, ORDER, {"c": LEADS, "b": IDLES}) == Follow("c")
    assert decide("c", LEADS, ORDER, {"a": IDLES, "b": IDLES}) == Lead(4)


def test_if_nobody_leads_the_first_reachable_takes_over_with_a_higher_term() -> None:
    assert decide("a", IDLES, ORDER, {"b": IDLES, "c": Standing(False, 7)}) == Lead(8)
    assert decide("b", IDLES, ORDER, {"c": IDLES}) == Lead(5)
    assert decide("c", IDLES, ORDER, {}) == Lead(5)


def test_the_others_wait_for_it() -> None:
    assert decide("b", IDLES, ORDER, {"a": IDLES}) == Wait()
    assert decide("c", IDLES, ORDER, {"b": IDLES}) == Wait()


def test_a_host_that_is_no_candidate_never_leads() -> None:
    assert decide("x", IDLES, ORDER, {}) == Wait()
    assert decide("x", IDLES, ORDER, {"b": LEADS}) == Follow("b")


def test_of_two_that_lead_the_one_with_the_lower_term_steps_down() -> None:
    old, new = Standing(True, 4), Standing(True, 5)
    assert decide("a", old, ORDER, {"b": new}) == Follow("b")
    assert decide("b", new, ORDER, {"a": old}) == Lead(5)
    assert decide("c", IDLES, ORDER, {"a": old, "b": new}) == Follow("b")


def test_of_two_with_the_same_term_the_later_candidate_steps_down() -> None:
    assert decide("b", LEADS, ORDER, {"a": LEADS}) == Follow("a")
    assert decide("a", LEADS, ORDER, {"b": LEADS}) == Lead(4)


standings = st.builds(Standing, st.booleans(), st.integers(0, 3))


@given(st.lists(standings, min_size=3, max_size=3))
def test_when_all_see_each_other_one_leads_in_the_end(each: list[Standing]) -> None:
    now = dict(zip(ORDER, each, strict=True))
    for _ in range(6):
        for me in ORDER:
            others = {host: standing for host, standing in now.items() if host != me}
            term = max(standing.term for standing in now.values())
            match decide(me, now[me], ORDER, others):
                case Lead(number):
                    now[me] = Standing(True, number)
                case _:
                    now[me] = Standing(False, term)
    assert [standing.leads for standing in now.values()].count(True) == 1
