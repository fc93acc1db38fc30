"""The table that the benchmark prints: a figure, its target, met or not."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

from bench.contestants import Move


@dataclass(frozen=True)
class Series:
    """The moves of one contestant with one size of program."""

    contestant: str
    mebibytes: int
    moves: Sequence[Move]

    @property
    def silence_ms(self) -> float:
        """The median of the longest silences."""
        return median(move.silence_ms for move in self.moves)

    @property
    def beyond_ms(self) -> float:
        """The median of what the command took beyond the silence."""
        return median(move.wall_ms - move.silence_ms for move in self.moves)

    def __str__(self) -> str:
        each = [move.silence_ms for move in self.moves]
        line = f"{self.silence_ms:9.1f} ms   {min(each):.1f} to {max(each):.1f}"
        return f"{self.contestant:<10} {size_name(self.mebibytes):>7}  {line}, {len(each)} moves"


@dataclass(frozen=True)
class Row:
    """A figure and the most that it may be. `note`: what it is made of."""

    name: str
    figure: float
    target: float
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool:
        return self.figure <= self.target

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        verdict = "met" if self.met else "NOT MET"
        note = f"  ({self.note})" if self.note else ""
        figure, target = (f"{value:.4g}{unit}" for value in (self.figure, self.target))
        return f"{self.name:<44} {figure:>12}   ≤ {target:<10} {verdict}{note}"


@dataclass
class Report:
    """What one run has found."""

    series: list[Series] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def find(self, contestant: str, mebibytes: int) -> Series:
        """The series of that contestant and size. :raises StopIteration: there is none."""
        return next(
            one for one in self.series if (one.contestant, one.mebibytes) == (contestant, mebibytes)
        )

    def compare(self, ours: Series, other: Series, target: float) -> None:
        """Add the ratio of two medians."""
        self.rows.append(
            Row(
                f"{ours.contestant} / {other.contestant}, {size_name(ours.mebibytes)}",
                ours.silence_ms / other.silence_ms,
                target,
                note=f"{ours.silence_ms:.0f} ms / {other.silence_ms:.0f} ms",
            )
        )

    def show(self) -> None:
        """On standard output, for people."""
        load = " ".join(f"{value:.2f}" for value in os.getloadavg())
        print(f"\n{os.cpu_count()} CPUs, load {load} at the end; the machine's other work counts\n")
        for row in self.rows:
            print(row)

    def dump(self) -> None:
        """On standard output, as JSON."""
        series = [{**asdict(one), "silence_ms": one.silence_ms} for one in self.series]
        rows = [{**asdict(row), "met": row.met} for row in self.rows]
        json.dump({"series": series, "rows": rows}, sys.stdout, indent=2)
        print()


def size_name(mebibytes: int) -> str:
    """How a size of program is called."""
    if mebibytes == 0:
        return "small"
    return f"{mebibytes} MiB" if mebibytes % 1024 else f"{mebibytes // 1024} GiB"
