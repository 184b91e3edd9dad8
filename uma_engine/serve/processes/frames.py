"""What goes over the socket between a front end and the engine process: a length, then msgpack.

Knows bytes; does not know what they are for. No pickle: a frame is data of declared types or an error.
"""

from __future__ import annotations

import asyncio

import msgspec

__all__ = [
    "Ask",
    "Frame",
    "Head",
    "Leave",
    "Part",
    "Ping",
    "Pong",
    "decode_frame",
    "encode_frame",
    "read_frame",
    "write_frame",
]

LARGEST = 256 * 2**20


class Ask(msgspec.Struct, tag="ask", array_like=True, frozen=True):
    """A request, whole."""

    id: int
    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Leave(msgspec.Struct, tag="leave", array_like=True, frozen=True):
    """The client of a request has gone."""

    id: int


class Ping(msgspec.Struct, tag="ping", array_like=True, frozen=True):
    pass


class Head(msgspec.Struct, tag="head", array_like=True, frozen=True):
    """An answer's first frame."""

    id: int
    status: int
    headers: list[tuple[bytes, bytes]]


class Part(msgspec.Struct, tag="part", array_like=True, frozen=True):
    """A piece of an answer's body."""

    id: int
    body: bytes
    last: bool


class Pong(msgspec.Struct, tag="pong", array_like=True, frozen=True):
    """How far the engine is: `steps` grows while `requests` are there, or it hangs."""

    steps: int
    requests: int


Frame = Ask | Leave | Ping | Head | Part | Pong
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


async def read_frame(reader: asyncio.StreamReader) -> Frame:
    """The next frame. Errors: ConnectionError where the other side has gone or sends what is no frame"""
    try:
        size = int.from_bytes(await reader.readexactly(4))
        if size > LARGEST:
            raise ConnectionError(f"a frame of {size} bytes")
        return decode_frame(await reader.readexactly(size))
    except asyncio.IncompleteReadError as error:
        raise ConnectionError("the other process has gone") from error


def encode_frame(frame: Frame) -> bytes:
    return _encoder.encode(frame)


def decode_frame(data: bytes) -> Frame:
    """Errors: ConnectionError for what is no frame"""
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ConnectionError(f"not a frame: {error}") from error


def write_frame(writer: asyncio.StreamWriter, frame: Frame) -> None:
    """Queue a frame; `await writer.drain()` bounds what is queued."""
    data = encode_frame(frame)
    writer.write(len(data).to_bytes(4) + data)
