"""The header of a GGUF file, looked over before anybody believes it.

The gguf package's reader takes counts and lengths as they stand there: an array of 2^62 entries keeps it busy until memory is gone, and the product
of a tensor's dimensions wraps around. `check` walks over the header once, asks for no memory, and refuses what does not lie inside of the file.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

from ...core.error import FormatError

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}          # bytes of a value of each plain type
STRING, ARRAY, UINT32 = 8, 9, 4
ENTRIES = 2**21                                                   # of all arrays together; the reader makes an object of each. A vocabulary has 2^18
DIMENSIONS = 4


def check(path: str | Path) -> None:
    """Raises FormatError: no GGUF file of version 2 or 3 in little-endian order, or one whose header speaks of more than the file holds."""
    path = Path(path)
    with path.open("rb") as file:
        size = path.stat().st_size
        try:
            _Walk(file, size).whole()
        except (_Torn, UnicodeDecodeError) as error:
            raise FormatError(f"{path} is no whole GGUF file: {error}. It is truncated or of another kind; write it anew") from None


class _Torn(Exception):
    """What is wrong."""


class _Walk:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.entries, self.alignment = file, size, 0, 32

    def number(self, form: str) -> int:
        """The next integer."""
        raw = self.file.read(struct.calcsize(form))
        if len(raw) < struct.calcsize(form):
            raise _Torn(f"its header ends at byte {self.size}, in the middle of something")
        return int(struct.unpack(f"<{form}", raw)[0])

    def skip(self, n: int, what: str) -> None:
        """Go on by n bytes, which must be there."""
        if n > self.size - self.file.tell():
            raise _Torn(f"{what} takes {n} bytes, and {self.size - self.file.tell()} follow")
        self.file.seek(n, 1)

    def text(self, what: str) -> str:
        """The next string."""
        n = self.number("Q")
        if n > min(self.size - self.file.tell(), 2**16):
            raise _Torn(f"{what} has {n} bytes")
        return self.file.read(n).decode("utf-8")

    def whole(self) -> None:
        """All of the header, and where each tensor lies."""
        if self.file.read(4) != b"GGUF":
            raise _Torn("it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            raise _Torn(f"it is of version {version}, and versions 2 and 3 are read")
        tensors, keys = self.number("Q"), self.number("Q")
        for n in range(keys):
            self.value(self.text(f"the name of key {n}"))
        found = [self.tensor(n) for n in range(tensors)]
        start = -(-self.file.tell() // self.alignment) * self.alignment
        for name, offset, length in found:
            if start + offset + length > self.size:
                raise _Torn(f"the tensor {name!r} takes {length} bytes from {start + offset} on, and the file has {self.size}")

    def value(self, key: str) -> None:
        """One value of the header."""
        kind = self.number("I")
        if key == "general.alignment" and kind == UINT32:
            self.alignment = self.number("I")
            if not 0 < self.alignment <= 2**16 or self.alignment & (self.alignment - 1):
                raise _Torn(f"it is aligned to {self.alignment} bytes")
        elif kind == STRING:
            self.skip(self.number("Q"), key)
        elif kind == ARRAY:
            self.array(key)
        elif kind in SIZES:
            self.skip(SIZES[kind], key)
        else:
            raise _Torn(f"{key} is of type {kind}, which does not exist")

    def array(self, key: str) -> None:
        """A list of strings or of plain values."""
        kind, n = self.number("I"), self.number("Q")
        self.entries += n
        if self.entries > ENTRIES:
            raise _Torn(f"{key} has {n} entries; a header holds at most {ENTRIES}")
        if kind in SIZES:
            self.skip(n * SIZES[kind], key)
        elif kind == STRING:
            for _ in range(n):
                self.skip(self.number("Q"), key)
        else:
            raise _Torn(f"{key} is a list of values of type {kind}")

    def tensor(self, n: int) -> tuple[str, int, int]:
        """Name, offset and bytes of a tensor."""
        from gguf import GGML_QUANT_SIZES

        name = self.text(f"the name of tensor {n}")
        count = self.number("I")
        if not 0 < count <= DIMENSIONS:
            raise _Torn(f"the tensor {name!r} has {count} dimensions")
        shape = [self.number("Q") for _ in range(count)]
        kind, offset = self.number("I"), self.number("Q")
        block, size = next(((b, s) for k, (b, s) in GGML_QUANT_SIZES.items() if k.value == kind), (0, 0))
        if not block:
            raise _Torn(f"the tensor {name!r} is of type {kind}, which the gguf package does not know")
        if 0 in shape or shape[0] % block:
            raise _Torn(f"the tensor {name!r} has the shape {shape[::-1]}, which is empty or no whole blocks of {block}")
        return name, offset, math.prod(shape) // block * size
