"""What two parsers could read differently is refused."""

import pytest
from criu_images import encode

from criu_hooks import image_kinds as kinds
from criu_hooks.image_format import ImageError
from criu_hooks.protobuf_wire import Kind, encode_varint, replace

EXAMPLE = Kind("example", "small=1 large=2l text=3b fixed=4f* numbers=5* texts=200b*")


def test_every_type_of_field_is_read() -> None:
    data = encode(EXAMPLE, small=7, large=1 << 63, text="ab", numbers=[1, 300], texts=["x", ""])
    found = EXAMPLE.read(data + b"\x21" + bytes(range(8)))
    assert found.numbers == {"small": 7, "large": 1 << 63}
    assert found.blobs == {"text": b"ab"}
    assert found.lists == {"numbers": [1, 300]}
    assert found.blob_lists == {"texts": [b"x", b""], "fixed": [bytes(range(8))]}


def test_what_is_not_there_is_nothing() -> None:
    found = EXAMPLE.read(b"")
    assert (found.number("small"), found.path("text")) == (0, "")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x08\x01\x08\x02", "small twice"),
        (b"\x1a\x01a\x1a\x01b", "text twice"),
        (b"\x30\x01", r"unknown field \(6\)"),
        (b"\x0a\x01a", r"unknown field \(1\)"),  # a number, but sent as text
        (b"\x2a\x02\x01\x02", r"unknown field \(5\)"),  # packed
        (b"\x08" + encode_varint(1 << 32), "too large a small"),
        (b"\x08" + b"\xff" * 10, "no end"),
        (b"\x08", "cut off"),
        (b"\x08\x80", "cut off"),
        (b"\x1a\x02a", "cut off"),
        (b"\x1a", "cut off"),
        (b"\x21\0\0\0", "cut off"),
        (b"\x0b\x0c", "unknown field"),  # a group
    ],
)
def test_a_message_that_is_not_exactly_one_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        EXAMPLE.read(data)


def test_a_path_with_a_zero_byte_is_refused() -> None:
    found = EXAMPLE.read(encode(EXAMPLE, text=b"/etc/shadow\0/home"))
    with pytest.raises(ImageError, match="zero byte"):
        found.path("text")


def test_a_path_need_not_be_text() -> None:
    assert EXAMPLE.read(encode(EXAMPLE, text=b"/\xff")).path("text") == "/\udcff"


def test_replacing_leaves_all_else() -> None:
    data = encode(EXAMPLE, small=7, text="a" * 200, large=1, texts=["b"])
    assert replace(data, 3, b"cd") == encode(EXAMPLE, small=7, text="cd", large=1, texts=["b"])
    assert replace(data, 1, None) == encode(EXAMPLE, text="a" * 200, large=1, texts=["b"])
    assert replace(data, 2, b"\x05") == encode(
        EXAMPLE, small=7, text="a" * 200, large=5, texts=["b"]
    )
    assert replace(data, 5, b"\x01") == data


def test_the_messages_are_those_of_criu() -> None:
    """Also its newer fields must be known here: else every image with them would be refused."""
    images = pytest.importorskip("pycriu.images", reason="pycriu: Debian's python3-pycriu")
    import importlib
    import pkgutil

    messages = {}
    for module in pkgutil.iter_modules(images.__path__):
        if module.name.endswith("_pb2"):
            file = importlib.import_module(f"pycriu.images.{module.name}").DESCRIPTOR
            messages.update(file.message_types_by_name)
    wide, blobs, fixed = (3, 4, 5, 18), (9, 11, 12), (1, 6)  # FieldDescriptor.TYPE_*
    for kind in vars(kinds).values():
        if isinstance(kind, Kind):
            fields = (messages.get(f"{kind.name}_entry") or messages[kind.name]).fields
            theirs = [
                f"{field.name}={field.number}"
                + ("b" if field.type in blobs else "f" if field.type in fixed else "")
                + ("l" if field.type in wide else "")
                + ("*" if field.label == field.LABEL_REPEATED else "")
                for field in fields
            ]
            assert sorted(kind.fields) == sorted(theirs), kind.name
