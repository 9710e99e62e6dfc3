"""Command lines from signatures: what a function takes, with its types, defaults and docstring, is what it offers.

A parameter is an option; one before ``/`` is positional. Parameters that are dataclasses give an option a field;
``Annotated[dict[str, Any], function, ...]`` gives those of another function, but for the names after it. Of several
dataclasses, as in ``ByPlace | Ridge``, one is chosen by name, and the fields of the others are refused. Only what was
given is passed on: all defaults are those of the functions and classes themselves.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring

from .._text import shown
from ..errors import TimeromeError
from ._reading import READERS

_PLAIN = {int: ("N", "a whole number"), float: ("X", "a number"), str: ("TEXT", "a text"), Path: ("PATH", "a path")}
Target = Callable[..., Any]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print a message and leave with exit code 2."""
        text = " ".join(message.split()).rstrip(".")
        self.exit(2, f"{self.prog}: {shown(text)}. See `{self.prog} --help`.\n")


class _Kind(NamedTuple):
    """What an option takes: values of a type, one, several (``+``) or so many."""

    of: Any
    number: str | int | None = None

    def convert(self, text: str) -> Any:
        kind = self.of
        if types.NoneType in get_args(kind):
            if text.lower() == "none":
                return None
            kind = _without_none(kind)
        if get_origin(kind) is Literal:
            if text not in get_args(kind):
                raise ValueError(f"expected one of {', '.join(get_args(kind))}, got {text!r}")
            return text
        if kind in READERS:  # read when all options are known to be right
            return text
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"expected {_PLAIN[kind][1]}, got {text!r}") from None

    @property
    def metavar(self) -> str:
        kind = _without_none(self.of)
        if get_origin(kind) is Literal:
            return "{" + ",".join(get_args(kind)) + "}"
        return READERS[kind].metavar if kind in READERS else _PLAIN[kind][0]


class _Take(argparse.Action):
    """Keeps a value, once; or a list, whose entries are parted by blanks, or commas, or given one by one."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, kind: _Kind, **more: Any) -> None:
        metavar = kind.metavar if option_strings else dest
        more |= {"default": argparse.SUPPRESS, "metavar": metavar, "nargs": kind.number and "+"}
        super().__init__(option_strings, dest, **more)
        self.kind = kind

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None)
        name = option_string or self.dest
        if before is not None and self.kind.number != "+":
            parser.error(f"{name} is given twice.")
        texts = [values] if isinstance(values, str) else values
        if self.kind.number is not None and self.kind.of is not str:  # texts may hold commas
            texts = [part for text in texts for part in text.strip("[]").replace(",", " ").split()]
        if isinstance(self.kind.number, int) and len(texts) != self.kind.number:
            parser.error(f"{name}: expected {self.kind.number} values, got {len(texts)}.")
        try:
            found = tuple(self.kind.convert(text) for text in texts)
        except ValueError as error:
            parser.error(f"{name}: {error}.")
        setattr(namespace, self.dest, found[0] if self.kind.number is None else (*(before or ()), *found))


class _Parameter(NamedTuple):
    name: str
    hint: Any
    default: Any
    help: str
    positional: bool

    @property
    def kind(self) -> _Kind | None:
        return _kind(self.hint)

    @property
    def chosen_among(self) -> dict[str, Target]:
        """Dataclasses by name, where there are several."""
        members: list[Any] = [kind for kind in get_args(self.hint) if is_dataclass(kind)]
        return {m.__name__.removeprefix("By").lower(): m for m in members} if len(members) > 1 else {}

    @property
    def made_of(self) -> tuple[Target, tuple[str, ...], bool] | None:
        """The function or class whose parameters this one is made of, those left out, and whether it is called."""
        if get_origin(self.hint) is Annotated:
            _, target, *without = get_args(self.hint)
            return target, tuple(without), False
        hint: Any = _without_none(self.hint)
        made = is_dataclass(hint) and hint not in READERS
        return (hint, (), True) if made else None


def _parameters(target: Target, without: Sequence[str] = ()) -> Iterator[_Parameter]:
    hints = get_type_hints(target, include_extras=True)
    told = {p.arg_name: " ".join((p.description or "").split()) for p in parse_docstring(target.__doc__ or "").params}
    for name, p in signature(target).parameters.items():
        found = _Parameter(name, hints[name], p.default, told.get(name, ""), p.kind is Parameter.POSITIONAL_ONLY)
        if name not in without and (found.kind or found.chosen_among or found.made_of):
            yield found


def _without_none(hint: Any) -> Any:
    rest = [kind for kind in get_args(hint) if kind is not types.NoneType]
    return rest[0] if get_origin(hint) in (Union, types.UnionType) and len(rest) == 1 else hint


def _kind(hint: Any) -> _Kind | None:
    hint = _without_none(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return next(filter(None, map(_kind, get_args(hint))), None)
    if get_origin(hint) is Literal or hint is bool or (isinstance(hint, type) and hint in (READERS.keys() | _PLAIN)):
        return _Kind(hint)
    if get_origin(hint) in (list, tuple, Sequence):
        items = get_args(hint)
        fixed = get_origin(hint) is tuple and ... not in items
        return None if _kind(items[0]) is None else _Kind(items[0], len(items) if fixed else "+")
    return None


def add_options(parser: Parser, target: Target, without: Sequence[str] = (), title: str | None = None) -> None:
    """Add what a function or class takes to a parser, in a group of its own where that has a title."""
    group: Any = parser if title is None else parser.add_argument_group(title)
    for p in _parameters(target, without):
        option = "--" + p.name.replace("_", "-")
        if p.chosen_among:
            group.add_argument(option, action=_Take, kind=_Kind(Literal[tuple(p.chosen_among)]), help=p.help)
            for name, member in p.chosen_among.items():
                add_options(parser, member, title=f"with {option} {name}")
        elif p.made_of:
            add_options(parser, *p.made_of[:2], title=p.name)
        elif p.kind and p.kind.of is bool:
            group.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=_help(p))
        elif p.positional:
            group.add_argument(p.name, action=_Take, kind=p.kind, help=_help(p))
        else:
            needed = p.default is Parameter.empty
            group.add_argument(option, action=_Take, kind=p.kind, help=_help(p), required=needed)


def _help(p: _Parameter) -> str:
    said = isinstance(p.default, (bool, int, float, str, Path, tuple)) and p.default not in (False, ())
    default = " ".join(map(str, p.default)) if isinstance(p.default, tuple) else p.default
    return (p.help + (f" Default: {default}." if said else "")).replace("%", "%%")


def arguments(target: Target, given: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """Return the keyword arguments of a function or class, and positional ones by name, from the options given."""
    found: dict[str, Any] = {}
    for p in _parameters(target, without):
        if p.chosen_among:
            chosen = given.get(p.name)
            for name, member in p.chosen_among.items():
                own = arguments(member, given)
                if own and name != chosen:
                    options = ", ".join("--" + key.replace("_", "-") for key in own)
                    raise TimeromeError(f"{options}: only with --{p.name} {name}.")
                if name == chosen:
                    found[p.name] = member(**own)
        elif p.made_of:
            function, left_out, called = p.made_of
            own = arguments(function, given, left_out)
            if own or p.default is Parameter.empty:
                found[p.name] = function(**own) if called else own
        elif p.name in given:
            found[p.name] = _read(given[p.name], p.kind) if p.kind else given[p.name]
    return found


def _read(value: Any, kind: _Kind) -> Any:
    reader = READERS.get(_without_none(kind.of))
    if reader is None:
        return value
    return tuple(map(reader.read, value)) if isinstance(value, tuple) else reader.read(value)
