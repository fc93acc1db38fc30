"""How process ids are written and read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import UserError
from migrate.pids import PID_MAX, format_pid, parse_pid


@pytest.mark.parametrize(
    ("text", "pid"),
    [
        ("0x1a2b", 0x1A2B),
        ("0X1A2B", 0x1A2B),
        ("6699", 6699),
        ("0x10", 16),
        ("10", 10),
        ("1", 1),
        ("0006699", 6699),
        (str(PID_MAX), PID_MAX),
        (hex(PID_MAX), PID_MAX),
    ],
)
def test_hex_has_its_prefix_and_all_else_is_decimal(text: str, pid: int) -> None:
    assert parse_pid(text) == pid


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            "0x",
            "x1a",
            "0x1g",
            "-1",
            "-0x1",
            "+5",
            " 5",
            "5 ",
            "5\n",
            "0x5\n",
            "1_000",
            "0x1_0",
        ],
        *["٣", "0x٣", "1.0", "1e3", "%1", "0", "0x0", "000", "self", "9" * 5000],
        *[str(PID_MAX + 1), hex(PID_MAX + 1)],
    ],
)
def test_what_no_process_can_have_is_refused(text: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_pid(text)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 120


@pytest.mark.parametrize("text", ["1a2b", "1A2B", "ff", "b"])
def test_bare_hex_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(UserError, match=f"write 0x{text.lower()}$"):
        parse_pid(text)


def test_the_reason_says_which_limit_was_passed() -> None:
    with pytest.raises(UserError, match="too large, the kernel's limit is 4194304"):
        parse_pid("4194305")


@given(st.integers(1, PID_MAX))
def test_what_is_printed_can_be_typed_again(pid: int) -> None:
    assert parse_pid(format_pid(pid)) == pid
    assert parse_pid(str(pid)) == pid
    assert format_pid(pid).startswith("0x")


@given(st.text())
def test_any_text_gives_a_pid_or_a_clear_refusal(text: str) -> None:
    try:
        pid = parse_pid(text)
    except UserError:
        return
    assert 0 < pid <= PID_MAX
