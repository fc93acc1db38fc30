"""What images say about open files, adapted to files that live on at home while nobody here runs.

CRIU refuses a file whose size is not what it was at the dump. That guards mapped files, whose contents
the process has in part in its memory. A file that is only open is another matter: at home, too, somebody
may append to a log while its reader is stopped. So the sizes of such files of the home view are taken out.
"""

from __future__ import annotations

from criu_hooks import image_kinds as kinds
from criu_hooks.image_format import Image
from criu_hooks.protobuf_wire import replace

_FILES = "files.img"
_REG, _SIZE = 3, 8
"""numbers of fields"""


def forget_sizes(directory_fd: int, view: tuple[str, ...], mapped: frozenset[int]) -> None:
    """Take out the sizes of open files that are mapped nowhere.

    :param directory_fd: of the directory with the images.
    :param view: the directories that come from home.
    :param mapped: ids of the files that a process maps or was started from.
    :raises ImageError: an image cannot be read.
    """
    try:
        files = Image.read(directory_fd, _FILES)
    except FileNotFoundError:
        return
    changed = [_without_size(message, mapped, view) for message in files.messages]
    if changed != files.messages:
        files.messages = changed
        files.write(directory_fd, _FILES)


def _without_size(message: bytes, mapped: frozenset[int], view: tuple[str, ...]) -> bytes:
    data = kinds.FILE.read(message).blobs.get("reg")
    if data is None:
        return message
    reg = kinds.REG.read(data)
    if "size" not in reg.numbers or reg.number("id") in mapped:
        return message
    path = reg.path("name")
    if not any(path.startswith(top + "/") for top in view):
        return message
    return replace(message, _REG, replace(data, _SIZE, None))
