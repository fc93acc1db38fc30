"""Commands elsewhere, and programs that were moved there, as members of pipelines at home."""

import pytest
from moving import Desk, until
from test_exec import said

GATES = 3


@pytest.mark.parametrize("middle", ["cat", "migrate -h node2 cat"])
def test_a_member_that_moves_loses_nothing(desk: Desk, middle: str) -> None:
    """The next one reads only so much before each move: so all pipes are full then."""
    gates = "".join(f"head -c 20M; echo >at{n}; read x <go{n}; " for n in range(GATES))
    shell = desk.shell(
        "head -c 100M /dev/urandom >data; sha256sum <data >sent\n"
        f"mkfifo {' '.join(f'go{n}' for n in range(GATES))}\n"
        f"cat data | sh -c 'echo $$ >pid; exec {middle}' | {{ {gates} cat; }} | sha256sum >received\n"
        "echo over ${PIPESTATUS[*]}; rm data"
    )
    for n, host in enumerate(("node3", "node2", "node1")):
        until(lambda n=n: desk.read(f"at{n}"), "it waits at the gate")
        desk.move(int(desk.read("pid")), host)
        desk.tell(f"go{n}")
    assert shell.line(60) == "over 0 0 0 0"
    assert desk.read("received") == desk.read("sent")


def test_each_line_of_a_loop_is_a_commands_argument_or_input(desk: Desk) -> None:
    desk.write("lines", "a\nb\nc\n")
    assert said(desk, "while read x; do migrate -h node2 echo it $x </dev/null; done <lines") == [
        "it a",
        "it b",
        "it c",
    ]
    # Each takes one line more of the loop's own input, and no more.
    assert said(
        desk, "while read x; do migrate -h node2 sh -c 'read y; echo '$x'-$y'; done <lines"
    ) == ["a-b", "c-"]
