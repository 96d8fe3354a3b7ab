"""Tensors of files written by `torch.save`, read without PyTorch and without running a pickle.

Both forms are known: the zip archive of PyTorch 1.6 and later (`*/data.pkl` beside one record a
storage) and the stream before it (five pickles, then the storages one after another). A tensor is a
view of a storage: an offset, a size and a stride, counted in elements.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax.interop.pickled_data import Malformed, Name, Refused, decode, pairs, shown

ZIP_START = b"PK\x03\x04"
# Protocol 2 and up begins so; what follows is PyTorch's number of the older form.
STREAM_START = b"\x80"
_STREAM_NUMBER = 0x1950A86A20F9469CFC6C
_STREAM_VERSION = 1001

_TYPES = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": jnp.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}
_STORAGES = {f"torch.{name}Storage": np.dtype(dtype) for name, dtype in _TYPES.items()}
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_PARAMETER = "torch._utils._rebuild_parameter"
_PLAIN = ("collections.OrderedDict", "torch.Size")
# The tensors of a file may repeat what it stores; more than this many times only on purpose.
_REPEATED, _SLACK = 4, 2**20
# Encryption is a RuntimeError, a name that is no text a ValueError.
_DAMAGE = (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, OverflowError)
_KNOWN = {*_STORAGES, *_TENSORS, _PARAMETER, *_PLAIN}


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class _View:
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_zip(path: str) -> Any:
    """What the archive holds, its tensors as NumPy arrays (read-only where they are not copied).

    Raises:
        Refused: its pickle mentions something else than tensors and plain containers.
        Malformed: it is damaged, or no archive of PyTorch's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            heads = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(heads) != 1:
                raise Malformed("a zip archive without a data.pkl of PyTorch's")
            folder = heads[0].removesuffix("data.pkl")
            if f"{folder}constants.pkl" in names:
                raise Refused("a TorchScript program (save its state_dict() instead)")
            order = f"{folder}byteorder"
            if order in names and _record(archive, order) != b"little":
                raise Malformed("numbers of a big-endian machine")
            tree = _decode(io.BytesIO(_record(archive, heads[0])))
            return _with_arrays(tree, lambda at: _record(archive, f"{folder}data/{at.key}"))
    except _DAMAGE as error:
        raise Malformed(shown(str(error))) from error
    except MemoryError:
        raise Malformed("more numbers than the memory") from None


def _record(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        record = archive.getinfo(name)
    except KeyError:
        raise Malformed(f"no record {name}") from None
    # PyTorch never compresses: a small file must not grow into a large one in memory.
    if record.compress_type != zipfile.ZIP_STORED:
        raise Malformed(f"{name} is compressed")
    return archive.read(record)


def read_stream(path: str) -> Any:
    """As `read_zip`, of a file in the older form.

    Raises:
        Refused, Malformed: as there.
    """
    try:
        with open(path, "rb") as stream:
            return _of_stream(stream)
    except _DAMAGE as error:
        raise Malformed(shown(str(error))) from error
    except MemoryError:
        raise Malformed("more numbers than the memory") from None


def _of_stream(stream: io.BufferedReader) -> Any:
    if _decode(stream) != _STREAM_NUMBER:
        raise Refused("a pickle that torch.save did not write")
    version = _decode(stream)
    if version != _STREAM_VERSION:
        raise Malformed(f"version {shown(version)} of the older form")
    system = _decode(stream)
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise Malformed("numbers of a big-endian machine")
    storages: dict[str, _Storage] = {}
    tree = _decode(stream, storages)
    keys = _decode(stream)
    texts = isinstance(keys, list) and all(type(key) in (str, int) for key in keys)
    if not (texts and set(map(str, keys)) == set(storages)):
        raise Malformed("other storages than those of its tensors")
    data = {}
    for key in map(str, keys):
        data[key] = _next_storage(stream, storages[key])
    return _with_arrays(tree, lambda storage: data[storage.key])


def _next_storage(stream: io.BufferedReader, storage: _Storage) -> bytes:
    head = stream.read(8)
    length = storage.count * storage.dtype.itemsize
    left = os.fstat(stream.fileno()).st_size - stream.tell()
    if len(head) < 8 or struct.unpack("<q", head)[0] != storage.count or length > left:
        raise Malformed(f"storage {shown(storage.key)} is cut short")
    return stream.read(length)


def _decode(stream: Any, storages: dict[str, _Storage] | None = None) -> Any:
    seen = {} if storages is None else storages
    return decode(stream, known=_KNOWN.__contains__, call=_call, persistent=partial(_stored, seen))


def _call(name: Name, arguments: tuple) -> Any:
    if name in _TENSORS:
        storage, offset, size, stride = arguments[:4]
        numbers = (offset, *size, *stride)
        counts = all(type(number) is int and number >= 0 for number in numbers)
        if not (isinstance(storage, _Storage) and counts and len(size) == len(stride)):
            raise Malformed("a tensor without a place in a storage")
        return _View(storage, offset, tuple(size), tuple(stride))
    if name == _PARAMETER:
        return arguments[0]
    if name == "collections.OrderedDict":
        return OrderedDict(pairs(*arguments) if arguments else ())
    if name == "torch.Size":
        return tuple(*arguments)
    raise Refused(f"a call of {name}")


def _stored(seen: dict[str, _Storage], identifier: Any) -> _Storage:
    if not (isinstance(identifier, tuple) and len(identifier) >= 5 and identifier[0] == "storage"):
        raise Refused("a persistent object that is no storage")
    kind, key, _, count, *view = identifier[1:]
    if not isinstance(kind, Name) or kind not in _STORAGES:
        raise Refused(f"a storage of {shown(kind)}")
    if type(key) not in (str, int) or type(count) is not int or count < 0:
        raise Refused("a storage without a name or a size")
    if any(part is not None for part in view):
        raise Refused("a storage that is a view of another (PyTorch before 0.4)")
    return seen.setdefault(str(key), _Storage(str(key), _STORAGES[kind], count))


def _with_arrays(tree: Any, bytes_of: Callable[[_Storage], bytes]) -> Any:
    """The tree with its views read. Dictionaries alone are entered: weights lie nowhere else."""
    views = list(_views(tree))
    flat: dict[str, np.ndarray] = {}
    for view in views:
        if view.storage.key not in flat:
            flat[view.storage.key] = _numbers(view.storage, bytes_of(view.storage))
    stored = sum(numbers.nbytes for numbers in flat.values())
    wanted = sum(math.prod(v.size) * flat[v.storage.key].itemsize for v in views)
    if wanted > _REPEATED * stored + _SLACK:
        raise Malformed(f"tensors of {shown(wanted)} bytes in storages of {stored}")
    done: dict[int, dict[Any, Any]] = {}

    def filled(node: Any) -> Any:
        if isinstance(node, _View):
            return _array(node, flat[node.storage.key])
        if not isinstance(node, Mapping):
            return node
        # A pickle may describe a dictionary that holds itself.
        if id(node) not in done:
            done[id(node)] = {}
            done[id(node)].update({key: filled(value) for key, value in node.items()})
        return done[id(node)]

    try:
        return filled(tree)
    except RecursionError:
        raise Malformed("dictionaries without end") from None


def _views(tree: Any) -> Iterator[_View]:
    """Those in dictionaries, as often as they are there."""
    waiting, entered = [tree], set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, _View):
            yield node
        elif isinstance(node, Mapping) and id(node) not in entered:
            entered.add(id(node))
            waiting.extend(node.values())


def _numbers(storage: _Storage, data: bytes) -> np.ndarray:
    if len(data) != storage.count * storage.dtype.itemsize:
        raise Malformed(f"storage {shown(storage.key)} is cut short")
    return np.frombuffer(data, storage.dtype)


def _array(view: _View, flat: np.ndarray) -> np.ndarray:
    if 0 in view.size:
        return np.zeros(view.size, flat.dtype)
    steps = zip(view.size, view.stride, strict=True)
    last = view.offset + sum((size - 1) * stride for size, stride in steps)
    if last >= flat.size:
        raise Malformed(f"a tensor reaches beyond storage {shown(view.storage.key)}")
    strides = tuple(stride * flat.itemsize for stride in view.stride)
    strided = np.lib.stride_tricks.as_strided(
        flat[view.offset :], view.size, strides, writeable=False
    )
    return strided if strided.flags.c_contiguous else np.ascontiguousarray(strided)
