"""Run a command inside a node, as `docker exec` does.

CRIU cannot dump what is opened on a mount outside of the node, so the command never gets the
caller's own files and terminals: it gets pipes, the node's /dev/null, or a terminal of the node's.
"""

import fcntl
import os
import signal
import stat
import struct
import termios
import tty
from dataclasses import dataclass
from pathlib import Path

from testbed import kernel
from testbed.errors import TestbedError
from testbed.hatch import reset_signals
from testbed.node import Node
from testbed.relay import Relay

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class User:
    """A line of the node's /etc/passwd, and the groups the user is in."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str
    groups: list[int]

    def environment(self) -> dict[str, str]:
        """What login(1) would set."""
        sbin = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {
            "HOME": self.home,
            "USER": self.name,
            "LOGNAME": self.name,
            "SHELL": self.shell,
            "PATH": sbin if self.uid == 0 else "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
        }


def find_user(name: str, etc: Path) -> User:
    """:param etc: the node's /etc. :raises TestbedError: if there is no such user."""
    for line in (etc / "passwd").read_text().splitlines():
        found, _, uid, gid, _, home, shell = line.split(":")
        if found == name:
            break
    else:
        raise TestbedError(f"the node has no user {name}", "it has root, alice and bob")
    groups = [int(gid)]
    for line in (etc / "group").read_text().splitlines():
        _, _, group, members = line.split(":")
        if name in members.split(","):
            groups.append(int(group))
    return User(name, int(uid), int(gid), home, shell, groups)


def _is_null(fd: int) -> bool:
    status = os.fstat(fd)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3)


def _is_plain_pipe(fd: int) -> bool:
    """Whether it is a pipe without a name: the only thing from outside that a process may keep."""
    status = os.fstat(fd)
    if not stat.S_ISFIFO(status.st_mode):
        return False
    reader, writer = os.pipe()
    try:
        return os.fstat(reader).st_dev == status.st_dev
    finally:
        os.close(reader)
        os.close(writer)


def _plain_stdio(user: User, relay: Relay) -> list[int]:
    """The command's descriptors 0, 1 and 2, for a caller that wants no terminal."""
    inside = []
    for fd in (0, 1, 2):
        if _is_null(fd):
            inside.append(os.open("/dev/null", os.O_RDWR))
        elif _is_plain_pipe(fd):
            os.fchown(fd, user.uid, user.gid)  # so that it can open its /dev/stdout
            inside.append(fd)
        else:
            reader, writer = os.pipe()
            os.fchown(reader, user.uid, user.gid)
            if fd == 0:
                relay.add_input(0, writer)
                inside.append(reader)
            else:
                relay.add_output(reader, fd)
                inside.append(writer)
    return inside


def _terminal(user: User, relay: Relay) -> tuple[int, int]:
    """A new terminal of the node's: master and slave."""
    master, slave = os.openpty()
    os.fchown(slave, user.uid, 5)
    _copy_window_size(master)
    relay.add_output(master, 1)
    end_of_file = termios.tcgetattr(slave)[6][termios.VEOF]
    relay.add_input(0, os.dup(master), at_end=end_of_file)
    return master, slave


def _copy_window_size(master: int) -> None:
    size = struct.pack("HHHH", 24, 80, 0, 0)
    if os.isatty(0):
        size = fcntl.ioctl(0, termios.TIOCGWINSZ, size)
    fcntl.ioctl(master, termios.TIOCSWINSZ, size)


def _become(user: User, command: list[str], stdio: list[int], with_tty: bool) -> None:
    """Turn this process, a child, into the command. Returns only if that fails, with OSError."""
    os.setsid()
    for fd, target in zip(stdio, (0, 1, 2), strict=True):
        os.dup2(fd, target)  # inheritable, also when both are the same
    if with_tty:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.closerange(3, 1 << 20)
    reset_signals()
    os.umask(0o022)
    os.setgroups(user.groups)
    os.setgid(user.gid)
    os.setuid(user.uid)
    os.chdir(user.home)
    environment = user.environment()
    if with_tty:
        environment["TERM"] = os.environ.get("TERM", "linux")
    os.execvpe(command[0], command, environment)


def _child(user: User, command: list[str], stdio: list[int], procs: int, with_tty: bool) -> int:
    """:return: the exit status, as a shell's, if the command cannot be started."""
    try:
        os.write(procs, b"0")
        _become(user, command, stdio, with_tty)
    except OSError as error:
        os.write(2, f"nodes: {command[0]}: {error.strerror}\n".encode())
        return 127 if isinstance(error, FileNotFoundError) else 126
    return 126


def _enter(node: Node, user_name: str) -> tuple[User, int]:
    """Enter the node's namespaces, for good.

    :return: the user there, and a descriptor: what writes "0" to it joins the user's cgroup.
    """
    pid = node.pid_or_error()
    try:
        user = find_user(user_name, Path(f"/proc/{pid}/root/etc"))
        group = node.cgroup / f"user-{user.name}"
        group.mkdir(exist_ok=True)
        procs = os.open(group / "cgroup.procs", os.O_WRONLY)
        kernel.setns(os.pidfd_open(pid), kernel.NODE_NAMESPACES)
    except OSError as error:
        what = f"cannot enter {node.name}: {error}"
        raise TestbedError(what, "has it just been switched off?") from error
    return user, procs


def execute(node: Node, command: list[str], user_name: str = "root", with_tty: bool = False) -> int:
    """Run `command` in the node, with this process's standard streams, and wait for it.

    This process enters the node's namespaces itself and cannot leave them.

    :return: its exit status, 128 + n if signal n ended it.
    """
    user, procs = _enter(node, user_name)
    relay = Relay()
    master = -1
    if with_tty:
        master, slave = _terminal(user, relay)
        stdio = [slave] * 3
    else:
        stdio = _plain_stdio(user, relay)
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until there is someone to forward to
    try:
        child = os.fork()
    except OSError as error:  # what the kernel says when the pid namespace's init is dead
        raise TestbedError(f"{node.name} has been switched off ({error})") from error
    if child == 0:
        os._exit(_child(user, command, stdio, procs, with_tty))
    null = os.open("/dev/null", os.O_RDWR)
    # Ours would keep a pipe open after the command's end. A terminal is kept until then: without a
    # user for a moment it would be hung up.
    for fd in set() if with_tty else set(stdio):
        os.dup2(null, fd) if fd <= 2 else os.close(fd)
    return _wait(child, relay, master)


def _wait(child: int, relay: Relay, master: int) -> int:
    def forward(number: int, _frame: object) -> None:
        os.killpg(child, number) if os.getpgid(child) == child else os.kill(child, number)

    # A signal just before the relay waits would be seen only when that has something to do.
    wakeup, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    relay.add_wakeup(wakeup)
    for number in FORWARDED:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    saved = None
    if master >= 0 and os.isatty(0):
        saved = termios.tcgetattr(0)
        signal.signal(signal.SIGWINCH, lambda *_: _copy_window_size(master))
        tty.setraw(0)
    try:
        relay.run(os.pidfd_open(child))
    except BrokenPipeError:  # nobody reads our output any more: nor does anybody read the command's
        os.kill(child, signal.SIGPIPE)
    finally:
        if saved is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, saved)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
