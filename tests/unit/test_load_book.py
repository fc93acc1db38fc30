"""The load database's choices: which host, for whom, for how long, and who is told what."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.load_book import AGENT_GRACE_SECONDS, NOTIFY_AGAIN_SECONDS, LoadBook
from agent.load_database import Session
from agent.load_policy import Verdict
from agent.load_report import Report
from migrate.errors import PeerError, UserError
from migrate.mig_messages import (
    Event,
    GiveBack,
    GuestCount,
    Held,
    HostLost,
    HostState,
    MoreHosts,
    Priority,
    RequestHosts,
)

ALICE, BOB, CAROL = 1001, 1002, 1003
DOWN_SECONDS = 180.0
LOW, NORMAL, HIGH = Priority.LOW, Priority.NORMAL, Priority.HIGH


def report(idle: float = 100.0, verdict: Verdict = Verdict.ACCEPTS, **other: object) -> Report:
    return Report(machine="x86_64", verdict=verdict, loads=(0, 0, 0), idle_seconds=idle, **other)  # type: ignore[arg-type]


class Cluster:
    """A book, and what it has said."""

    def __init__(self, **idle_seconds: float) -> None:
        self.told: list[tuple[Session, Event]] = []
        self.evicted: list[tuple[str, int]] = []
        self.book = LoadBook(
            lambda session, event: self.told.append((session, event)),
            lambda host, uid, reason: self.evicted.append((host, uid)),
            down_seconds=DOWN_SECONDS,
            give_back_seconds=15.0,
        )
        self.now = 1000.0
        self.book.add_host("desk", 99)
        self.report("desk", idle=0, verdict=Verdict.ACTIVE)
        for number, (name, idle) in enumerate(idle_seconds.items()):
            self.book.add_host(name, number)
            self.report(name, idle=idle)
        self._clients = 0

    def report(self, host: str, **words: object) -> None:
        self.book.report(host, report(**words), self.now)  # type: ignore[arg-type]

    def client(self, uid: int = ALICE) -> Session:
        self._clients += 1
        session = Session("desk", self._clients)
        self.book.open(session, uid)
        return session

    def ask(self, session: Session, count: int = 1, **words: object) -> tuple[str, ...]:
        return self.book.request(session, RequestHosts(count, **words), self.now)  # type: ignore[arg-type]

    def give_back(self, session: Session, *hosts: str) -> int:
        return self.book.give_back(session, hosts or None, self.now)

    def state(self, host: str) -> HostState:
        return self.book.info(host, self.now).state

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.book.tick(self.now)

    def events(self, session: Session) -> list[Event]:
        found = [event for whom, event in self.told if whom == session]
        self.told = [one for one in self.told if one[0] != session]
        return found


def guest(uid: int, count: int = 1, priority: Priority = NORMAL) -> tuple[GuestCount, ...]:
    return (GuestCount(uid, "somebody", "desk", priority, count),)


def test_the_host_that_is_idle_longest_is_chosen_first() -> None:
    cluster = Cluster(a=50, b=500, c=5)
    assert cluster.ask(cluster.client(), 3) == ("b", "a", "c")


def test_a_report_changes_the_order() -> None:
    cluster = Cluster(a=50, b=500)
    cluster.report("a", idle=900)
    assert cluster.ask(cluster.client()) == ("a",)


def test_time_since_the_report_counts_as_idle() -> None:
    cluster = Cluster(a=50)
    cluster.now += 60
    cluster.book.add_host("b", 7)
    cluster.report("b", idle=100)
    assert cluster.ask(cluster.client()) == ("a",)
    assert cluster.book.info("a", cluster.now).idle_seconds == 110


def test_the_clients_own_host_and_the_excluded_are_not_chosen() -> None:
    cluster = Cluster(a=50, b=500, c=5)
    cluster.report("desk", idle=9999)
    assert cluster.ask(cluster.client(), exclude=("b",)) == ("a",)


def test_only_hosts_of_the_same_architecture() -> None:
    cluster = Cluster(a=50)
    cluster.book.report(
        "a",
        Report(machine="aarch64", verdict=Verdict.ACCEPTS, loads=(0, 0, 0), idle_seconds=50),
        cluster.now,
    )
    client = cluster.client()
    assert cluster.ask(client) == ()
    assert cluster.ask(client, machine="aarch64") == ("a",)


def test_a_claimed_host_is_not_given_twice_and_is_free_when_returned() -> None:
    cluster = Cluster(a=50)
    first, second = cluster.client(), cluster.client(BOB)
    assert cluster.ask(first) == ("a",)
    assert cluster.state("a") is HostState.FULL
    assert cluster.ask(second) == ()
    assert cluster.give_back(first, "a") == 1
    assert cluster.give_back(first, "a") == 0
    assert cluster.ask(second) == ("a",)


def test_a_host_without_guests_comes_before_one_with_some() -> None:
    cluster = Cluster(a=50, b=500)
    cluster.report("b", idle=500, slots=4, guests=guest(BOB))
    assert cluster.state("b") is HostState.PART_USED
    assert cluster.ask(cluster.client(), 2) == ("a", "b")


def test_claims_end_when_the_client_has_gone() -> None:
    cluster = Cluster(a=50, b=40)
    client = cluster.client()
    cluster.ask(client, 2)
    cluster.book.close(client, cluster.now)
    assert cluster.state("a") is cluster.state("b") is HostState.IDLE
    with pytest.raises(UserError, match="not known"):
        cluster.ask(client)


# ---------------------------------------------------------------------- priorities


def test_higher_priorities_find_room_beside_lower_ones() -> None:
    cluster = Cluster(a=50)
    client = cluster.client()
    assert cluster.ask(client, priority=LOW) == ("a",)
    assert cluster.state("a") is HostState.PART_USED
    assert cluster.ask(client, priority=LOW) == ()
    assert cluster.ask(client, priority=NORMAL) == ("a",)
    assert cluster.ask(client, priority=NORMAL) == ()
    assert cluster.ask(client, priority=HIGH) == ("a",)
    assert cluster.ask(client, priority=HIGH) == ()


def test_lower_priorities_find_no_room_beside_higher_ones() -> None:
    cluster = Cluster(a=50)
    client = cluster.client()
    assert cluster.ask(client, priority=HIGH) == ("a",)
    assert cluster.ask(client, priority=NORMAL) == cluster.ask(client, priority=LOW) == ()


def test_guests_fill_slots_as_claims_do_but_not_both() -> None:
    cluster = Cluster(a=50)
    client = cluster.client()
    cluster.report("a", slots=2)
    cluster.ask(client)
    cluster.report("a", slots=2, guests=guest(ALICE))
    assert cluster.ask(client) == ("a",)
    assert cluster.ask(client) == ()
    cluster.give_back(client)
    assert cluster.state("a") is HostState.PART_USED


# ---------------------------------------------------------------------- states


@pytest.mark.parametrize("verdict", [Verdict.ACTIVE, Verdict.REFUSES])
def test_a_host_that_closes_is_lost_to_its_holder(verdict: Verdict) -> None:
    cluster = Cluster(a=50, b=40)
    client = cluster.client()
    cluster.ask(client)
    cluster.report("a", verdict=verdict, reason="somebody works there")
    assert cluster.state("a").value == verdict.value
    assert cluster.events(client) == [HostLost("a", "somebody works there")]
    assert not cluster.book.confirm(client, "a")
    assert cluster.ask(client, 2) == ("b",)


def test_a_host_not_heard_of_is_down_and_comes_back_with_a_report() -> None:
    cluster = Cluster(a=50)
    client = cluster.client()
    cluster.ask(client)
    cluster.wait(DOWN_SECONDS)
    assert cluster.state("a") is HostState.FULL
    cluster.wait(1)
    assert cluster.state("a") is HostState.DOWN
    assert HostLost("a", "it is down") in cluster.events(client)
    assert cluster.ask(client) == ()
    cluster.report("a")
    assert cluster.ask(client) == ("a",)


def test_a_sign_of_life_is_enough_to_stay_up() -> None:
    cluster = Cluster(a=50)
    cluster.now += DOWN_SECONDS - 1
    cluster.book.heard("a", cluster.now)
    cluster.wait(10)
    assert cluster.state("a") is HostState.IDLE


def test_a_host_whose_connection_has_ended_is_not_chosen() -> None:
    cluster = Cluster(a=50)
    cluster.book.absent("a")
    assert cluster.ask(cluster.client()) == ()
    cluster.book.heard("a", cluster.now)
    assert cluster.ask(cluster.client()) == ("a",)


def test_only_a_host_that_is_down_can_be_deleted() -> None:
    cluster = Cluster(a=50)
    with pytest.raises(UserError, match="is up"):
        cluster.book.delete_host("a")
    cluster.wait(DOWN_SECONDS + 1)
    cluster.book.delete_host("a")
    with pytest.raises(UserError, match="not in the load database"):
        cluster.book.info("a", cluster.now)


@pytest.mark.parametrize(
    "wrong",
    [
        {"idle": float("nan")},
        {"idle": float("inf")},
        {"version": 99},
        {"cpu_percent": float("nan")},
    ],
)
def test_nonsense_in_a_report_changes_nothing(wrong: dict[str, object]) -> None:
    cluster = Cluster(a=50)
    with pytest.raises(PeerError):
        cluster.report("a", **wrong)
    assert cluster.book.info("a", cluster.now).idle_seconds == 50


# ---------------------------------------------------------------------- MIG_PROC_AGENT


def test_an_agents_claim_outlives_its_client_until_the_guest_is_seen_and_gone() -> None:
    cluster = Cluster(a=50)
    client = cluster.client()
    cluster.ask(client, agent=True)
    cluster.book.close(client, cluster.now)
    assert cluster.state("a") is HostState.FULL
    cluster.report("a", guests=guest(ALICE))
    assert cluster.book.info("a", cluster.now).claims == 0
    assert cluster.state("a") is HostState.FULL
    cluster.report("a")
    assert cluster.state("a") is HostState.IDLE


def test_an_agents_claim_ends_if_no_guest_comes() -> None:
    cluster = Cluster(a=50)
    client = cluster.client()
    cluster.ask(client, agent=True)
    cluster.book.close(client, cluster.now)
    cluster.wait(AGENT_GRACE_SECONDS + 1)
    assert cluster.state("a") is HostState.IDLE


def test_anothers_guest_does_not_end_an_agents_claim() -> None:
    cluster = Cluster(a=50)
    cluster.report("a", slots=2)
    cluster.ask(cluster.client(), agent=True)
    cluster.report("a", slots=2, guests=guest(BOB))
    assert cluster.book.info("a", cluster.now).claims == 1


# ---------------------------------------------------------------------- notifications


def test_who_asked_for_more_is_told_when_there_is_more() -> None:
    cluster = Cluster(a=50)
    first, second = cluster.client(), cluster.client(BOB)
    cluster.ask(first)
    assert cluster.ask(second, 2, notify=True) == ()
    assert cluster.events(second) == []
    cluster.give_back(first)
    assert cluster.events(second) == [MoreHosts()]
    assert cluster.ask(second) == ("a",)


def test_who_did_not_ask_to_be_told_is_not() -> None:
    cluster = Cluster(a=50)
    first, second = cluster.client(), cluster.client(BOB)
    cluster.ask(first)
    cluster.ask(second)
    cluster.give_back(first)
    assert cluster.events(second) == []


def test_a_new_host_is_news_too() -> None:
    cluster = Cluster()
    client = cluster.client()
    cluster.ask(client, notify=True)
    cluster.book.add_host("a", 1)
    cluster.report("a")
    assert cluster.events(client) == [MoreHosts()]


def test_who_has_least_is_told_first_and_then_the_next_if_it_does_not_come() -> None:
    cluster = Cluster(a=50, b=40, c=30)
    rich, poor, other = cluster.client(ALICE), cluster.client(BOB), cluster.client(CAROL)
    cluster.ask(rich, 2)
    cluster.ask(other)
    cluster.ask(rich, notify=True)
    cluster.ask(poor, notify=True)
    cluster.events(rich)
    cluster.give_back(other)
    assert (cluster.events(poor), cluster.events(rich)) == ([MoreHosts()], [])
    cluster.wait(NOTIFY_AGAIN_SECONDS / 2)
    assert (cluster.events(poor), cluster.events(rich)) == ([], [MoreHosts()])


# ---------------------------------------------------------------------- fairness


def test_who_has_many_is_asked_to_give_one_to_who_has_none() -> None:
    cluster = Cluster(a=50, b=40, c=30)
    rich, poor = cluster.client(ALICE), cluster.client(BOB)
    cluster.ask(rich, 3)
    assert cluster.ask(poor, notify=True) == ()
    (event,) = cluster.events(rich)
    assert isinstance(event, GiveBack)
    cluster.give_back(rich, event.host)
    assert cluster.events(poor) == [MoreHosts()]
    assert cluster.ask(poor) == (event.host,)
    assert cluster.evicted == []


def test_what_is_not_given_back_is_taken_and_its_guest_evicted() -> None:
    cluster = Cluster(a=50, b=40)
    rich, poor = cluster.client(ALICE), cluster.client(BOB)
    cluster.ask(rich, 2)
    cluster.ask(poor, notify=True)
    (asked,) = cluster.events(rich)
    assert isinstance(asked, GiveBack)
    cluster.wait(14)
    assert cluster.evicted == []
    cluster.wait(2)
    assert cluster.evicted == [(asked.host, ALICE)]
    assert [type(event) for event in cluster.events(rich)] == [HostLost]
    assert cluster.ask(poor) == (asked.host,)


def test_one_host_is_not_taken_from_who_has_only_that() -> None:
    cluster = Cluster(a=50, b=40)
    one, two, none = cluster.client(ALICE), cluster.client(BOB), cluster.client(CAROL)
    cluster.ask(one)
    cluster.ask(two)
    cluster.ask(none, notify=True)
    assert cluster.events(one) == cluster.events(two) == []


def test_nobody_is_asked_for_a_user_that_has_hosts() -> None:
    cluster = Cluster(a=50, b=40, c=30)
    rich, modest = cluster.client(ALICE), cluster.client(BOB)
    cluster.ask(rich, 2)
    cluster.ask(modest, 2, notify=True)
    assert cluster.events(rich) == []


def test_a_flood_of_requests_asks_for_one_host() -> None:
    cluster = Cluster(a=50, b=40, c=30)
    rich, poor = cluster.client(ALICE), cluster.client(BOB)
    cluster.ask(rich, 3)
    for _ in range(100):
        cluster.ask(poor, notify=True)
    assert len(cluster.events(rich)) == 1


# ---------------------------------------------------------------------- a new central daemon


def test_claims_of_an_earlier_central_daemon_are_given_again_or_told_as_lost() -> None:
    cluster = Cluster(a=50, b=40)
    cluster.book.add_host("c", 3)
    other = cluster.client(BOB)
    assert cluster.ask(other) == ("a",)
    client = cluster.client()
    held = [Held(name, NORMAL) for name in ("a", "b", "c", "gone")]
    assert cluster.book.reclaim(client, held, cluster.now) == [held[0], held[3]]
    assert cluster.book.confirm(client, "b")
    assert cluster.book.confirm(client, "c"), "it has not reported yet, and is believed"


def test_a_claim_whose_own_guest_fills_the_slot_can_be_had_again() -> None:
    cluster = Cluster(a=50)
    cluster.report("a", guests=guest(ALICE))
    assert cluster.book.reclaim(cluster.client(ALICE), [Held("a", NORMAL)], cluster.now) == []
    assert cluster.book.reclaim(cluster.client(BOB), [Held("a", NORMAL)], cluster.now) != []


def test_a_claim_on_a_host_that_never_comes_back_is_lost() -> None:
    cluster = Cluster()
    cluster.book.add_host("c", 3)
    client = cluster.client()
    cluster.book.reclaim(client, [Held("c", NORMAL)], cluster.now)
    cluster.wait(DOWN_SECONDS + 1)
    assert HostLost("c", "it is down") in cluster.events(client)


# ---------------------------------------------------------------------- whatever happens

steps = st.lists(
    st.tuples(st.sampled_from("rgcvt"), st.integers(0, 3), st.integers(0, 3), st.integers(1, 3)),
    max_size=60,
)


@given(steps)
def test_no_host_is_ever_promised_to_more_than_it_takes(
    done: list[tuple[str, int, int, int]],
) -> None:
    cluster = Cluster(a=4, b=3, c=2, d=1)
    clients = [cluster.client(uid) for uid in (ALICE, ALICE, BOB, CAROL)]
    held: dict[Session, Counter[str]] = {client: Counter() for client in clients}
    for verb, who, which, number in done:
        client, host = clients[who], "abcd"[which]
        cluster.now += 1
        if verb == "r":
            held[client].update(cluster.ask(client, number, notify=True))
        elif verb == "g":
            assert cluster.give_back(client, host) == (held[client][host] > 0)
            held[client][host] = max(0, held[client][host] - 1)
        elif verb == "c":
            cluster.book.close(client, cluster.now)
            cluster.book.open(client, (ALICE, ALICE, BOB, CAROL)[who])
            held[client].clear()
        elif verb == "v":
            cluster.report(host, verdict=Verdict.ACTIVE if number > 1 else Verdict.ACCEPTS)
        else:
            cluster.wait(1)
        for whom, event in cluster.told:
            if isinstance(event, HostLost):
                held[whom][event.host] -= 1
        cluster.told.clear()
        for name in "abcd":
            total = sum(counts[name] for counts in held.values())
            assert total == cluster.book.info(name, cluster.now).claims <= 1
