"""A destination takes a guest, or says which thing is in the way and what to do."""

import grp
import os
import pwd
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from agent import hosting
from agent.hosting import cpu_features, free_memory_bytes, judge
from agent.link import Offer, Owner, SystemFile, TreeIds
from migrate.config import Config, Host
from migrate.errors import PeerError

CONFIG = Config(
    hosts=tuple(Host(f"node{n}", n, f"10.0.0.{n}") for n in (1, 2, 3)),
    name="node2",
    min_free_memory_bytes=256 << 20,
)
CRIU = "4.2.1"
ALICE = Owner("alice", 1001, 1001, (1001, 100))
ACCOUNTS = {"alice": 1001, "bob": 1002, "toor": 0}


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small machine on which alice is in her own group and in users."""

    def account(name: str) -> SimpleNamespace:
        return SimpleNamespace(pw_name=name, pw_uid=ACCOUNTS[name], pw_gid=ACCOUNTS[name])

    def group(gid: int) -> SimpleNamespace:
        return SimpleNamespace(gr_name={27: "sudo"}[gid])

    monkeypatch.setattr(pwd, "getpwnam", account)
    monkeypatch.setattr(grp, "getgrgid", group)
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 100])
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="x86_64"))
    monkeypatch.setattr(hosting, "cpu_features", lambda: ("avx", "sse", "sse2"))
    monkeypatch.setattr(hosting, "free_memory_bytes", lambda: 1 << 30)


@pytest.fixture
def offer(tmp_path: Path) -> Offer:
    return Offer(
        transaction="t1",
        guest="t1-node1",
        home="node1",
        source="node1",
        owner=ALICE,
        ids=TreeIds(6699, 6000, 6699, 6000),
        epoch=1,
        memory_bytes=100 << 20,
        machine="x86_64",
        cpu_features=("avx", "sse"),
        criu_version=CRIU,
        hostname="node1",
        view=(str(tmp_path),),
        command="python3 simulate.py",
    )


def test_a_good_offer_is_accepted(offer: Offer) -> None:
    judge(offer, "node1", CONFIG, CRIU)


def test_a_guest_may_hop_in_from_elsewhere_than_its_home(offer: Offer) -> None:
    judge(msgspec.structs.replace(offer, source="node3"), "node3", CONFIG, CRIU)


def test_on_the_way_home_the_view_is_this_hosts_own(offer: Offer) -> None:
    back = msgspec.structs.replace(offer, home="node2", source="node3", view=("/not/any/more",))
    judge(back, "node3", CONFIG, CRIU)


def owned(**changes: object) -> Owner:
    return msgspec.structs.replace(ALICE, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"source": "node3"}, "host node2: the offer comes from node1, not from node3"),
        (
            {"home": "node9"},
            "host node2: does not know node9, the guest's home; run `migctl join node9` there",
        ),
        ({"machine": "aarch64"}, "host node2: is x86_64, the process aarch64; choose another host"),
        (
            {"cpu_features": ("sse", "avx512f", "amx_tile")},
            "host node2: its processor lacks amx_tile, avx512f; choose another host",
        ),
        (
            {"criu_version": "4.1"},
            "host node2: has CRIU 4.2.1, node1 has 4.1; install the same version on both",
        ),
        (
            {"memory_bytes": 400 << 20},
            "host node2: has 1024 MiB of memory free, 1056 MiB are needed; choose another host",
        ),
        ({"owner": owned(name="root", uid=0)}, "host node2: takes no guests of root"),
        ({"owner": owned(uid=0)}, "host node2: takes no guests of root"),
        (
            {"owner": owned(name="carol")},
            "host node2: has no account carol; create it with the same uid",
        ),
        (
            {"owner": owned(uid=1005)},
            "host node2: alice has uid 1001 there, but 1005 at home; "
            "give the account the same uid on both hosts",
        ),
        ({"owner": owned(name="toor")}, "host node2: toor has uid 0 there, but 1001 at home"),
        (
            {"owner": owned(groups=(1001, 27))},
            "host node2: alice is not in group sudo there; "
            "choose another host, or add the user to the group",
        ),
        (
            {"owner": owned(groups=(4711, 27))},
            "host node2: alice is not in group sudo, 4711 there",
        ),
        ({"owner": owned(gid=27)}, "host node2: alice is not in group sudo there"),
        ({"view": ("home/alice",)}, "host node2: 'home/alice' is no absolute path"),
        ({"view": ("",)}, "host node2: '' is no absolute path"),
        ({"view": ("/home/../etc",)}, "host node2: '/home/../etc' is no absolute path"),
        ({"view": ("/home//etc",)}, "host node2: '/home//etc' is no absolute path"),
        ({"view": ("/",)}, "host node2: '/' is no absolute path"),
        ({"view": ("/proc/self",)}, "host node2: /proc/self never comes from home"),
        ({"view": ("/run",)}, "host node2: /run never comes from home"),
        ({"view": ("/run/migrate/criu",)}, "host node2: /run/migrate/criu never comes from home"),
        (
            {"files": (SystemFile("/dev/mem", 0, 0),)},
            "host node2: /dev/mem never comes from home",
        ),
    ],
)
def test_each_thing_in_the_way_is_named(
    offer: Offer, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(PeerError) as refusal:
        judge(msgspec.structs.replace(offer, **changes), "node1", CONFIG, CRIU)
    assert str(refusal.value).startswith(reason)
    assert "\n" not in str(refusal.value)


def test_a_host_that_takes_no_guests_says_so(offer: Offer) -> None:
    closed = msgspec.structs.replace(CONFIG, accept_guests=False)
    with pytest.raises(PeerError, match="takes no guests"):
        judge(offer, "node1", closed, CRIU)


def test_memory_is_needed_for_the_images_and_the_process_at_once(offer: Offer) -> None:
    just_enough = (1 << 30) - CONFIG.min_free_memory_bytes
    judge(msgspec.structs.replace(offer, memory_bytes=just_enough // 2), "node1", CONFIG, CRIU)
    with pytest.raises(PeerError, match="of memory free"):
        judge(
            msgspec.structs.replace(offer, memory_bytes=just_enough // 2 + 1), "node1", CONFIG, CRIU
        )


def test_what_this_machine_says_of_itself_can_be_true() -> None:
    features = cpu_features()
    assert features == tuple(sorted(set(features)))
    assert "" not in features
    assert 1 << 20 < free_memory_bytes() < 1 << 50


def test_an_offer_of_less_than_no_memory_is_no_offer(offer: Offer) -> None:
    data = msgspec.msgpack.encode(msgspec.structs.replace(offer, memory_bytes=-1))
    with pytest.raises(msgspec.ValidationError, match="memory_bytes"):
        msgspec.msgpack.decode(data, type=Offer)
