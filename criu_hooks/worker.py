"""The process that speaks CRIU's RPC for one call.

It is ``python -m criu_hooks.worker`` with the owner's socket as stdin. CRIU's RPC is described in
its wiki («RPC») and images/rpc.proto. pycriu's own client has no notifications, so the loop is
here: send one request, answer each NOTIFY, stop at the response.
"""

from __future__ import annotations

import socket
import sys
from contextlib import ExitStack

import msgspec
from pycriu import rpc_pb2

from criu_hooks.calls import (
    MAX_MESSAGE,
    READY,
    Done,
    DumpRequest,
    Event,
    FeatureRequest,
    Notify,
    Proceed,
    Request,
    RestoreRequest,
)
from criu_hooks.image_format import ImageError
from criu_hooks.image_gate import ImageGate
from criu_hooks.log import cause
from criu_hooks.urgency import urgent

LOG_LEVEL = 2
"""criu's warnings and errors; more costs time while the process is frozen"""


def _build(request: Request) -> rpc_pb2.criu_req:
    req = rpc_pb2.criu_req()
    req.notify_success = True
    opts = req.opts
    match request:
        case DumpRequest():
            req.type = rpc_pb2.DUMP
            opts.pid = request.pid
            opts.leave_running = True
            opts.freeze_cgroup = request.freeze_cgroup
            opts.ghost_limit = request.ghost_limit_bytes
            opts.ps.fd = request.page_server_fd
            opts.ps.port = 0
            opts.external.extend(request.external)
        case RestoreRequest():
            req.type = rpc_pb2.RESTORE
            opts.rst_sibling = True
            for inherited in request.inherit_fds:
                opts.inherit_fd.add(key=inherited.key, fd=inherited.fd)
        case FeatureRequest():
            req.type = rpc_pb2.VERSION
            return req
    opts.images_dir_fd = request.images_fd
    opts.shell_job = request.shell_job
    opts.notify_scripts = True
    opts.manage_cgroups_mode = rpc_pb2.IGNORE
    opts.log_level = LOG_LEVEL
    opts.log_file = request.log_path.rpartition("/")[2]
    opts.file_locks = True
    opts.link_remap = True
    opts.evasive_devices = False
    return req


def _serve(owner: socket.socket) -> Done:
    data, fds, _, _ = socket.recv_fds(owner, MAX_MESSAGE, 3)
    if not data:
        return Done(ok=True)
    request = msgspec.msgpack.decode(data, type=Request)
    if len(fds) != (3 if isinstance(request, RestoreRequest) else 1):
        sys.exit("criu worker: a request without its descriptors")
    with ExitStack() as stack:
        criu = stack.enter_context(socket.socket(fileno=fds[0]))
        if not isinstance(request, RestoreRequest):
            return _call(owner, criu, request, None)
        gate = stack.enter_context(ImageGate(request, fds[1], fds[2]))
        try:
            gate.read()
            return _call(owner, criu, request, gate)
        except ImageError as error:
            return Done(False, f"the images were refused: {error}")


def _call(
    owner: socket.socket, criu: socket.socket, request: Request, gate: ImageGate | None
) -> Done:
    """:raises ImageError: the images were refused."""
    criu.send(_build(request).SerializeToString())
    while True:
        reply = criu.recv(MAX_MESSAGE)
        if not reply:
            return Done(False, _reason(request, gate) or "criu was killed")
        resp = rpc_pb2.criu_resp.FromString(reply)
        if resp.type != rpc_pb2.NOTIFY:
            break
        if gate is not None:
            gate.pass_by(resp.notify.script)
        _tell(owner, Notify(resp.notify.script, resp.notify.pid))
        answer = owner.recv(MAX_MESSAGE)
        if not answer:
            # The owner is gone: closing the RPC socket makes criu undo the call.
            return Done(False, "the owner of the call was killed")
        ok = msgspec.msgpack.decode(answer, type=Proceed).ok
        criu.send(rpc_pb2.criu_req(type=rpc_pb2.NOTIFY, notify_success=ok).SerializeToString())
    if resp.success:
        return Done(ok=True)
    return Done(False, _reason(request, gate) or resp.cr_errmsg or f"errno {resp.cr_errno}")


def _reason(request: Request, gate: ImageGate | None) -> str:
    if gate is not None:
        return cause(gate.log())
    if isinstance(request, FeatureRequest):
        return ""
    try:
        with open(request.log_path, errors="replace") as log:
            return cause(log.read())
    except OSError:
        return ""


def _tell(owner: socket.socket, event: Event) -> None:
    owner.send(msgspec.msgpack.encode(event))


def serve(owner: socket.socket) -> None:
    """Serve one call for the owner at the other end."""
    with owner, urgent():
        try:
            _tell(owner, Notify(READY))
            _tell(owner, _serve(owner))
        except OSError as error:
            sys.exit(f"criu worker: {error}")


def main() -> None:
    """Serve one call for the owner on stdin."""
    serve(socket.socket(fileno=0))


if __name__ == "__main__":
    main()
