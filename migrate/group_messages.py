"""What clients and migd say to each other about groups of processes, on migd's socket."""

from __future__ import annotations

from typing import Annotated

import msgspec

from migrate.protocol import PROTOCOL

GROUP_MAX = (1 << 31) - 1
"""as openMosix's, an int"""
PIDS_AT_ONCE = 8192
ROWS_AT_ONCE = 1024

Group = Annotated[int, msgspec.Meta(ge=1, le=GROUP_MAX)]
GroupOrNone = Annotated[int, msgspec.Meta(ge=0, le=GROUP_MAX)]
"""0: no group"""
Pid = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]


class JoinGroup(msgspec.Struct, frozen=True, tag="join-group"):
    """These processes of mine are in this group now."""

    pids: Annotated[tuple[Pid, ...], msgspec.Meta(max_length=PIDS_AT_ONCE)]
    group: GroupOrNone
    protocol: int = PROTOCOL


class ResetGroup(msgspec.Struct, frozen=True, tag="reset-group"):
    """The processes of this group that are mine are in none any more."""

    group: Group
    protocol: int = PROTOCOL


class ListGroup(msgspec.Struct, frozen=True, tag="list-group"):
    """Who is in this group (0: in any)? Only those with a pid above `after`."""

    group: GroupOrNone
    after: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)] = 0
    protocol: int = PROTOCOL


class PlanGroup(msgspec.Struct, frozen=True, tag="plan-group"):
    """How would this group move to a host? Neither name nor id: to those that are chosen."""

    group: Group
    host: Annotated[str, msgspec.Meta(max_length=256)] = ""
    host_id: int = 0
    protocol: int = PROTOCOL


class EvictGroup(msgspec.Struct, frozen=True, tag="evict-group"):
    """Send the guests of this host that are in this group home."""

    group: Group
    protocol: int = PROTOCOL


class Unjoined(msgspec.Struct, frozen=True):
    """A process that stays in its group, and why."""

    pid: int
    reason: str
    remedy: str = ""


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    """Who is in another group now, in the order that was asked for; and who is not."""

    pids: tuple[int, ...]
    unjoined: tuple[Unjoined, ...] = ()


class MemberRow(msgspec.Struct, frozen=True):
    """A process in a group."""

    pid: int
    group: int
    user: str
    home: str
    where: str
    """the host where it runs"""
    command: str


class GroupMembers(msgspec.Struct, frozen=True, tag="members"):
    """The answer to ListGroup, by pid. `more_after`: if not 0, ask again for those after it."""

    rows: tuple[MemberRow, ...]
    more_after: int = 0


class GroupTree(msgspec.Struct, frozen=True):
    """Members that move as one."""

    pid: int
    """the one to move"""
    pids: tuple[int, ...]
    """all members that go with it"""
    there: bool = False
    """they run where they are to go"""


class Reason(msgspec.Struct, frozen=True):
    """Why not."""

    what: str
    reason: str
    remedy: str = ""


class Stuck(msgspec.Struct, frozen=True):
    """Members that cannot move."""

    pids: tuple[int, ...]
    reasons: tuple[Reason, ...]


class GroupPlan(msgspec.Struct, frozen=True, tag="plan"):
    """The answer to PlanGroup."""

    trees: tuple[GroupTree, ...]
    stuck: tuple[Stuck, ...] = ()


class GroupEvicted(msgspec.Struct, frozen=True, tag="group-evicted"):
    """The answer to EvictGroup: the pids here of those that are told to go."""

    pids: tuple[int, ...]


Request = JoinGroup | ResetGroup | ListGroup | PlanGroup | EvictGroup
Reply = Joined | GroupMembers | GroupPlan | GroupEvicted
FINAL = (Joined, GroupMembers, GroupPlan, GroupEvicted)
