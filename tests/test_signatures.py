"""No public callable takes more than eight parameters: what belongs together is one value."""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import pytest

import timerome

MOST = 8
OPERANDS = "an operator: an argument for each operand of the compiled kernel, as PyTorch's own have"
OPTIONS = "a command of the command line: an argument for each of its options"
EXCEPTIONS = {
    **{f"timerome.cli.{name}.run": OPTIONS for name in ("edit", "eval", "revise", "tune")},
    "timerome.ops.sparse_lowrank_residual.sparse_lowrank_residual": OPERANDS,
    "timerome.ops.sparse_lowrank_residual.sparse_lowrank_residual_reference": OPERANDS,
}


def modules() -> Iterator[Any]:
    for found in pkgutil.walk_packages(timerome.__path__, "timerome."):
        if not any(part.startswith("_") for part in found.name.split(".")):
            yield importlib.import_module(found.name)


def callables() -> Iterator[tuple[str, Any]]:
    """Public functions, methods and constructors, each where it is defined; dataclasses are values themselves."""
    for module in modules():
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if isinstance(value, FunctionType):
                yield f"{module.__name__}.{name}", value
            elif inspect.isclass(value):
                for own, method in vars(value).items():
                    method = getattr(method, "__func__", method)
                    made = own == "__init__" and not dataclasses.is_dataclass(value)
                    if isinstance(method, FunctionType) and (made or not own.startswith("_")):
                        yield f"{module.__name__}.{name}.{own}", method


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_nothing_public_takes_more_than_eight_parameters() -> None:
    found = {}
    for name, function in callables():
        count = len([p for p in inspect.signature(function).parameters if p not in ("self", "cls")])
        if count > MOST:
            found[name] = count
    assert {name: count for name, count in found.items() if name not in EXCEPTIONS} == {}
    assert set(EXCEPTIONS) == set(found)  # an exception that is none goes
