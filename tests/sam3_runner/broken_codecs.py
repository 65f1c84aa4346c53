"""The decoder's processes, with codecs that go wrong where a file says so.

python -m tests.sam3_runner.broken_codecs …      # as `sam3_runner.decoder`
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

from sam3_runner import decoder, images

_MARK = b"ORDER:"


def segfault() -> None:
    ctypes.string_at(0)


def abort() -> None:
    os.abort()


def leave() -> None:
    os._exit(3)


def hang_in_c() -> None:
    ctypes.PyDLL(None).pause()  # and keep the interpreter's lock


def spin() -> None:
    while True:
        pass


def nap() -> None:
    time.sleep(0.2)


def eat() -> None:
    hoard = []
    while True:
        hoard.append(np.ones(1 << 23, np.uint8))


def eat_and_abort() -> None:
    """As C++ does where nobody expects `bad_alloc`."""
    try:
        eat()
    except MemoryError:
        os.abort()


def write_a_file() -> None:
    with open("/dev/shm/from-a-codec", "wb") as file:
        file.write(b"x")


def shrink_the_memory() -> None:
    """So that whoever reads it is killed."""
    for child in _children():
        os.ftruncate(child._memory_fd, 0)


def raise_a_bug() -> None:
    raise KeyError("a bug of ours")


def lie_about_the_size() -> None:
    for child in _children():
        child._channel.send(decoder.REPLY.pack(1, decoder.Outcome.DONE, 0, 60_000, 60_000))


def talk_nonsense() -> None:
    for child in _children():
        child._channel.send(b"nonsense")


def answer_unasked() -> None:
    def answer() -> None:
        time.sleep(0.5)  # after the answer, on a busy machine too
        for child in _children():
            child._channel.send(decoder.REPLY.pack(0, decoder.Outcome.DONE, 0, 64, 96))

    threading.Thread(target=answer, daemon=True).start()


def _children() -> list[decoder.Child]:
    return [thing for thing in gc.get_objects() if isinstance(thing, decoder.Child)]


ORDERS: dict[str, Callable[[], None]] = {
    order.__name__: order
    for order in (
        segfault,
        abort,
        leave,
        hang_in_c,
        spin,
        nap,
        eat,
        eat_and_abort,
        write_a_file,
        shrink_the_memory,
        raise_a_bug,
        lie_about_the_size,
        talk_nonsense,
        answer_unasked,
    )
}


def ordered(data: bytes, order: str) -> bytes:
    """The file, which makes its decoder do so."""
    return data + _MARK + order.encode()


def _obeying(decode: Callable[..., object]) -> Callable[..., object]:
    def obey(data: bytes, *rest: object) -> object:
        _, marked, order = data.rpartition(_MARK)
        if marked:
            ORDERS[order.decode()]()
        return decode(data, *rest)

    return obey


if __name__ == "__main__":
    for decode in (images.decode_for_model, images.decode_whole):
        vars(decoder)[decode.__name__] = _obeying(decode)
    decoder.main(sys.argv[1:])
