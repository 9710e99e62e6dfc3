"""Find the model in a LightningModule that knows nothing of this library."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from ..backbones import Architecture, Backbone, CausalModelError, UnknownArchitectureError, architectures, wrap

LARGEST = 100  # lists and mappings of more entries hold data, not models
FOREIGN = {"builtins", "functools", "lightning", "lightning_fabric", "numpy", "pytorch_lightning", "timerome", "torch"}


@dataclass(frozen=True)
class Found:
    """A backbone, and where it was.

    Attributes:
        backbone: the model.
        where: its path among the module's attributes; empty for the module itself, None for a model from elsewhere.
    """

    backbone: Backbone
    where: str | None

    def __str__(self) -> str:
        model, record = type(self.backbone.model).__name__, self.backbone.architecture.name
        return f"{_quoted(self.where)} ({model} as {record})"


@dataclass(frozen=True)
class _Candidate:
    where: str
    model: nn.Module
    records: tuple[Architecture, ...]

    @property
    def explicit(self) -> bool:
        """Whether it takes more than its structure to know it."""
        return all(record.explicit for record in self.records)

    def __str__(self) -> str:
        return f"{_quoted(self.where)} ({type(self.model).__name__})"


def find_backbone(
    pl_module: LightningModule, given: Backbone | None = None, *, fingerprint: str | None = None, who: str = "timerome"
) -> Found:
    """Return the model that a module's loop runs: what is given, else what is found among its attributes.

    In this order: ``given``; a :class:`timerome.Backbone`, anywhere; the submodule whose fingerprint is
    ``fingerprint``; the only submodule that a record recognises, the outermost one where several lie in each other.
    A model that is no Backbone is wrapped together with the tokenizer nearest to it, or without one.

    Args:
        pl_module: the module. Its submodules are looked through, and two steps into the lists, mappings and plain
            objects that are attributes of theirs.
        given: what to return whatever is there.
        fingerprint: of the model that is looked for.
        who: begins messages.

    Raises:
        UnknownArchitectureError: no record recognises any submodule.
        CausalModelError: the model does not look ahead.
        ValueError: it may be one of several models, or the id of its mask token is unknown.
    """
    held = list(_held(pl_module))
    if given is not None:
        return Found(given, next((path for path, value in held if value is given or value is given.model), None))
    backbones = {id(b.model): Found(b, path) for path, b in reversed(held) if isinstance(b, Backbone)}
    if backbones:
        # Nearest last, so that of two backbones around one model the nearer is kept, and named first here.
        whole = list(backbones.values())[::-1]
        those = [found for found in whole if len(whole) > 1 and found.backbone.fingerprint() == fingerprint] or whole
        return _only(those, pl_module, who)
    candidates = [c for path, value in held if isinstance(value, nn.Module) for c in _candidates(path, value)]
    chosen = _chosen(candidates, fingerprint) or _outermost([c for c in candidates if not c.explicit])
    if not chosen:
        raise UnknownArchitectureError(_unknown(pl_module, held, candidates, who))
    candidate: _Candidate = _only(chosen, pl_module, who)
    return Found(_wrapped(candidate, held, who), candidate.where)


def _held(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Whatever hangs on a module, by path, nearest first, each thing once."""
    own = vars(LightningModule()).keys()
    seen: set[int] = set()
    waiting: deque[tuple[str, Any, int]] = deque([("", root, 0)])
    if isinstance(named := getattr(root, "backbone", None), Backbone):
        waiting.append(("backbone", named, 0))  # it may be a property
    while waiting:
        path, value, steps = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield path, value
        parts: dict[str, Any] = {}
        if isinstance(value, nn.Module):
            more = {name: part for name, part in vars(value).items() if name not in own}
            parts = {f".{name}": part for name, part in [*value._modules.items(), *more.items()]}
        elif steps < 2 and isinstance(value, (dict, list, tuple)) and len(value) <= LARGEST:
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            parts, steps = {f"[{key!r}]": part for key, part in entries}, steps + 1
        elif steps < 2 and hasattr(value, "__dict__") and not _foreign(value):
            parts, steps = {f".{name}": part for name, part in vars(value).items()}, steps + 1
        waiting.extend(((path + name).lstrip("."), part, steps) for name, part in parts.items())


def _foreign(value: Any) -> bool:
    """Whether it is no plain object of the user's or of a model's library."""
    return isinstance(value, type) or type(value).__module__.split(".")[0] in FOREIGN


def _candidates(path: str, model: nn.Module) -> Iterator[_Candidate]:
    """The model with the records that fit it, if any does."""
    known = architectures()
    if any(record.refusal and record.covers(model) for record in known):
        return
    fitting = tuple(record for record in known if record.mismatch(model) is None)
    if fitting:
        yield _Candidate(path, model, fitting)


def _chosen(candidates: Sequence[_Candidate], fingerprint: str | None) -> list[_Candidate]:
    """Those that the fingerprint is of, each with the record that it is of; weights are not read without need."""
    if fingerprint is None or (len(candidates) == 1 and not candidates[0].explicit):
        return []
    return [
        _Candidate(c.where, c.model, (record,))
        for c in candidates
        for record in c.records
        # The mask token is no part of the fingerprint.
        if wrap(c.model, architecture=record, mask_token_id=0, check=False).fingerprint() == fingerprint
    ]


def _outermost(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Those that lie in no other."""
    inside = {id(part) for c in candidates for part in c.model.modules() if part is not c.model}
    return [c for c in candidates if id(c.model) not in inside]


def _only(found: Sequence[Any], pl_module: LightningModule, who: str) -> Any:
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"{who}: expected one model in {type(pl_module).__name__}, got {' and '.join(map(str, found))}; pass the one "
        "that is meant as backbone=timerome.wrap(model, tokenizer)."
    )


def _wrapped(candidate: _Candidate, held: Sequence[tuple[str, Any]], who: str) -> Backbone:
    """The candidate as a backbone, with the nearest tokenizer that fits it, or none."""

    def distance(path: str) -> int:
        owner, _, _ = path.rpartition(".")
        beside = not owner or candidate.where == owner or candidate.where.startswith(owner + ".")
        return -len(owner) if beside else 1

    tokenizers = [(distance(path), value) for path, value in held if _is_tokenizer(value)]
    record = next((r for r in candidate.records if not r.explicit), candidate.records[0])
    problem: ValueError | None = None
    for tokenizer in [*(value for _, value in sorted(tokenizers, key=lambda pair: pair[0])), None]:
        try:
            return wrap(candidate.model, tokenizer, architecture=record)
        except CausalModelError:
            raise
        except ValueError as error:
            problem = problem or error
    raise ValueError(
        f"{who}: {candidate} cannot be used as it was found: {problem} Pass backbone=timerome.wrap(model, tokenizer, "
        "mask_token_id=...) in its place."
    ) from problem


def _is_tokenizer(value: Any) -> bool:
    """Whether it is called as tokenizers are: ``tokenizer(text, add_special_tokens=False)``."""
    if isinstance(value, (type, nn.Module)) or not (callable(value) and hasattr(value, "get_vocab")):
        return False
    try:
        taken = inspect.signature(value).parameters
    except (TypeError, ValueError):
        return False
    return "add_special_tokens" in taken


def _unknown(
    pl_module: LightningModule, held: Sequence[tuple[str, Any]], candidates: Sequence[_Candidate], who: str
) -> str:
    name = type(pl_module).__name__
    if candidates:
        them = ", ".join(map(str, candidates))
        return (
            f"{who}: {name} has {them}, of the structure of {candidates[0].records[0].name!r}, but so is a causal "
            f"model; if it is one of these, pass backbone=timerome.wrap(model, tokenizer, "
            f"architecture={candidates[0].records[0].name!r})."
        )
    models = [(path, value) for path, value in held if isinstance(value, nn.Module) and value is not pl_module]
    for path, model in models:
        for record in architectures():
            if record.refusal and record.covers(model):
                return f"{who}: {_quoted(path)} ({type(model).__name__}) cannot be used: {record.refusal}."
    some = ", ".join(f"{_quoted(path)} ({type(model).__name__})" for path, model in models[:5]) or "no submodule"
    return (
        f"{who}: expected a masked diffusion model among the attributes of {name}, got {some}"
        f"{' and others' if len(models) > 5 else ''}, of no known architecture; pass backbone=..., or describe yours "
        "with timerome.register(Architecture(...))."
    )


def _quoted(path: str | None) -> str:
    return "the backbone given" if path is None else f"`{path}`" if path else "the module itself"
