"""CRIU's log in one sentence."""

from __future__ import annotations

import re

_ERROR = re.compile(r"^(?:\([\d.]+\)\s*)?(?:\s*\d+:\s*)?Error \([^)]*\):\s*(?P<text>.*)$")
# What criu prints when it has to give up, or says on every host that lacks CAP_SYS_RESOURCE: no
# cause.
_NO_CAUSE = re.compile(
    r"Dumping FAILED|Restoring FAILED|Can't setup RLIMIT_NOFILE for self|Unable to create tun"
    r"|Unexpected TCP_CORK|exited? with|killed by signal|Can't make .*\.img|notify|Can't dump task"
)
_KNOWN = (
    (re.compile(r"File (?P<x>\S+) has bad size"), "{x} is not the same file on both hosts"),
    (re.compile(r"File (?P<x>\S+) has bad build-?id"), "{x} is not the same file on both hosts"),
    (re.compile(r"Can't open file (?P<x>\S+)"), "{x} cannot be opened at the destination"),
    (
        re.compile(r"Can't lookup mount"),
        "it has a file open on a file system that is not visible here",
    ),
    (
        re.compile(r"(?P<x>\d+) \(.*\) is already .*ptrace|is being traced"),
        "another program traces it",
    ),
    (
        re.compile(r"ghost file.*too big|Can't dump ghost file (?P<x>\S+)"),
        "it holds a deleted file that is too large",
    ),
)


def cause(log: str) -> str:
    """The first error of a CRIU log that tells a cause, as a sentence; empty if there is none."""
    errors = [m["text"].strip() for line in log.splitlines() if (m := _ERROR.match(line.strip()))]
    for text in errors:
        for pattern, sentence in _KNOWN:
            if found := pattern.search(text):
                return sentence.format(**found.groupdict())
    for text in errors:
        if not _NO_CAUSE.search(text):
            return f"CRIU: {text}"
    return f"CRIU: {errors[0]}" if errors else ""
