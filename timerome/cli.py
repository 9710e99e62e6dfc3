"""The command line: ``timerome demo | trace | edit | revise | diff | tune | eval | audit | …``.

Each command is one function, below or in :mod:`timerome.commands`; what it takes is its signature, what it returns is
what ``--json`` writes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ._files import write_text
from .commands.audit import audit
from .commands.console import load_memory as _memory
from .commands.console import load_model as _load
from .commands.console import read_facts as _facts
from .commands.console import say as _say
from .commands.console import short as _short
from .commands.console import table as _table
from .commands.evaluate import evaluate
from .commands.revise import diff, revise
from .commands.tune import tune
from .progress import Progress

if TYPE_CHECKING:
    from docstring_parser import Docstring


BAD_INPUT, INTERRUPTED = 2, 130


def demo(
    progress: Progress,
    out: Path = Path("timerome-demo"),
    model: str = "testbed",
    facts: int | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Trace, edit and evaluate TOFU forget01 on the bundled testbed model; writes a results folder.

    Args:
        progress: shows how far it is.
        out: folder for results.json, report.html, texts, plots and edit files.
        model: testbed, or the folder of another model that was taught the bundled facts.
        facts: use only so many facts of each set.
        quick: a much smaller run that only shows that everything works; its numbers mean little.
    """
    import torch

    from .demo import run_demo, summary_rows

    torch.set_num_threads(min(torch.get_num_threads(), 8))  # so small a model is slower with more
    results = run_demo(out, progress=progress, model=model, facts=facts, quick=quick)
    _table("TOFU forget01 on the testbed", ("", "shipped", "null", "paper mode"), summary_rows(results))
    _say(f"report: {out / 'report.html'}")
    return results


def trace(
    progress: Progress,
    facts: str,
    out: Path,
    model: str = "testbed",
    limit: int | None = None,
    modules: list[Literal["block", "attn", "mlp"]] | None = None,
    roles: list[Literal["subject_last", "subject", "object", "prompt"]] | None = None,
    window: Literal["single", "from", "until"] = "from",
    corruption: Literal["noise", "mask", "subject"] = "noise",
    canvas: int | None = None,
    steps: int = 8,
    draws: int = 4,
    prune: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Find where facts are carried: clean, corrupted and restored runs over layers, modules, steps and roles.

    Args:
        progress: shows how far it is.
        facts: JSONL file, or a bundled set such as tofu:forget01.
        out: folder for the trace, its pictures and a checkpoint from which a stopped run resumes.
        model: testbed, a folder, or a Hub id.
        limit: trace only the first so many facts.
        modules: which parts of a block, as a list: [block,attn,mlp] is all of them, and the default.
        roles: which positions, as a list; [subject_last,object] by default.
        window: restore at the coordinate's step alone, from it on, or until it.
        corruption: what disturbs the subject.
        canvas: answer positions; exactly the answer's tokens by default.
        steps: denoising steps.
        draws: of the corruption, a fact.
        prune: chance of losing a fact's best coordinate, for which those far behind are dropped; none are by default.
        seed: of every draw.
        device: where to run.
        trust_remote_code: run modelling code that comes with the checkpoint.
    """
    from .diffusion import SamplerConfig
    from .tracing import CausalTracer
    from .tracing.verdict import told

    chosen, backbone = _facts(facts)[:limit], _load(model, device, trust_remote_code)
    given: dict[str, Any] = {k: tuple(v) for k, v in (("modules", modules), ("roles", roles)) if v}
    with progress.reports("trace") as report:
        tracer = CausalTracer(
            backbone,
            draws=draws,
            prune=prune,
            window=window,
            corruption=corruption,
            canvas=canvas,
            sampler=SamplerConfig(steps=steps, seed=seed),
            seed=seed,
            progress=report,
            **given,
        )
        result = tracer.trace(chosen, checkpoint=out / "checkpoint.jsonl")
    result.save(out / "trace.safetensors")
    summary = result.summary()
    if "best" in summary:
        result.plot(out / "tie_heatmap.png")
        result.plot(out / "tie_steps.png", kind="steps")
        result.plot(out / "tie_facts.png", kind="facts")
    _table(f"trace of {len(chosen)} facts; intervals are 95 %", ("what", "value"), told(summary))
    _say(summary["verdict"])
    _say(f"written to {out}")
    return {"out": str(out), "n": len(chosen), "backbone": result.backbone, "settings": result.settings, **summary}


def edit(
    progress: Progress,
    facts: str,
    out: Path,
    model: str = "testbed",
    replace: str | None = None,
    negatives: str | None = None,
    protect: str | None = None,
    estimator: Literal["null", "corrupt", "lens", "donor"] | None = None,
    trace: Path | None = None,
    layer: int | None = None,
    module: Literal["block", "attn", "mlp"] = "block",
    role: Literal["subject_last", "subject", "object", "prompt"] = "object",
    alpha: float = 1.0,
    ridge: float = 0.01,
    sparsity: float = 0.0,
    rank: int = 192,
    beta: float = 1.0,
    margin: float = 8.0,
    canvases: list[int] = [64],  # noqa: B006  shown by --help; never changed
    token_gate: bool = False,
    epsilon: float | None = None,
    gate_layer: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Build an edit memory and write it to one file. The model's weights are not touched.

    Without negatives the memory has no gate: it acts on every token of everything the model is asked (paper mode).

    Args:
        progress: shows how far it is.
        facts: JSONL file, or a bundled set such as tofu:forget01. Facts with a new_object are replaced.
        out: the edit file, *.safetensors.
        model: testbed, a folder, or a Hub id.
        replace: the new answer of all facts.
        negatives: facts that must not be edited; the gate is calibrated on them.
        protect: facts whose activations get target zero in the ridge system.
        estimator: of the targets; lens where facts have a new answer, null (forget) otherwise.
        trace: a trace.safetensors whose best coordinate is taken, in place of layer, module and role.
        layer: index of the block from 0; by default the estimator's usual one.
        module: which part of the block.
        role: at which positions keys are read.
        alpha: strength.
        ridge: relative ridge penalty, above 0.
        sparsity: share of each row's entries that are dropped, 0 to 1.
        rank: most keys a fact may have.
        beta: weight of the protected keys.
        margin: logit lead that lens asks for.
        canvases: lengths of the canvas at which the edit shall hold, beside that of the answer alone, as a list.
        token_gate: also gate each token.
        epsilon: promised rate of false triggers; by default the largest score of the negatives is the threshold.
        gate_layer: block at which sequences are addressed; two thirds of the depth by default.
        device: where to run.
        trust_remote_code: run modelling code that comes with the checkpoint.
    """
    import time

    from .coordinates import Coordinate
    from .memory import BankConfig, EditMemory, Gate
    from .tracing import TraceResult

    if out.suffix != ".safetensors":
        raise ValueError(f"edit: expected --out to end in .safetensors, got {out}.")
    chosen = _facts(facts)
    chosen = chosen if replace is None else chosen.with_new_object(replace)
    guarded = None if protect is None else _facts(protect)
    backbone = _load(model, device, trust_remote_code)
    estimator = estimator or ("lens" if all(fact.new_object for fact in chosen) else "null")
    gate = None if negatives is None else Gate(_facts(negatives), token=token_gate, epsilon=epsilon, layer=gate_layer)
    usual = backbone.n_layers - 1 if estimator == "lens" else (backbone.n_layers - 1) - backbone.n_layers // 3
    coordinate = Coordinate(usual if layer is None else layer, module, 0, role)
    if trace is not None:
        coordinate = TraceResult.load(trace).best()
    begin = time.perf_counter()
    with progress.task("build", 1) as step:
        memory = EditMemory.build(
            backbone,
            chosen,
            coordinate=coordinate,
            alpha=alpha,
            ridge=ridge,
            sparsity=sparsity,
            rank=rank,
            beta=beta,
            protect=guarded,
            gate=gate,
            estimator=estimator,
            margin=margin,
            bank=BankConfig(canvases=(None, *canvases)),
        )
        step(1)
    seconds = time.perf_counter() - begin
    memory.save(out)
    result = {
        "out": str(out), "n": len(chosen), "seconds": seconds, "seconds_per_fact": seconds / len(chosen),
        "memory_bytes": memory.nbytes, "file_bytes": out.stat().st_size, "settings": memory.settings.to_dict(),
    }  # fmt: skip
    _table("edit", ("what", "value"), [
        ("facts", str(len(chosen))), ("coordinate", str(memory.settings.coordinate)), ("estimator", estimator),
        ("gate", "none: acts on every token" if gate is None else f"calibrated on {len(gate.negatives)} negatives"),
        ("seconds", f"{seconds:.1f}"), ("memory", f"{memory.nbytes / 1024:.0f} KiB"), ("file", str(out)),
    ])  # fmt: skip
    return result


def generate(
    progress: Progress,
    prompt: str,
    model: str = "testbed",
    memory: Path | None = None,
    canvas: int = 64,
    steps: int = 16,
    block_length: int | None = None,
    temperature: float = 0.0,
    remasking: Literal["low_confidence", "random"] = "low_confidence",
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Answer a prompt by denoising a canvas; with a memory, without and with it.

    Args:
        progress: shows how far it is.
        prompt: the text to answer.
        model: testbed, a folder, or a Hub id.
        memory: an edit file.
        canvas: answer positions.
        steps: denoising steps.
        block_length: positions unmasked before the next block begins; the whole canvas by default.
        temperature: 0 is greedy.
        remasking: which predictions are kept at a step.
        seed: of noise and of random remasking.
        device: where to run.
        trust_remote_code: run modelling code that comes with the checkpoint.
    """
    from contextlib import nullcontext

    from .diffusion import SamplerConfig
    from .diffusion import generate as run

    config = SamplerConfig(steps, block_length, temperature, remasking, seed)
    backbone = _load(model, device, trust_remote_code)
    edits = None if memory is None else _memory(memory, backbone)
    variants = [("text", None)] if edits is None else [("before", None), ("after", edits)]
    texts: dict[str, str] = {}
    with progress.task("generate", steps * len(variants)) as step:
        for name, attached in variants:
            with attached.attached(backbone) if attached else nullcontext():
                texts[name] = run(backbone, [prompt], canvas=canvas, config=config, listener=lambda event: step(1))[0]
    _table("generate", ("", "text"), [("prompt", prompt), *texts.items()])
    return {"prompt": prompt, "canvas": canvas, "steps": steps, **texts}


def inspect(
    progress: Progress,
    what: str,
    architecture: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Say what a model was recognised as, run a self-check on it and say what is supported; or what an edit file holds.

    Args:
        progress: shows how far it is.
        what: testbed, a model's folder or Hub id; or an edit file, which is read without any model.
        architecture: name of a record, for a model whose class does not say what it is.
        device: where to run the model.
        trust_remote_code: run modelling code that comes with the checkpoint.
    """
    if Path(what).is_file() or Path(what).suffix == ".safetensors":
        return _inspect_file(Path(what))
    from .inspection import CHECKS, inspect_backbone

    backbone = _load(what, device, trust_remote_code, architecture)
    with progress.task("self-check", len(CHECKS)) as step:
        found = inspect_backbone(backbone, lambda name: step(1))
    _table(what, ("recognised", "value"), list(found.recognised.items()))
    _table("self-check", ("what must hold", "found"), [
        (check.name, f"{'yes' if check.passed else 'NO'}: {check.found}") for check in found.checks
    ])  # fmt: skip
    _table("supported", ("what", "on this model"), list(found.supported.items()))
    return found.to_dict()


def _inspect_file(file: Path) -> dict[str, Any]:
    from .memory.files import read_manifest

    manifest = read_manifest(file)
    edits, gate = manifest["edits"], manifest["gate"]
    rows = [("edits", f"{len(edits)}: {_short(', '.join(edit['id'] for edit in edits))}")]
    undone, spared = manifest["retired"], manifest["spared"]
    rows.append(("undone", f"{len(undone)}, {len(spared)} spared: {_short(', '.join(undone)) or 'none'}"))
    for i, settings in enumerate(manifest["settings"]):
        own = sum(edit["settings"] == i for edit in edits)
        rows += [(f"{k} ({own} edits)", _short(v)) for k, v in settings.items()]
    rows += [(k, _short(manifest[k])) for k in ("version", "fingerprint", "tokenizer")]
    rows.append(("gate", "none" if gate is None else _short({k: v for k, v in gate.items() if k != "negatives"})))
    _table(str(file), ("what", "value"), rows)
    return manifest


def info(progress: Progress) -> dict[str, Any]:
    """Say what was built, why something was not, and which versions run.

    Args:
        progress: shows how far it is.
    """
    from importlib.metadata import PackageNotFoundError, version

    from ._backend import backend_info

    found = backend_info()
    for package in ("lightning", "transformers", "safetensors"):
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = "not installed"
    rows = [(key.replace("_", " "), str(value)) for key, value in found.items() if key != "versions" and value != ""]
    _table("timerome", ("what", "value"), [*rows, *found["versions"].items()])
    return found


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "demo": demo, "trace": trace, "edit": edit, "revise": revise, "diff": diff, "tune": tune, "eval": evaluate,
    "audit": audit, "generate": generate, "inspect": inspect, "info": info,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        0 if all went well, 2 on bad input, 130 on a keyboard interrupt; each of the latter with one line on stderr.
    """
    try:
        options = _parse(argv)
    except SystemExit as done:  # --help, or arguments the parser refused
        return done.code if isinstance(done.code, int) else BAD_INPUT
    name, debug = options.pop("command"), options.pop("debug")
    json_path, threads, quiet = options.pop("json"), options.pop("threads"), options.pop("quiet")
    try:
        with _tamed_libraries(debug):
            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            if json_path is not None:
                _check_writable(json_path)
            result = COMMANDS[name](progress=Progress(enabled=not quiet), **options)
            if json_path is not None:
                write_text(json_path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    except KeyboardInterrupt:
        print(f"timerome {name}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        if debug:
            traceback.print_exc()
        print(f"timerome {name}: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _parse(argv: Sequence[str] | None) -> dict[str, Any]:
    from docstring_parser import parse
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            print(f"timerome: {' '.join(message.split())} See `timerome --help`.", file=sys.stderr)
            raise SystemExit(BAD_INPUT)

    parser = Parser(prog="timerome", description="Inference-time knowledge editing for masked diffusion models.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subcommands(required=True, dest="command")
    for name, function in COMMANDS.items():
        text = parse(function.__doc__ or "")
        flags = {k for k, v in signature(function).parameters.items() if v.default is False}
        sub = Parser(description=" ".join(t for t in (text.short_description, text.long_description) if t))
        sub.add_function_arguments(
            function, as_group=False, as_positional=function in (inspect, diff), skip={"progress", *flags}
        )
        for flag in sorted(flags):
            sub.add_argument(f"--{flag}", action="store_true", help=_help(text, flag))
        sub.add_argument("--json", type=Path | None, default=None, help="write the result to this file.")
        sub.add_argument("--threads", type=int | None, default=None, help="CPU threads; torch's own choice by default.")
        sub.add_argument("--quiet", action="store_true", help="show no progress.")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error.")
        commands.add_subcommand(name, sub, help=text.short_description)
    given = sys.argv[1:] if argv is None else argv
    parsed = parser.parse_args([_with_underscores(argument) for argument in given])
    name = parsed["command"]
    options = dict(parsed[name])
    if options["threads"] is not None and options["threads"] < 1:
        parser.error(f"--threads: expected at least 1, got {options['threads']}.")
    return {"command": name, **options}


def _help(text: Docstring, name: str) -> str:
    return next((p.description or "" for p in text.params if p.arg_name == name), "")


def _with_underscores(argument: str) -> str:
    """Let ``--gate-layer`` stand for ``--gate_layer``, which the parser makes of a parameter's name."""
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if re.match(r"--[a-z]", name) else argument


def _version() -> str:
    from ._version import __version__

    return __version__


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
    text = " ".join(str(error).split())
    return text or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
