"""The errors that reach a user.

The class says who is to blame; the text says what, why, and what to do.
"""


class MigrateError(Exception):
    """Something that a user is told in one line: ``what: reason; remedy``.

    :param what: the thing it happened to (a pid, a host, a file).
    :param reason: what is wrong with it.
    :param remedy: what the user can do; may be empty.
    """

    def __init__(self, what: str, reason: str, remedy: str = "") -> None:
        self.what = what
        self.reason = reason
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.what}: {self.reason}"
        return f"{line}; {self.remedy}" if self.remedy else line


class UserError(MigrateError):
    """The request cannot be granted as it was made: wrong pid, wrong host, not allowed."""


class ConfigError(MigrateError):
    """A configuration file is wrong; `what` names the file and the key."""


class HostError(MigrateError):
    """This host lacks something: a program, a kernel feature, memory."""


class PeerError(MigrateError):
    """Another host refused, is down, or does not speak our protocol."""


class CriuError(MigrateError):
    """CRIU failed; `reason` is its own cause in one sentence."""
