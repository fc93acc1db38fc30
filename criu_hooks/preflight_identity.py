"""Which processes may move at all, and by whom."""

from __future__ import annotations

from collections.abc import Iterator

from criu_hooks.obstacles import Note, Obstacle, printable, process_subject
from criu_hooks.proc import Credentials, command_of
from criu_hooks.surroundings import Surroundings
from criu_hooks.tree import Process, ProcessTree
from criu_hooks.vfork import awaits_child

# systemd ≥ 254 gives it to every user's session; it lets nobody do what the destination would not.
_CAP_WAKE_ALARM = 1 << 35
_IT_STAYS = "processes of this kind stay where they are"


def forbidden(process: Process, caller_uid: int) -> Obstacle | None:
    """Why the caller may not move this process, whatever else is true of it.

    Nothing about the process's files or memory is said, as the caller may have no right to know.
    """
    subject = process_subject(process)
    if process.pid == 1:
        return Obstacle(subject, "is the init process of this host", _IT_STAYS)
    if process.kernel_thread:
        return Obstacle(subject, "is a kernel thread", _IT_STAYS)
    if caller_uid != 0 and not _owned(process, caller_uid):
        return Obstacle(
            subject, "belongs to another user", "only its owner or root can move a process"
        )
    if process.zombie and process.status.threads > 1:
        return Obstacle(
            subject,
            "its main thread has ended while others run, which CRIU can not dump",
            "keep the main thread until the others have ended",
        )
    if process.zombie:
        return Obstacle(subject, "has ended already (zombie)", "its parent has to wait for it")
    if caller_uid != 0 and not process.dumpable:
        return Obstacle(
            subject,
            "is protected against its owner (not dumpable)",
            "run it without prctl(PR_SET_DUMPABLE, 0) and from a readable file, or ask root",
        )
    if process.opaque:
        return Obstacle(subject, "can not be examined", "ask root to move it")
    return None


def _owned(process: Process, uid: int) -> bool:
    return all(
        thread.credentials.uids.same and thread.credentials.uids.real == uid
        for thread in process.threads
    )


def own_shell(tree: ProcessTree) -> Obstacle:
    """The client that asks runs in the tree itself."""
    return Obstacle(
        process_subject(tree.root),
        "the migrate command itself runs in it",
        "run migrate from another terminal",
    )


def identity_obstacles(tree: ProcessTree, around: Surroundings) -> Iterator[Obstacle]:
    """What is wrong with the processes themselves; their files are looked at elsewhere."""
    for process in tree.members:
        if process is not tree.root and process.zombie and process.status.threads <= 1:
            continue
        yield from _of_process(process, tree.root, around)


def _of_process(process: Process, root: Process, around: Surroundings) -> Iterator[Obstacle]:
    subject = process_subject(process)
    if process is not root and (reason := _unfit_member(process)):
        yield Obstacle(subject, reason, "wait until it has ended, or end it")
        return
    yield from _of_credentials(process, root)
    if process.status.core_dumping:
        yield Obstacle(subject, "is dumping core", "let it end")
    if process.private.memory.thirty_two_bit:
        yield Obstacle(subject, "is a 32-bit program", "use a 64-bit build of it")
    if process.private.root not in ("", "/"):
        yield Obstacle(
            subject,
            f"has another root directory ({printable(process.private.root)})",
            "start it without chroot",
        )
    if names := around.namespaces.differing(process.private.namespaces):
        yield Obstacle(
            subject,
            f"lives in other namespaces than its host ({', '.join(names)})",
            "start it outside of containers and sandboxes",
        )
    label = process.private.security_label
    if label not in ("", "unconfined") and ":unconfined_t:" not in label:
        yield Obstacle(
            subject,
            f"is confined by a security policy ({printable(label)})",
            "start it unconfined",
        )
    yield from _of_threads(process)


def _unfit_member(process: Process) -> str:
    if process.zombie:
        return "its main thread has ended while others run, which CRIU can not dump"
    return "can not be examined" if process.opaque else ""


def _of_credentials(process: Process, root: Process) -> Iterator[Obstacle]:
    subject = process_subject(process)
    mine = process.credentials
    if not mine.uids.same or not mine.gids.same:
        yield Obstacle(
            subject,
            "has gained or put aside rights (set-user-ID or set-group-ID)",
            "only processes with one user and one group id can move",
        )
    elif mine.uids != root.credentials.uids:
        yield Obstacle(
            subject,
            f"runs as another user ({mine.uids.real}) than the root of its tree",
            "end it, or move the processes of one user only",
        )
    if _powers(mine):
        yield Obstacle(
            subject,
            "has capabilities, and a guest never has any",
            "run it as an ordinary user, without sudo or file capabilities",
        )
    if any(_rights(thread.credentials) != _rights(mine) for thread in process.threads):
        yield Obstacle(
            subject, "its threads have different rights", "give all threads the same ids"
        )


def _powers(credentials: Credentials) -> int:
    sets = credentials.capabilities
    return (sets.permitted | sets.effective | sets.ambient) & ~_CAP_WAKE_ALARM


def _rights(credentials: Credentials) -> tuple[object, ...]:
    return credentials.uids, credentials.gids, credentials.groups, credentials.capabilities


def _of_threads(process: Process) -> Iterator[Obstacle]:
    subject = process_subject(process)
    tracers = sorted({thread.tracer_pid for thread in process.threads} - {0})
    for tracer in tracers:
        yield Obstacle(
            subject,
            f"is being traced by pid {tracer} ({printable(command_of(tracer))})",
            "detach the debugger or strace",
        )
    if any(thread.seccomp for thread in process.threads):
        yield Obstacle(
            subject,
            "runs under a seccomp filter, so that no deputy could take its place",
            "start it without the sandbox (for a systemd service: SystemCallFilter=)",
        )
    if any(awaits_child(t.state, t.kernel_function) for t in process.threads):
        yield Obstacle(
            subject,
            "is just starting a program (vfork)",
            "try again when that runs",
            passing=True,
        )


def identity_notes(tree: ProcessTree) -> Iterator[Note]:
    """Tasks that may make the freeze take long."""
    for process in tree.members:
        stuck = [
            t
            for t in process.threads
            if t.state == "D" and not awaits_child(t.state, t.kernel_function)
        ]
        if stuck:
            where = printable(stuck[0].kernel_function or "the kernel")
            yield Note(
                process_subject(process),
                f"waits uninterruptibly ({where}); it can be frozen only when that is over",
            )
