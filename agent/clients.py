"""The socket for users of this host. Who they are, the kernel says (SO_PEERCRED)."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from agent.broker import Broker
from agent.group_plan import Caller
from agent.handover import Tell
from agent.repeated import Repeated
from migrate import group_messages, messages, paths
from migrate.errors import MigrateError, UserError
from migrate.framing import MALFORMED, encode_frame, read_frame

log = logging.getLogger(__name__)

_LINES_PER_USER = 20
"""a minute; the rest is counted"""

_UCRED = struct.Struct("3i")
REQUEST_SECONDS = 10.0
MAX_REQUEST_BYTES = 1 << 16
CONNECTIONS_PER_USER = 64


class ClientServer:
    """Serves migd.sock in the running loop, from `start` to `close`."""

    def __init__(self, broker: Broker, path: Path = paths.MIGD_SOCKET) -> None:
        self._broker = broker
        self._path = path
        self._server: asyncio.Server | None = None
        self._open: Counter[int] = Counter()
        self._told = Repeated(log, burst=_LINES_PER_USER)

    async def start(self) -> None:
        """Listen."""
        self._path.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(self._path))
        # Every user may ask; what is granted depends on who asks.
        self._path.chmod(0o666)
        # Its file stays when migd ends: who comes then waits for its successor.
        options: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        self._server = await asyncio.start_unix_server(self._serve, sock=sock, **options)

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock: socket.socket = writer.get_extra_info("socket")
        pid, uid, _ = _UCRED.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        self._open[uid] += 1
        try:
            if self._open[uid] > CONNECTIONS_PER_USER:
                raise UserError(f"uid {uid}", "has too many requests open", "wait for them")
            async with asyncio.timeout(REQUEST_SECONDS):
                frame = await read_frame(reader, MAX_REQUEST_BYTES)
            if frame is None:
                return
            try:
                request = messages.decode_request(frame)
            except MALFORMED as error:
                raise UserError("request", f"makes no sense to migd ({error})") from None
            if request.protocol != messages.PROTOCOL:
                raise UserError(
                    "migrate", "is of another version than migd", "restart migd after an upgrade"
                )

            async def tell(progress: messages.Progress) -> None:
                writer.write(encode_frame(messages.encode(progress)))

            reply = await self._answer(request, uid, pid, tell)
            writer.write(encode_frame(messages.encode(reply)))
        except MigrateError as error:
            self._told.say(logging.INFO, f"uid {uid}", str(error))
            refusal = messages.Refused((messages.Obstacle(error.what, error.reason, error.remedy),))
            writer.write(encode_frame(messages.encode(refusal)))
        except (TimeoutError, OSError):
            return
        except Exception:
            log.exception("a request failed")
            failure = messages.Obstacle("migd", "internal error", "see its log")
            writer.write(encode_frame(messages.encode(messages.Refused((failure,)))))
        finally:
            self._open[uid] -= 1
            writer.close()

    async def _answer(
        self, request: messages.Request, uid: int, pid: int, tell: Tell
    ) -> messages.Reply:
        match request:
            case messages.Move():
                return await self._broker.move(request, uid, pid, tell)
            case messages.ListGuests():
                return self._broker.list_guests(uid)
            case messages.AskHistory(count):
                return self._broker.history(uid, count)
            case group_messages.JoinGroup():
                return self._broker.groups.join(request, uid)
            case group_messages.ResetGroup():
                return self._broker.groups.reset(request, uid)
            case group_messages.ListGroup():
                return await asyncio.to_thread(self._broker.groups.list(request))
            case group_messages.PlanGroup():
                plan = self._broker.groups.plan(request, Caller(uid, pid))
                return await asyncio.to_thread(plan)
            case group_messages.EvictGroup():
                return self._broker.groups.evict(request, uid)
            case messages.Recover():
                if uid != 0:
                    raise UserError("recover", "is for root only")
                return await self._broker.recover(request)
