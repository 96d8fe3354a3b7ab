"""Reads what a pickle describes without running it.

A pickle is a program for a stack machine that may import and call anything. Here its instructions
are decoded by `pickletools`, and a machine that knows numbers, texts and plain containers alone
follows them; what a named class or a persistent object stands for is asked of two callables.
"""

from __future__ import annotations

import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import IO, Any, cast

# Instructions whose argument is the object itself.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# What may be a key: the hash of nested tuples takes as long, and as deep a stack, as a file likes.
_KEYS = (str, int, float, bool, bytes, type(None))
_SHOWN = 80
"""Characters of a file's texts in a message, at most."""


class Refused(Exception):
    """The pickle asks for what is not data; the text names it."""


class Malformed(Exception):
    """The bytes are no pickle, or end in the middle of one."""


class Name(str):
    """The full name of a class or function that a pickle mentions."""


def shown(value: Any) -> str:
    """A part of a file as a message may hold it: in one line, and short."""
    if not isinstance(value, str | int):
        return f"a {type(value).__name__}"
    text = str(value)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def pairs(items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dictionary of these keys and values.

    Raises:
        Refused: a key that is no text or number.
    """
    found = {}
    for key, value in items:
        _check_key(key)
        found[key] = value
    return found


def _check_key(key: Any) -> None:
    if type(key) not in _KEYS:
        raise Refused(f"a {type(key).__name__} as a key")


def decode(
    stream: io.BufferedIOBase,
    *,
    known: Callable[[str], bool],
    call: Callable[[Name, tuple], Any],
    persistent: Callable[[Any], Any],
) -> Any:
    """The object that the pickle at the stream's position describes; stops right behind it.

    Args:
        known: whether a class or function of this name may be mentioned at all.
        call: what such a name gives for these arguments.
        persistent: what a persistent identifier stands for.

    Raises:
        Refused: it mentions a name that is not known, or uses an instruction that data has no
            need of.
        Malformed: it is no pickle.
    """
    machine = _Machine(known, call, persistent)
    try:
        for instruction, argument, _ in pickletools.genops(cast(IO[bytes], stream)):
            machine.follow(instruction.name, argument)
        return machine.stack.pop()
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise Malformed(shown(str(error))) from error
    except MemoryError:
        raise Malformed("a text or number longer than the memory") from None


class _Machine:
    def __init__(self, known, call, persistent):
        self.known, self.call, self.persistent = known, call, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def follow(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            self.stack[-count:] = [tuple(self.stack[-count:])]
        elif name in ("PROTO", "FRAME", "STOP"):
            return
        elif not (self._remember(name, argument) or self._fill(name)):
            self._build(name, argument)

    def _remember(self, name: str, argument: Any) -> bool:
        match name:
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "POP":
                self.stack.pop()
            case _:
                return False
        return True

    def _fill(self, name: str) -> bool:
        match name:
            case "LIST" | "TUPLE" | "DICT":
                items = self._above_mark()
                self.stack.append({"LIST": list, "TUPLE": tuple, "DICT": _by_twos}[name](items))
            case "APPEND":
                item = self.stack.pop()
                self.stack[-1].append(item)
            case "APPENDS":
                items = self._above_mark()
                self.stack[-1].extend(items)
            case "SETITEM":
                value, key = self.stack.pop(), self.stack.pop()
                self.stack[-1].update(pairs([(key, value)]))
            case "SETITEMS":
                items = self._above_mark()
                self.stack[-1].update(_by_twos(items))
            case "ADDITEMS":
                items = self._above_mark()
                for item in items:
                    _check_key(item)
                self.stack[-1].update(items)
            case _:
                return False
        return True

    def _build(self, name: str, argument: Any) -> None:
        match name:
            case "GLOBAL":
                self._mention(*argument.split(" ", 1))
            case "STACK_GLOBAL":
                member, module = self.stack.pop(), self.stack.pop()
                self._mention(module, member)
            case "REDUCE":
                arguments, callee = self.stack.pop(), self.stack.pop()
                if not (isinstance(callee, Name) and isinstance(arguments, tuple)):
                    what = callee if isinstance(callee, Name) else type(callee).__name__
                    raise Refused(f"a call of {shown(what)}")
                self.stack.append(self.call(callee, arguments))
            case "BINPERSID":
                self.stack.append(self.persistent(self.stack.pop()))
            case "BUILD":
                # The attributes of a state dict (versions of its modules) are no data of ours.
                self.stack.pop()
                if not isinstance(self.stack[-1], OrderedDict):
                    raise Refused(f"attributes of a {type(self.stack[-1]).__name__}")
            case _:
                raise Refused(f"the instruction {name}")

    def _mention(self, module: Any, member: Any) -> None:
        if not (type(module) is str and type(member) is str):
            raise Refused("a name that is no text")
        name = Name(f"{module}.{member}")
        if not self.known(name):
            raise Refused(shown(name))
        self.stack.append(name)

    def _above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items


def _by_twos(items: list[Any]) -> dict[Any, Any]:
    return pairs(zip(items[::2], items[1::2], strict=True))
