"""What `migrate COMMAND` and migd's run.sock say to each other: fields of bytes with zero bytes between.

Deliberately without msgspec, dataclasses and the like, which would take longer to import than the
command takes to run. Nothing here is imported that an interpreter has not loaded anyway.

Client → migd, one packet, with four descriptors (a sealed memfd with the `Command`, then stdin, stdout
and stderr):   `run`, version, host, host id, `low` or nothing, title
migd or guard → client, a packet each:
    `progress`, step
    `refused`, what, reason, remedy       the end: nothing was run
    `here`, host                          the end: run it yourself
    `starting`, host, socket, program     with a signalfd: be the deputy, for the guard at `socket`
"""

from __future__ import annotations

from migrate.errors import MigrateError

VERSION = 1
RUN_SOCKET = "/run/migrate/run.sock"
MAX_REQUEST = 1 << 12
MAX_REPLY = 1 << 14
MAX_TITLE_BYTES = 200
MAX_COMMAND_BYTES = 8 << 20
"""The kernel takes no more than 6 MiB of arguments and environment."""


class WireError(MigrateError):
    """The other side says something that makes no sense."""

    def __init__(self, reason: str) -> None:
        super().__init__("request", reason, "use the same version of migrate and migd")


class Request:
    """Run a command for me. Whoever asks becomes its deputy."""

    def __init__(
        self, host: str = "", host_id: int = 0, low: bool = False, title: str = ""
    ) -> None:
        """
        :param host: its name; empty: any, or the one with this id.
        :param low: background priority.
        :param title: the command, for people.
        """
        self.host = host
        self.host_id = host_id
        self.low = low
        self.title = title

    def encode(self) -> bytes:
        """:raises WireError: the name of the host cannot be one."""
        fields = ("run", str(VERSION), self.host, str(self.host_id), "low" * self.low)
        title = self.title.encode(errors="replace")[:MAX_TITLE_BYTES].replace(b"\0", b" ")
        if "\0" in self.host or len(self.host) > MAX_REQUEST // 8:
            raise WireError("no host has such a name")
        return b"\0".join((*(field.encode(errors="replace") for field in fields), title))

    @classmethod
    def decode(cls, data: bytes) -> Request:
        """:raises WireError: it is none of this version."""
        fields = data.split(b"\0")
        if len(fields) != 6 or fields[:2] != [b"run", b"%d" % VERSION]:
            raise WireError("makes no sense to this version")
        host, host_id, low, title = (field.decode(errors="replace") for field in fields[2:])
        if not (host_id.isascii() and host_id.isdecimal() and len(host_id) < 10):
            raise WireError("its host id is no number")
        return cls(host, int(host_id), low == "low", title)


class Command:
    """What is to be executed. Everything else about it is its deputy's and asked of the kernel."""

    def __init__(
        self,
        file: bytes,
        arguments: tuple[bytes, ...],
        environment: tuple[bytes, ...],
        ignored_signals: tuple[int, ...] = (),
    ) -> None:
        """
        :param arguments: argv, with argv[0].
        :param environment: NAME=VALUE each.
        """
        self.file = file
        self.arguments = arguments
        self.environment = environment
        self.ignored_signals = ignored_signals

    def encode(self) -> bytes:
        """Fields: ignored signals, file, number of arguments, arguments, environment."""
        ignored = b",".join(b"%d" % number for number in self.ignored_signals)
        count = b"%d" % len(self.arguments)
        return b"\0".join((ignored, self.file, count, *self.arguments, *self.environment))

    @classmethod
    def decode(cls, data: bytes) -> Command:
        """:raises WireError: it is none."""
        fields = data.split(b"\0")
        if len(fields) < 4:
            raise WireError("holds no command")
        try:
            ignored = tuple(int(number) for number in fields[0].split(b",") if number)
            count = int(fields[2])
        except ValueError:
            raise WireError("its command makes no sense") from None
        if not 1 <= count <= len(fields) - 3:
            raise WireError("its command has not the arguments it counts")
        end = 3 + count
        return cls(fields[1], tuple(fields[3:end]), tuple(fields[end:]), ignored)


class Reply:
    """A word and its fields; see the module."""

    def __init__(self, word: str, *fields: str) -> None:
        self.word = word
        self.fields = fields

    def encode(self) -> bytes:
        """As a packet; a field that is far too long is cut."""
        texts = (self.word, *self.fields)
        return b"\0".join(t.replace("\0", " ").encode(errors="replace")[:4000] for t in texts)

    @classmethod
    def decode(cls, data: bytes) -> Reply:
        """Of a packet from migd, which is trusted."""
        word, *fields = (field.decode(errors="replace") for field in data.split(b"\0"))
        return cls(word, *fields)

    @classmethod
    def refused(cls, error: MigrateError) -> Reply:
        """Nothing was run, for this reason."""
        return cls("refused", error.what, error.reason, error.remedy)
