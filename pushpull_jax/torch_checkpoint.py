"""Reads the tensors of a PyTorch checkpoint as NumPy arrays, without torch and without running anything in the file.

A checkpoint is a pickle, and a pickle is a program that may call any function. Here a machine of our own steps through
it, as torch's own `weights_only` does: it knows the opcodes and names that `torch.save` writes for a state dict, builds
inert records, imports nothing, calls nothing, and refuses the rest by name. Both formats of torch/serialization.py are
read: the legacy stream of pickles and storages, and the zip archive (torch >= 1.6). Sizes, strides and storage offsets
are in elements, positions in the file in bytes.
"""

import dataclasses
import functools
import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pushpull_jax.errors import InputError

# The pickle of torch.serialization.MAGIC_NUMBER, with which every legacy file begins.
LEGACY_MAGIC = b"\x80\x02\x8a\n" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
LEGACY_PROTOCOL = 1001
ZIP_MAGIC = b"PK\x03\x04"
# The record that ends a zip archive, 22 bytes without a comment: torch.save writes none, so nothing may follow it.
ZIP_END = b"PK\x05\x06"
ZIP_END_LENGTH = 22
# All arrays together may take so many times the bytes of the file (counted as 1 MiB at least): tied weights share a
# storage and each gets a copy, but a forged file could ask for one storage a million times. Ours, chosen generously.
MOST_COPIES = 64
# NumPy 1 allows no more axes.
MOST_AXES = 32

_DTYPES = {
    "torch.FloatStorage": "<f4",
    "torch.DoubleStorage": "<f8",
    "torch.HalfStorage": "<f2",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "<i8",
    "torch.IntStorage": "<i4",
    "torch.ShortStorage": "<i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "?",
}
# What a call of each admitted name may look like: the possible numbers of arguments.
_CALLS = {
    "collections.OrderedDict": (0,),
    "torch.Size": (1,),
    "torch._utils._rebuild_tensor": (4,),
    "torch._utils._rebuild_tensor_v2": (6, 7),
    "torch._utils._rebuild_parameter": (3,),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
# The numbers that follow an opcode; for the last two it is the length of what follows.
_ARGUMENTS = {
    "PROTO": "<B",
    "BININT": "<i",
    "BININT1": "<B",
    "BININT2": "<H",
    "BINFLOAT": ">d",
    "BINPUT": "<B",
    "LONG_BINPUT": "<I",
    "BINGET": "<B",
    "LONG_BINGET": "<I",
    "LONG1": "<B",
    "BINUNICODE": "<I",
}
_STRUCTURE = (
    *("STOP", "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    *("GLOBAL", "INST", "BINPERSID", "REDUCE", "BUILD"),
)
_READ_OPCODES = {*_CONSTANTS, *_EMPTY, *_ARGUMENTS, *_STRUCTURE}
_OPCODES = {opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes}
# All that zipfile raises for damaged archives, encrypted members and features that it lacks.
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, struct.error, EOFError, OverflowError)


def read_torch_checkpoint(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the state dict of a file written by `torch.save`.

    The state dict is the saved object itself, if that maps names to tensors and nothing else; or else the only such
    mapping among its values, whatever its name ("state_dict", "model"). Names are returned as they stand.

    Args:
        path: a checkpoint in the legacy or the zip format, little-endian, in pickle protocol 2 (torch's default).

    Returns:
        Name -> array in the order of the file, each C-contiguous, writable and sharing memory with no other; `bfloat16`
        is that of ml_dtypes.

    Raises:
        InputError: the file cannot be read, is damaged or truncated, names anything but tensors and containers, or
            holds no state dict or several.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if data.startswith(LEGACY_MAGIC):
        saved, read_storage = _read_legacy(data, str(path))
    elif data.startswith(ZIP_MAGIC):
        saved, read_storage = _read_zip(data, str(path))
    else:
        raise InputError(
            f"{path}: not a PyTorch checkpoint: expected the magic number of the legacy format or a zip archive, "
            f"got {data[:16]!r} ({len(data)} bytes)"
        )
    state = _find_state_dict(saved, str(path))
    n_bytes = sum(tensor.n_bytes for tensor in state.values())
    if n_bytes > MOST_COPIES * max(len(data), 2**20):
        raise InputError(f"{path}: its tensors expand to {n_bytes} bytes, over {MOST_COPIES} times the file")
    return {name: tensor.array(read_storage(tensor.storage)) for name, tensor in state.items()}


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name in a pickle that stands for an admitted class or function, of which nothing is imported."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A run of `numel` elements under `key`, somewhere in the file."""

    kind: str
    key: str
    numel: int

    @property
    def dtype(self) -> np.dtype:
        if self.kind == "torch.BFloat16Storage":
            import ml_dtypes

            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(_DTYPES[self.kind])

    @property
    def n_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A strided view of a storage; whoever makes one has checked that it lies inside."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        # An axis of length 0 counts as 1, so that the other axes of an empty tensor cannot overflow NumPy's sizes.
        return math.prod(max(length, 1) for length in self.size) * self.storage.dtype.itemsize

    def array(self, raw: bytes | memoryview) -> np.ndarray:
        dtype = self.storage.dtype
        if 0 in self.size:
            return np.empty(self.size, dtype.newbyteorder("="))
        # A byte other than 0 and 1 is no valid NumPy bool: such bytes are read as numbers and converted.
        stored = np.dtype(np.uint8) if dtype == np.bool_ else dtype
        # The stride of an axis of length 1 means nothing and may be anything.
        axes = zip(self.size, self.stride, strict=True)
        steps = [step * dtype.itemsize if length > 1 else 0 for length, step in axes]
        view = np.ndarray(self.size, stored, raw, self.offset * dtype.itemsize, steps)
        return view.astype(dtype.newbyteorder("="), order="C")


class _PickleMachine:
    """Runs one pickle that begins at byte `start` of `data`; afterwards `end` is the byte behind it.

    `storages` collects every storage that a persistent id names. This is no subclass of pickle.Unpickler, because
    restricting names and opcodes does not make that one safe (Python 3.11): nested tuples as a key of a dictionary,
    500 kB of them, crash it, and a memo index lets nine bytes allocate gigabytes.
    """

    def __init__(self, data: bytes, start: int, source: str):
        self.data, self.source, self.position, self.end = data, source, start, start
        self.storages: dict[str, _Storage] = {}
        self._stack, self._outer_stacks, self._memo = [], [], {}

    def run(self) -> object:
        name = None
        while name != "STOP":
            self.position = self.end
            code = self._take(1)
            name = _OPCODES.get(code, repr(code))
            self._check(name in _READ_OPCODES, f"pickle opcode {name} is refused: a state dict needs none")
            self._step(name, self._argument(name))
        if len(self._stack) != 1 or self._outer_stacks:
            raise self._error("expected one object on the stack at the end of the pickle")
        return self._stack.pop()

    def _argument(self, name: str) -> object:
        if name in ("GLOBAL", "INST"):
            return f"{self._take_line()}.{self._take_line()}"
        if name not in _ARGUMENTS:
            return None
        (number,) = struct.unpack(_ARGUMENTS[name], self._take(struct.calcsize(_ARGUMENTS[name])))
        if name == "LONG1":
            return int.from_bytes(self._take(number), "little", signed=True)
        if name == "BINUNICODE":
            try:
                return self._take(number).decode("utf-8")
            except UnicodeDecodeError as error:
                raise self._error(f"expected UTF-8: {error.reason}") from error
        return number

    def _take(self, count: int) -> bytes:
        start, self.end = self.end, self.end + count
        left = len(self.data) - start
        self._check(count <= left, f"the pickle is truncated: expected {count} more bytes, {left} are left")
        return self.data[start : self.end]

    def _take_line(self) -> str:
        length = self.data.find(b"\n", self.end) - self.end
        self._check(length >= 0, "the pickle is truncated: expected the end of a line")
        return self._take(length + 1)[:-1].decode("utf-8", "backslashreplace")

    def _step(self, name: str, argument: object) -> None:
        match name:
            case "STOP":
                pass
            case "PROTO":
                self._check(argument == 2, f"expected pickle protocol 2, got {argument}")
            case "MARK":
                self._outer_stacks.append(self._stack)
                self._stack = []
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._top()
            case "BINGET" | "LONG_BINGET":
                self._check(argument in self._memo, f"{name} of {argument}, which was never stored")
                self._push(self._memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._push(_CONSTANTS[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                self._push(_EMPTY[name]())
            case "TUPLE":
                self._push(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._push(tuple(self._pop(int(name[-1]))))
            case "APPEND" | "APPENDS":
                self._extend(self._pop(1) if name == "APPEND" else self._pop_to_mark())
            case "SETITEM" | "SETITEMS":
                self._update(self._pop(2) if name == "SETITEM" else self._pop_to_mark())
            case "GLOBAL" | "INST" | "BINPERSID" | "REDUCE" | "BUILD":
                self._stack_object(name, argument)
            case _:
                self._push(argument)

    def _stack_object(self, name: str, argument: object) -> None:
        match name:
            case "GLOBAL":
                admitted = argument in _DTYPES or argument in _CALLS
                self._check(admitted, f"{_shown(argument)} is refused: only tensors and containers are admitted")
                self._push(_Global(argument))
            case "INST":
                raise self._error(f"{_shown(argument)} is refused: pickle opcode INST would call it")
            case "BINPERSID":
                self._push(self._storage(*self._pop(1)))
            case "REDUCE":
                self._push(self._call(*self._pop(2)))
            case "BUILD":
                # A state dict carries its version numbers as `_metadata`, an attribute; they are left out.
                (state,) = self._pop(1)
                what = f"BUILD of {_shown(self._top())} with {_shown(state)}"
                self._check(type(state) is dict and type(self._top()) is dict, f"{what}: expected two mappings")

    def _call(self, function: object, arguments: object) -> object:
        self._check(isinstance(function, _Global), f"a call of {_shown(function)} is refused")
        name = function.name
        self._check(name in _CALLS, f"a call of {name} is refused")
        counts = _CALLS[name]
        fits = type(arguments) is tuple and len(arguments) in counts
        self._check(fits, f"{name}: expected {' or '.join(map(str, counts))} arguments in a tuple")
        match name:
            case "collections.OrderedDict":
                return {}
            case "torch.Size":
                return self._lengths(f"{name}: size", arguments[0])
            case "torch._utils._rebuild_parameter":
                tensor, requires_grad, hooks = arguments
                self._check(isinstance(tensor, _Tensor), f"{name}: expected a tensor, got {_shown(tensor)}")
                self._check_inert(name, requires_grad, hooks)
                return tensor
        if name == "torch._utils._rebuild_tensor_v2":
            self._check_inert(name, *arguments[4:])
        return self._tensor(name, *arguments[:4])

    def _check_inert(self, name: str, requires_grad: object, hooks: object, metadata: object = None) -> None:
        is_bool = type(requires_grad) is bool
        self._check(is_bool, f"{name}: expected requires_grad to be a bool, got {_shown(requires_grad)}")
        no_hooks = type(hooks) is dict and not hooks
        self._check(no_hooks, f"{name}: expected an empty mapping of backward hooks, got {_shown(hooks)}")
        # Metadata marks lazily negated or conjugated tensors, whose stored numbers are not their values.
        self._check(metadata is None, f"{name}: expected no metadata, got {_shown(metadata)}")

    def _tensor(self, name: str, storage: object, offset: object, size: object, stride: object) -> _Tensor:
        self._check(isinstance(storage, _Storage), f"{name}: expected a storage, got {_shown(storage)}")
        size, stride = self._lengths(f"{name}: size", size), self._lengths(f"{name}: stride", stride)
        self._check(len(size) == len(stride), f"{name}: size has {len(size)} axes, stride {len(stride)}")
        self._check(_is_count(offset), f"{name}: expected a storage offset of 0 or more, got {_shown(offset)}")
        extent = sum((length - 1) * step for length, step in zip(size, stride, strict=True)) + 1
        needed = offset + (0 if 0 in size else extent)
        where = f"offset {offset}, size {_clipped(str(size))}, stride {_clipped(str(stride))}"
        self._check(needed <= storage.numel, f"{name}: {where} leaves its storage of {storage.numel}")
        return _Tensor(storage, offset, size, stride)

    def _storage(self, persistent_id: object) -> _Storage:
        is_tuple = type(persistent_id) is tuple and len(persistent_id) in (5, 6) and persistent_id[0] == "storage"
        self._check(is_tuple, "persistent id: expected ('storage', type, key, location, numel)")
        _, kind, key, location, numel, *view = persistent_id
        is_kind = isinstance(kind, _Global) and kind.name in _DTYPES
        self._check(is_kind, f"persistent id: expected a storage type, got {_shown(kind)}")
        self._check(type(key) is str, f"persistent id: expected a key of text, got {_shown(key)}")
        self._check(type(location) is str, f"storage {_shown(key)}: expected a device name, got {_shown(location)}")
        self._check(_is_count(numel), f"storage {_shown(key)}: expected a number of elements, got {_shown(numel)}")
        self._check(view in ([], [None]), f"storage {_shown(key)}: a view of another storage is refused")
        storage = _Storage(kind.name, key, numel)
        known = self.storages.setdefault(key, storage)
        first, second = f"{known.numel} of {known.kind}", f"{numel} of {kind.name}"
        self._check(known == storage, f"storage {_shown(key)}: named first as {first}, then as {second}")
        return storage

    def _lengths(self, what: str, values: object) -> tuple[int, ...]:
        self._check(type(values) is tuple, f"{what}: expected a tuple of integers, got {_shown(values)}")
        self._check(len(values) <= MOST_AXES, f"{what}: expected up to {MOST_AXES} axes, got {len(values)}")
        shown = _clipped(", ".join(map(_shown, values)))
        self._check(all(map(_is_count, values)), f"{what}: expected integers of 0 or more, got {shown}")
        return values

    def _extend(self, values: list) -> None:
        self._check(type(self._top()) is list, f"expected a list to append to, got {_shown(self._top())}")
        self._top().extend(values)

    def _update(self, items: list) -> None:
        self._check(type(self._top()) is dict, f"expected a mapping to fill, got {_shown(self._top())}")
        self._check(len(items) % 2 == 0, "expected a value for every key of a mapping")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A deeply nested tuple would overflow the C stack when hashed.
            is_key = isinstance(key, str | int | float | None)
            self._check(is_key, f"expected a key of text or a number, got {_shown(key)}")
            self._top()[key] = value

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _top(self) -> object:
        self._check(bool(self._stack), "the stack of the pickle is empty")
        return self._stack[-1]

    def _pop(self, count: int) -> list:
        self._check(len(self._stack) >= count, "the stack of the pickle is empty")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _pop_to_mark(self) -> list:
        self._check(bool(self._outer_stacks), "the stack of the pickle has no mark")
        values, self._stack = self._stack, self._outer_stacks.pop()
        return values

    def _check(self, condition: bool, message: str) -> None:
        if not condition:
            raise self._error(message)

    def _error(self, message: str) -> InputError:
        return InputError(f"{self.source}: byte {self.position}: {message}")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _shown(value: object) -> str:
    """A value from a file as an error may print it: a scalar escaped and cut, anything else by its type alone."""
    if isinstance(value, str):
        return repr(value[:80])
    if isinstance(value, _Global):
        return value.name
    return _clipped(repr(value)) if isinstance(value, int | float | None) else type(value).__name__.lstrip("_")


def _clipped(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "..."


def _read_legacy(data: bytes, path: str) -> tuple[object, Callable[[_Storage], bytes | memoryview]]:
    """Five pickles, then each storage as its number of elements (int64) and its bytes."""
    position, parts = 0, {}
    for what in ("magic number", "protocol version", "system information", "saved object", "list of storage keys"):
        machine = _PickleMachine(data, position, f"{path}, {what}")
        parts[what], position = machine.run(), machine.end
        if what == "saved object":
            storages = machine.storages
    _, version, system, saved, keys = parts.values()
    if version != LEGACY_PROTOCOL:
        raise InputError(f"{path}: expected protocol version {LEGACY_PROTOCOL}, got {_shown(version)}")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise InputError(f"{path}: expected system information with little_endian = True; others are refused")
    is_list = type(keys) is list and all(type(key) is str for key in keys)
    if not is_list or sorted(keys) != sorted(storages):
        raise InputError(f"{path}: the list of storage keys does not match the {len(storages)} storages of its tensors")
    raw = {}
    for key in keys:
        n_bytes, left = storages[key].n_bytes, len(data) - position
        where = f"{path}: byte {position}: storage {_shown(key)}"
        if left < 8 + n_bytes:
            raise InputError(f"{where}: expected 8 + {n_bytes} bytes, only {left} are left")
        (numel,) = struct.unpack_from("<q", data, position)
        if numel != storages[key].numel:
            raise InputError(f"{where}: expected {storages[key].numel} elements, got {numel}")
        raw[key] = memoryview(data)[position + 8 : position + 8 + n_bytes]
        position += 8 + n_bytes
    if position != len(data):
        raise InputError(f"{path}: byte {position}: expected the end of the file, {len(data) - position} bytes follow")
    return saved, lambda storage: raw[storage.key]


def _read_zip(data: bytes, path: str) -> tuple[object, Callable[[_Storage], bytes | memoryview]]:
    """An archive of `ROOT/data.pkl`, `ROOT/byteorder` (since torch 2.0) and one `ROOT/data/KEY` a storage."""
    if data[-ZIP_END_LENGTH:][:4] != ZIP_END:
        raise InputError(f"{path}: {len(data)} bytes, not ending as a zip archive does: truncated, or bytes follow it")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except _ZIP_ERRORS as error:
        raise InputError(f"{path}: not a whole zip archive: {_clipped(str(error))}") from error
    names = archive.namelist()
    roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1 or len(set(names)) != len(names):
        raise InputError(f"{path}: expected one ROOT/data.pkl and no member twice, got {_members(names)}")
    (root,) = roots
    if f"{root}/constants.pkl" in names:
        raise InputError(f"{path}: a TorchScript program, which is refused: expected a state dict")
    order = _read_member(archive, f"{root}/byteorder", path) if f"{root}/byteorder" in names else b"little"
    if order != b"little":
        raise InputError(f"{path}: {root}/byteorder: expected b'little', got {order[:16]!r}")
    pickled = _read_member(archive, f"{root}/data.pkl", path)
    machine = _PickleMachine(pickled, 0, f"{path}, {root}/data.pkl")
    saved = machine.run()
    if machine.end != len(pickled):
        raise InputError(f"{path}: {root}/data.pkl: {len(pickled) - machine.end} bytes follow the pickle")
    for key, storage in machine.storages.items():
        _check_member(archive, f"{root}/data/{key}", path, storage.n_bytes)
    return saved, functools.cache(lambda storage: _read_member(archive, f"{root}/data/{storage.key}", path))


def _check_member(archive: zipfile.ZipFile, name: str, path: str, n_bytes: int | None = None) -> None:
    try:
        info = archive.getinfo(name)
    except KeyError as error:
        raise InputError(f"{path}: expected a member {_shown(name)}, got {_members(archive.namelist())}") from error
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise InputError(f"{path}: {_shown(name)} is compressed, which torch.save never does")
    if n_bytes is not None and info.file_size != n_bytes:
        raise InputError(f"{path}: {_shown(name)}: expected {n_bytes} bytes, got {info.file_size}")


def _read_member(archive: zipfile.ZipFile, name: str, path: str) -> bytes:
    _check_member(archive, name, path)
    try:
        return archive.read(name)
    except _ZIP_ERRORS as error:
        raise InputError(f"{path}: {_shown(name)} is damaged: {_clipped(str(error))}") from error


def _members(names: list[str]) -> str:
    return _clipped(", ".join(map(_shown, sorted(names)[:8]))) or "none"


def _find_state_dict(saved: object, path: str) -> dict[str, _Tensor]:
    if _is_state_dict(saved):
        return saved
    if type(saved) is not dict:
        raise InputError(f"{path}: expected a mapping of names to tensors, got {_shown(saved)}")
    inner = [key for key, value in saved.items() if type(key) is str and _is_state_dict(value)]
    if len(inner) == 1:
        return saved[inner[0]]
    found = ", ".join(f"{_shown(key)}: {_shown(value)}" for key, value in list(saved.items())[:8])
    holds = f"{len(inner)} of them ({', '.join(map(_shown, inner[:8]))})" if inner else f"{{{found}}}"
    raise InputError(f"{path}: expected a mapping of names to tensors, or a mapping that holds one, got {holds}")


def _is_state_dict(value: object) -> bool:
    entries = value.items() if type(value) is dict else ()
    return bool(entries) and all(type(key) is str and isinstance(entry, _Tensor) for key, entry in entries)
