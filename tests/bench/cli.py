"""The benchmark, `make bench`: how long a program falls silent while it moves, and what that takes.

Silence: the longest time between two lines of a program that writes one every 2 ms; the median of
some moves. Every line must come, once, in order. Nothing here is a test: times depend on the
machine, so they are compared within one run.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from testbed.client import CommandFailed, Nodes, program_of
from testbed.errors import TestbedError
from testbed.lifecycle import Testbed

from bench.commands import command_rows
from bench.contestants import Bare, ByHand, Contestant, Move, Ours, repeat, warm_up
from bench.errors import BenchFailed
from bench.eviction import eviction_rows
from bench.groups import group_rows
from bench.load_speed import central_rows, client_rows
from bench.memory import Footprint, extra_of_move, migd_cpu_ms, resting
from bench.report import Report, Row, Series, size_name

SMALL, MIDDLE, LARGE = 0, 64, 1024
BY_HAND_TARGETS = {SMALL: 0.3, MIDDLE: 0.4, LARGE: 0.5}
BARE_TARGET = 2.0
BEYOND_TARGET_MS = 150.0
CPU_SECONDS = 10.0
CPU_TARGET_MS = 10.0
"""One clock tick: less is not measurable."""
EXTRA_TARGET_MIB = 64


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="What a move costs, on the testbed.")
    parser.add_argument("--moves", type=int, help="of each contestant and size (20)")
    parser.add_argument("--quick", action="store_true", help="3 moves, and nothing of 1 GiB")
    parser.add_argument("--json", action="store_true", help="print JSON, progress on stderr")
    given = parser.parse_args()
    given.moves = given.moves or (3 if given.quick else 20)
    return given


@contextmanager
def _running_nodes() -> Iterator[Nodes]:
    """The nodes with the product of this checkout; left up if they were up before."""
    testbed = Testbed()
    was_up = bool(testbed.nodes())
    program = [sys.executable, "-IS", str(program_of(testbed))]
    try:
        subprocess.run([*program, "up"], check=True, stdout=sys.stderr)
        yield Nodes(testbed)
    finally:
        if not was_up:
            subprocess.run([*program, "down"], check=True)


def _moves(contestant: Contestant, nodes: Nodes, mebibytes: int, count: int) -> Series:
    moves: list[Move] = []
    for move in repeat(contestant, nodes, mebibytes, count):
        moves.append(move)
        _progress(f"{contestant.name}, {size_name(mebibytes)}: {len(moves)} of {count}")
    series = Series(contestant.name, mebibytes, moves)
    _progress(str(series), stays=True)
    return series


def _progress(text: str, stays: bool = False) -> None:
    terminal = sys.stderr.isatty()
    if terminal or stays:
        start, end = ("\r\033[K", "") if terminal else ("", "\n")
        print(start + text, end="\n" if stays else end, file=sys.stderr, flush=True)


def _speed(nodes: Nodes, report: Report, sizes: list[int], count: int) -> None:
    bare, by_hand, ours = Bare(nodes), ByHand(nodes), Ours(nodes)
    for size in sizes:
        contestants: list[Contestant] = [by_hand, ours]
        if size == SMALL:
            contestants.insert(0, bare)
        report.series += [_moves(one, nodes, size, count) for one in contestants]
    small = report.find(ours.name, SMALL)
    report.compare(small, report.find(bare.name, SMALL), BARE_TARGET)
    for size in sizes:
        hand = report.find(by_hand.name, size)
        report.compare(report.find(ours.name, size), hand, BY_HAND_TARGETS[size])
    for size in sizes:
        name = f"`migrate -p` beyond the silence, {size_name(size)}"
        row = Row(name, report.find(ours.name, size).beyond_ms, BEYOND_TARGET_MS, "ms")
        report.rows.append(row)


def _memory(nodes: Nodes, report: Report, size: int) -> None:
    _progress("memory and CPU")
    cpu_ms = migd_cpu_ms(nodes, CPU_SECONDS)
    rest = resting(nodes)
    migd_mb = rest.migd.rss_kib * 1024 / 1e6
    report.rows += [
        Row("migd at rest, RSS", migd_mb, 60, "MB"),
        Row(f"migd at rest, CPU in {CPU_SECONDS:.0f} s", cpu_ms, CPU_TARGET_MS, "ms"),
        _footprint_row("keeper", rest.keeper, 25),
        _footprint_row("guard", rest.guard, 25),
        Row("deputy, RSS", rest.deputy.rss_kib * 1024 / 1e6, 12, "MB"),
    ]
    extra = extra_of_move(nodes, size)
    name = f"at a move of {size_name(size)}"
    once = "the image once, and as much as the source"
    report.rows += [
        Row(f"extra at the source {name}", extra.source_kib / 1024, EXTRA_TARGET_MIB, "MiB"),
        Row(
            f"extra at the destination {name}",
            extra.destination_kib / 1024,
            size + EXTRA_TARGET_MIB,
            "MiB",
            once,
        ),
    ]


def _eviction(nodes: Nodes, report: Report) -> None:
    _progress("eviction")
    report.rows += eviction_rows(nodes)


def _load_database(nodes: Nodes, report: Report) -> None:
    _progress("the load database")
    report.rows += client_rows(nodes)
    report.rows += central_rows()


def _groups(nodes: Nodes, report: Report) -> None:
    _progress("groups")
    report.rows += group_rows(nodes)


def _footprint_row(role: str, footprint: Footprint, target_mb: int) -> Row:
    rss_mb, pss_mb = (kib * 1024 / 1e6 for kib in (footprint.rss_kib, footprint.pss_kib))
    note = f"RSS {rss_mb:.1f} MB, {footprint.processes} processes"
    return Row(f"{role}, PSS", pss_mb, target_mb, "MB", note)


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run it. Ends with 0 also if a target is not met: it measures, it does not judge."""
    given = _options()
    signal.signal(signal.SIGTERM, _interrupt)
    sizes = [SMALL, MIDDLE] if given.quick else [SMALL, MIDDLE, LARGE]
    report = Report()
    try:
        with _running_nodes() as nodes:
            warm_up(nodes)
            _speed(nodes, report, sizes, given.moves)
            _memory(nodes, report, sizes[-1])
            _eviction(nodes, report)
            _load_database(nodes, report)
            _groups(nodes, report)
            report.rows += command_rows(nodes, _progress, many=not given.quick)
    except (BenchFailed, CommandFailed, TestbedError) as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if given.json:
        report.dump()
    else:
        report.show()
