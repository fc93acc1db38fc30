"""Which ids two hosts get that join: the same in both their files, and nobody else's."""

from dataclasses import dataclass, field, replace

from migrate.errors import ConfigError


@dataclass(frozen=True)
class Standing:
    """What a host knows before it joins: itself, and others by name and id."""

    name: str
    host_id: int
    others: dict[str, int] = field(default_factory=dict)

    @property
    def is_fresh(self) -> bool:
        """It knows nobody: so nobody minds if its id changes."""
        return not self.others


def agree_on_ids(caller: Standing, acceptor: Standing, wanted: int | None) -> tuple[int, int]:
    """The caller's id and the acceptor's.

    :param wanted: the id that the administrator gave the acceptor.
    :raises ConfigError: there is no such pair unless a person changes something.
    """
    if caller.name == acceptor.name:
        raise ConfigError(
            f"host {acceptor.name}",
            "both hosts have this name",
            "give one of them another in its config.toml",
        )
    theirs = _own_wish(acceptor, caller, wanted)
    if (holder := _holder(theirs, acceptor.name, caller, acceptor)) is not None:
        if acceptor.is_fresh and wanted is None:
            theirs = _free(caller, acceptor)
        elif not (holder == caller.name and caller.is_fresh):
            raise _taken(acceptor.name, theirs, holder)
    acceptor = replace(acceptor, host_id=theirs)
    ours = _own_wish(caller, acceptor, None)
    if (holder := _holder(ours, caller.name, caller, acceptor)) is not None:
        if not caller.is_fresh:
            raise _taken(caller.name, ours, holder)
        ours = _free(caller, acceptor)
    return ours, theirs


def _own_wish(host: Standing, other: Standing, wanted: int | None) -> int:
    """The id a host should keep: its own, or the one by which the other knew it before."""
    known = other.others.get(host.name, host.host_id)
    wish = wanted if wanted is not None else known if host.is_fresh else host.host_id
    if not host.is_fresh and wish != host.host_id:
        raise ConfigError(
            f"host {host.name}",
            f"has the id {host.host_id} among its peers already",
            f"leave --id out, or change it in all their files to {wish}",
        )
    if known != wish and wanted is None:
        raise ConfigError(
            f"host {host.name}",
            f"calls itself id {host.host_id}, but host {other.name} lists it with id {known}",
            "correct one of the two files",
        )
    return wish


def _holder(number: int, name: str, caller: Standing, acceptor: Standing) -> str | None:
    """Who else has this id, as far as either knows."""
    for host in (caller, acceptor):
        for other, other_id in ((host.name, host.host_id), *host.others.items()):
            if other != name and other_id == number:
                return other
    return None


def _free(caller: Standing, acceptor: Standing) -> int:
    used = {caller.host_id, acceptor.host_id, *caller.others.values(), *acceptor.others.values()}
    return max(used) + 1


def _taken(name: str, number: int, holder: str) -> ConfigError:
    return ConfigError(
        f"host {name}",
        f"its id {number} is already that of host {holder}",
        "give another with --id, or change it in its config.toml",
    )
