"""Process ids as a user writes and reads them: `0x1a2b` as Sprite's, or `6699` decimal."""

import re

from migrate.errors import UserError

PID_MAX = 1 << 22
"""The kernel's own upper bound, PID_MAX_LIMIT on 64-bit machines (include/linux/threads.h)."""

_DECIMAL = re.compile(r"[0-9]+", re.ASCII)
_HEX = re.compile(r"0[xX][0-9a-fA-F]+", re.ASCII)
_BARE_HEX = re.compile(r"[0-9a-fA-F]+", re.ASCII)


def parse_pid(text: str) -> int:
    """The pid that `text` names: hex after `0x`, else decimal.

    :raises UserError: it is no pid, or one that no process can have.
    """
    if not text:
        raise UserError("pid", "it is empty", "write it as 0x1a2b or 6699")
    if _DECIMAL.fullmatch(text):
        digits, base = text, 10
    elif _HEX.fullmatch(text):
        digits, base = text[2:], 16
    elif _BARE_HEX.fullmatch(text):
        raise UserError(f"pid {text}", "hex needs its prefix", f"write 0x{text.lower()}")
    else:
        raise UserError(f"pid {text!r}", "not a process id", "write it as 0x1a2b or 6699")
    # Checked by length first: int() of a very long string of digits is slow or refused.
    pid = int(digits, base) if len(digits.lstrip("0")) <= len(str(PID_MAX)) else PID_MAX + 1
    if pid == 0:
        raise UserError(f"pid {text}", "no process has the id 0")
    if pid > PID_MAX:
        shown = text if len(text) <= 20 else f"{text[:20]}…"
        raise UserError(f"pid {shown}", f"too large, the kernel's limit is {PID_MAX}")
    return pid


def format_pid(pid: int) -> str:
    """The pid as this project prints it: hex, with its prefix (`0x1a2b`)."""
    return f"{pid:#x}"
