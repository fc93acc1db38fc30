"""The demonstration, tests/testbed/demo: one program, three hosts, and nobody at home notices.

Everything on the screen is what alice would see: the lines of her shell, indented, and at the
left the commands she types in another window, with what these print.
"""

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

from testbed.client import CommandFailed, Nodes, exec_command, program_of
from testbed.errors import TestbedError

HOME = "node1"
STOPS = ("node2", "node3", HOME)
EXIT_STATUS = 7

# Computes, prints, appends to a file, ends when another file is there; its exit status is its own.
PRIMES = f"""\
import os, sys, time

def is_prime(n):
    return all(n % d for d in range(2, int(n**0.5) + 1))

n = found = line = 0
with open("primes.log", "w", buffering=1) as log:
    while not os.path.exists("enough"):
        line += 1
        while found < line * 1000:
            n += 1
            found += n > 1 and is_prime(n)
        text = f"{{line:3}}  the {{found:,}}th prime is {{n:,}}"
        print(text, flush=True)
        print(text, file=log)
        time.sleep(0.1)
sys.exit({EXIT_STATUS})
"""
JOB = """\
python3 primes.py &
echo "its pid is $!"
wait $!
echo "wait returned $?"
"""


class DemoFailed(Exception):
    """What was to be shown is not so."""


@dataclass
class Shell:
    """Alice's shell while it runs; shows each of its lines on the screen as it comes."""

    process: subprocess.Popen[bytes]
    lines: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _ended: bool = False

    def read(self) -> None:
        """Take what comes until the end; runs in a thread of its own."""
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            text = raw.decode(errors="replace").rstrip("\n")
            with self._changed:
                say(f"        {text}")
                self.lines.append(text)
                self.times.append(time.monotonic())
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        """Return when it has written `count` lines. :raises DemoFailed: it ends or hangs before."""
        with self._changed:
            good = self._changed.wait_for(lambda: self._ended or len(self.lines) >= count, 60)
        if not good or len(self.lines) < count:
            raise DemoFailed(f"the shell wrote {len(self.lines)} lines and then no more")

    def wait_for_end(self) -> None:
        """Return when it has ended and its last line is here. :raises DemoFailed: it hangs."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, 60):
                raise DemoFailed("the shell does not end")


def say(*lines: str) -> None:
    """Lines on the screen, at once and together."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _type(nodes: Nodes, user: str, node: str, *command: str, at_once: bool = True) -> str:
    """Run a command as it would be typed on a node; command and output are shown.

    :param at_once: for what ends at once: show both together, and give it a terminal.
    """
    words = " ".join(command)
    prompt = f"{user}@{node}{'#' if user == 'root' else '$'} {words}"
    if not at_once:
        say(prompt)
    done = subprocess.run(
        exec_command(nodes.testbed, node, command, user=user, tty=at_once),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        text=True,
    )
    say(*([prompt] if at_once else []), *done.stdout.splitlines())
    if done.returncode != 0:
        raise DemoFailed(f"`{words}` ended with status {done.returncode}")
    return done.stdout


def _start(nodes: Nodes) -> Shell:
    for name, text in (("primes.py", PRIMES), ("job.sh", JOB)):
        nodes.exec(HOME, ["sh", "-c", 'cat >"$1"', "sh", name], user="alice", stdin=text)
    nodes.exec(HOME, ["rm", "-f", "enough"], user="alice")
    say(f"\nOn {HOME} alice's shell starts a program that looks for primes, and waits for it.")
    say("What the shell prints is indented, and shown as it comes.\n")
    _type(nodes, "alice", HOME, "cat", "job.sh")
    say(f"alice@{HOME}$ bash job.sh")
    command = exec_command(nodes.testbed, HOME, ["bash", "job.sh"], user="alice")
    shell = Shell(
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a ^C is the demo's: it ends what it started
        )
    )
    threading.Thread(target=shell.read, daemon=True).start()
    return shell


def _travel(nodes: Nodes, shell: Shell) -> int:
    """Move the program from stop to stop. :return: its pid. :raises DemoFailed:"""
    shell.wait_for(1)
    pid = int(shell.lines[0].split()[-1])
    look = ("ps", "-o", "pid,ppid,user,start", "-p", str(pid))
    shell.wait_for(3)
    at_first = _type(nodes, "alice", HOME, *look)
    for host in STOPS:
        shell.wait_for(len(shell.lines) + 2)
        move = ("migrate", "-v", "-p", f"{pid:#x}", "-h", host)
        _type(nodes, "alice", HOME, *move, at_once=False)
        shell.wait_for(len(shell.lines) + 2)
        if host != HOME:
            _type(nodes, "root", host, "ps", "-u", "alice", "-o", "user,time,args")
            _type(nodes, "alice", HOME, "migctl", "ps")
        if _type(nodes, "alice", HOME, *look) != at_first:
            raise DemoFailed("at home it is no longer the same process")
    _type(nodes, "alice", HOME, "touch", "enough")
    shell.wait_for_end()
    return pid


def _check(nodes: Nodes, shell: Shell, pid: int) -> None:
    """Say what the run has shown. :raises DemoFailed:"""
    _, *lines, last = shell.lines
    if last != f"wait returned {EXIT_STATUS}":
        raise DemoFailed(f"the shell's last line is {last!r}")
    if [text.split()[0] for text in lines] != [str(n + 1) for n in range(len(lines))]:
        raise DemoFailed("a line is missing, out of order or there twice")
    log = nodes.exec(HOME, ["cat", "primes.log"], user="alice").stdout
    if log.splitlines() != lines:
        raise DemoFailed(f"/home/alice/primes.log on {HOME} does not hold the same lines")
    gaps = [after - before for before, after in zip(shell.times, shell.times[1:], strict=False)]
    say(
        f"\nAll {len(lines)} lines reached the shell in order, none missing, none twice;",
        f"the longest silence between two was {max(gaps):.2f} s.",
        f"The file primes.log in alice's home on {HOME} holds the same {len(lines)} lines.",
        f"At home it was process {pid} all the time, with the same parent.",
        f"`wait` in her shell returned {EXIT_STATUS}: the program's own exit status.",
    )


def _demonstrate() -> None:
    nodes = Nodes()
    program = os.path.relpath(program_of(nodes.testbed))
    subprocess.run([sys.executable, "-IS", program, "up"], check=True)
    shell = _start(nodes)
    try:
        pid = _travel(nodes, shell)
        _check(nodes, shell, pid)
    finally:
        shell.process.terminate()
    say(
        "\nThe nodes stay up. To enter one, and to stop them:\n",
        f"    {program} exec {HOME} --user alice --tty -- bash",
        f"    {program} down",
    )


def main() -> None:
    """Show it; exits with 1 and the reason if it could not be shown."""
    try:
        _demonstrate()
    except (DemoFailed, TestbedError, CommandFailed) as error:
        sys.exit(f"demo: {error}")
    except subprocess.CalledProcessError:
        sys.exit("demo: the nodes could not be started")
    except KeyboardInterrupt:
        sys.exit(130)
