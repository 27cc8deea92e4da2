"""Files of a checkpoint, hashed as they are written and read: safetensors without a second pass.

The format is that of the safetensors package, which reads what is written here: the length of a
header, the header (name -> dtype, shape, place), then the tensors one after the other. The package
itself would want every file read once more for its checksum.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

CHUNK = 1 << 20
"""Bytes handled at a time: small enough that they are hashed while in the processor's cache."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_KEY = "__metadata__"
# How torch.distributed.checkpoint's safetensors files say where a part stands in its tensor.
_PLACES_KEY, _PLACE_KEY = "DCP_SHARDING_INFO", "saved_offsets"


class Damaged(Exception):
    """A file is not what was written; the text goes on from the checkpoint's name."""


@dataclass(frozen=True)
class FileSum:
    """What a file must be."""

    size: int
    """Bytes."""
    digest: str
    """XXH3, 128 bits, in hexadecimal."""


def write_bytes(path: Path, content: bytes) -> FileSum:
    """Write a small file."""
    path.write_bytes(content)
    return FileSum(len(content), xxhash.xxh3_128_hexdigest(content))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], first_rows: Mapping[str, int] | None = None
) -> FileSum:
    """Write tensors by name; those of a device pass through the host one by one.

    Args:
        path: of the new file.
        tensors: what it holds.
        first_rows: where they are parts: the number of their first row in the whole tensor, as
            `torch.distributed.checkpoint.HuggingFaceStorageReader` reads it.
    """
    header: dict[str, Any] = {}
    if first_rows is not None:
        places = {
            name: {_PLACE_KEY: [first_rows[name], *[0] * (tensor.ndim - 1)][: tensor.ndim]}
            for name, tensor in tensors.items()
        }
        header[_HEADER_KEY] = {_PLACES_KEY: json.dumps(places), "DCP_VERSION": "1.0"}
    position = 0
    # Wide types first, as the package orders them, so that each stands at a multiple of its width.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    for name in names:
        tensor = tensors[name]
        place = [position, position + tensor.nbytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name]["data_offsets"] = place
        position = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    size = 0
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            size += _write(file, memoryview(part), digest)
        for name in names:
            size += _write(file, _bytes_of(tensors[name].cpu().contiguous()), digest)
    return FileSum(size, digest.hexdigest())


class TensorFile:
    """Reads tensors into memory that is there already, checking the file against its sum.

    Example:
        >>> with TensorFile(path, expected) as file:
        ...     file.read_into({name: parameters[name] for name in file.tensors})
    """

    def __init__(self, path: Path, expected: FileSum) -> None:
        """Nothing is read yet.

        Args:
            path: of the file.
            expected: what it must be.
        """
        self.path = path
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        """Dtype and shape of each tensor, in the file's order."""
        self._expected = expected
        self._digest = xxhash.xxh3_128()
        self._left = expected.size

    def __enter__(self) -> "TensorFile":
        """Read the header.

        Raises:
            Damaged: it makes no sense.
        """
        self._file = self.path.open("rb", buffering=0)
        try:
            self._read_header()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._file.close()
            raise Damaged(f"{self.path.name} has a header that cannot be read") from error
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each tensor."""
        return {name: shape for name, (_, shape) in self.tensors.items()}

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Read every tensor, then compare the file's checksum.

        Args:
            targets: as many, of the same shapes, on any device; contiguous ones of the host in the
                file's dtype are read in place.

        Raises:
            Damaged: the file is another than was written; the targets then hold anything.
        """
        for name, (dtype, _) in self.tensors.items():
            target = targets[name].detach()
            in_place = target.is_contiguous() and target.device.type == "cpu"
            if in_place and target.dtype == dtype:
                self._read(_bytes_of(target))
                continue
            staged = torch.empty(target.shape, dtype=dtype)
            self._read(_bytes_of(staged))
            target.copy_(staged)
        self.finish()

    def finish(self) -> None:
        """Read what is left and compare the checksum.

        Raises:
            Damaged: it is another.
        """
        buffer = memoryview(bytearray(min(CHUNK, self._left)))
        while self._left:
            self._read(buffer[: self._left])
        if self._digest.hexdigest() != self._expected.digest:
            raise Damaged(f"{self.path.name} has other content than was written (its checksum)")

    def _read_header(self) -> None:
        buffer = bytearray(8)
        self._read(memoryview(buffer))
        length = int.from_bytes(buffer, "little")
        if length > self._left:
            raise ValueError("longer than the file")
        buffer = bytearray(length)
        self._read(memoryview(buffer))
        position = 0
        for name, entry in json.loads(bytes(buffer)).items():
            if name == _HEADER_KEY:
                continue
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            size = math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [position, position + size] or min(shape, default=0) < 0:
                raise ValueError(f"{name} stands elsewhere")
            position += size
            self.tensors[name] = dtype, shape
        if position != self._left:
            raise ValueError("the tensors do not fill the file")

    def _read(self, view: memoryview) -> None:
        self._left -= len(view)
        for chunk in _chunks(view):
            if not _fill(self._file, chunk):
                raise Damaged(f"{self.path.name} ends too early")
            self._digest.update(chunk)


def differing(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Names that stand in only one of the two, or with another shape."""
    return sorted(name for name in {**found, **wanted} if found.get(name) != wanted.get(name))


def first_rows(metadata: Mapping[str, str] | None) -> dict[str, int]:
    """Where the parts of a file begin, by the metadata of its header; none that is a whole tensor.

    Raises:
        ValueError: the metadata makes no sense.
    """
    try:
        places = json.loads((metadata or {}).get(_PLACES_KEY, "{}"))
        found = {name: place[_PLACE_KEY] for name, place in places.items()}
        if any(min(place, default=0) < 0 or any(place[1:]) for place in found.values()):
            raise ValueError("parts of other than rows")
        return {name: int(place[0]) for name, place in found.items() if place}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(repr(error)) from error


def _fill(file: Any, view: memoryview) -> bool:
    while view:
        count = file.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True


def read_bytes(path: Path, expected: FileSum) -> bytes:
    """The content of a small file.

    Raises:
        Damaged: it is another than was written.
    """
    content = path.read_bytes()
    if xxhash.xxh3_128_hexdigest(content) != expected.digest:
        raise Damaged(f"{path.name} has other content than was written (its checksum)")
    return content


def _write(file: BufferedWriter, view: memoryview, digest: xxhash.xxh3_128) -> int:
    for chunk in _chunks(view):
        digest.update(chunk)
        file.write(chunk)
    return len(view)


def _chunks(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(view), CHUNK):
        yield view[start : start + CHUNK]


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of the host."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
