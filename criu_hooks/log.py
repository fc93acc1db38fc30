"""CRIU's log in one sentence."""

from __future__ import annotations

import re

# With a time at some log levels, a pid at restore, and "pie" before it from the restorer blob.
_ERROR = re.compile(r"^(?:\([\d.]+\)\s*)?(?:pie:\s*)?(?:\d+:\s*)?Error \([^)]*\):\s*(?P<text>.*)$")
# What criu prints when it has to give up, or says on every host that lacks CAP_SYS_RESOURCE: no
# cause.
_NO_CAUSE = re.compile(
    r"Dumping FAILED|Restoring FAILED|Can't setup RLIMIT_NOFILE for self|Unable to create tun"
    r"|Unexpected TCP_CORK|exited? with|killed by signal|Can't make .*\.img|\bnotify\b"
    r"|Can't dump task"
)
_KNOWN = (
    # CRIU prints these paths without their first slash.
    (
        re.compile(r"File /?(?P<x>.+) has bad (?:size|build-ID)"),
        "/{x} is not the same file on both hosts",
    ),
    (
        re.compile(r"Can't open file /?(?P<x>.+?)(?: on restore)?(?:: [^:/]+)?$"),
        "/{x} cannot be opened at the destination",
    ),
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
