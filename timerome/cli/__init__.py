"""The command line: ``timerome demo | trace | edit | …``, one file a command.

What a command takes is the signature of its ``run``, what it returns is what ``--json`` writes.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from .._files import write_text
from .._text import shown
from .._version import __version__
from ..progress import Progress

BAD_INPUT, INTERRUPTED = 2, 130
COMMANDS = {
    "demo": "Trace, edit and evaluate TOFU forget01 on the bundled testbed model.",
    "trace": "Find where facts are carried.",
    "edit": "Replace or forget facts: make an edit file.",
    "revise": "Change an edit file.",
    "diff": "Compare two edit files.",
    "explain": "Say which edits act on a prompt, and why.",
    "generate": "Answer prompts, without and with edits.",
    "eval": "Measure what a model says about facts, or on a benchmark, without and with edits.",
    "audit": "Try to get out what was forgotten.",
    "tune": "Choose hyperparameters on validation facts.",
    "inspect": "Say what a model was recognised as, or what an edit file holds.",
    "info": "Say what was built and which versions run.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        0 if all went well, 2 on bad input, 130 on a keyboard interrupt; each of the latter with one line on stderr.
    """
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: timerome COMMAND [OPTIONS]; timerome COMMAND --help says which.\n\n{_overview()}")
        return 0
    if name == "--version":
        print(f"timerome {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"timerome: there is no command {shown(name)}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return BAD_INPUT
    debug = "--debug" in rest
    try:
        with _tamed_libraries(debug):
            return _run(name, rest)
    except SystemExit as done:  # --help, or arguments the parser refused
        return done.code if isinstance(done.code, int) else BAD_INPUT
    except KeyboardInterrupt:
        print(f"timerome {name}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        if debug:
            traceback.print_exc()
        print(f"timerome {name}: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT


def _overview() -> str:
    return "\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items())


def _run(name: str, rest: Sequence[str]) -> int:
    from ._parser import Parser, add_options, arguments

    run: Callable[..., dict[str, Any]] = import_module(f".{name}", __name__).run
    told = (run.__doc__ or "").partition("Args:")[0]
    parser = Parser(f"timerome {name}", description=" ".join(told.split()), allow_abbrev=False)
    add_options(parser, run)
    add_options(parser, _common, title="every command")
    given = vars(parser.parse_args(_with_config([_with_dashes(argument) for argument in rest])))
    common, own = _common(**arguments(_common, given)), arguments(run, given)
    if (threads := common["threads"]) is not None:
        import torch

        if threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {threads}.")
        torch.set_num_threads(threads)
    if (path := common["json"]) is not None:
        _check_writable(path)
    # Positional parameters are taken by their places.
    result = run(Progress(enabled=not common["quiet"]), *(own.pop(key) for key in _positional(run)), **own)
    if path is not None:
        write_text(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return 0


def _common(
    json: Path | None = None,
    config: Path | None = None,
    threads: int | None = None,
    quiet: bool = False,
    debug: bool = False,
) -> dict[str, Any]:
    """What every command takes.

    Args:
        json: write the result to this file.
        config: YAML file with options by name; those of the command line come before it.
        threads: CPU threads; torch's own choice by default.
        quiet: show no progress.
        debug: show the traceback of an error.
    """
    return {"json": json, "config": config, "threads": threads, "quiet": quiet, "debug": debug}


def _positional(run: Callable[..., Any]) -> list[str]:
    from inspect import Parameter, signature

    names = [name for name, p in signature(run).parameters.items() if p.kind is Parameter.POSITIONAL_ONLY]
    return names[1:]  # without progress


def _with_dashes(argument: str) -> str:
    """Let ``--gate_layer`` stand for ``--gate-layer``."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _with_config(arguments: list[str]) -> list[str]:
    """Put the options of ``--config`` before those given, unless these say otherwise."""
    at = next((i for i, argument in enumerate(arguments) if argument.partition("=")[0] == "--config"), None)
    if at is None:
        return arguments
    path = arguments[at].partition("=")[2] or "".join(arguments[at + 1 : at + 2])
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config: there is no file {path}.")
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {path} is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config: expected options by name in {path}, got {type(values).__name__}.")
    given = {argument.partition("=")[0] for argument in arguments}
    more = []
    for key, value in values.items():
        name = _with_dashes(f"--{key}")
        if name not in given and value not in (False, None):
            more += [name] if value is True else [name, *map(str, value if isinstance(value, list) else [value])]
    return [*more, *arguments]


@contextmanager
def _tamed_libraries(debug: bool) -> Iterator[None]:
    """Keep other libraries' bars and notices off stderr, which holds our progress and at most one line of error."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"timerome")
            for name in ("transformers", "huggingface_hub"):
                logging.getLogger(name).setLevel(logging.ERROR)
        yield


def _check_writable(path: Path) -> None:
    """Find out before the work, not after it, that its result cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"--json: cannot write a file {path}; give another path.")


def _one_line(error: BaseException) -> str:
    # A KeyError shows its message as code.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return shown(" ".join(str(text).split())) or type(error).__name__
