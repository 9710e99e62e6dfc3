"""Edit files: one safetensors file, its manifest and the digest of its tensors inside. Nothing in it is code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .._files import whole
from .._version import __version__
from ..coordinates import Coordinate
from ..errors import EditFileError
from ..facts import Fact
from .edits import OPERATIONS, AnswerGate, Change, Edit, Keyed, Part, Placed, RelationHead, Watch, about, in_force
from .manifest import MAX_BYTES, Form, parse, shown
from .state import MemoryState

FORMAT = "timerome-edit-6"
MAX_KEYS = 20_000  # in one system: its factor would take 3 GB
SMALL = {torch.float32, torch.bfloat16, torch.float16}

_TOKENS: Form = [[int]]
_WATCH: Form = {"text": str, "tokens": _TOKENS, "own": float}
_GATE: Form = {
    "watches": [_WATCH], "names": [str], "wordings": [str], "spellings": _TOKENS, "threshold": (float, None),
    "relation": ({"weight": int, "bias": float}, None), "alone": bool,
}  # fmt: skip
_PART: Form = {
    "coordinate": {"layer": int, "module": str, "step": int, "role": str}, "keys": int, "targets": int,
    "mean": (int, None), "protect": (int, None),
}  # fmt: skip
_EDIT: Form = {
    "id": str, "fact": dict, "says": (str, None), "operation": str, "supersedes": [str], "gate": (_GATE, None),
    "placed": ({"tokens": _TOKENS, "targets": int, "layer": int, "ends": bool}, None),
    "keyed": (
        {"parts": [_PART], "alpha": float, "ridge": float, "sparsity": float, "beta": float, "together": bool}, None
    ),
}  # fmt: skip
MANIFEST: Form = {
    "version": str, "fingerprint": str, "tokenizer": str, "edits": [_EDIT], "gone": [str], "digest": str,
}  # fmt: skip


class _Tensors:
    """Tensors by number; one that several edits share is there once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.found, self._numbers = dtype, {}, {}  # type: tuple[torch.dtype, dict[str, Tensor], dict[int, int]]

    def put(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.found)
            self.found[str(len(self.found))] = tensor.to(self.dtype).contiguous()
        return self._numbers[id(tensor)]


def save(state: MemoryState, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a state: to a temporary file beside ``path`` first, then moved in place.

    Args:
        state: what to write.
        path: the file.
        dtype: of its tensors; half precision halves the file and rounds them.

    Raises:
        EditFileError: the dtype is none of float32, bfloat16, float16; or the manifest is too large to be read again.
    """
    if dtype not in SMALL:
        raise EditFileError(f"EditMemory.save: expected float32, bfloat16 or float16, got {dtype}.")
    manifest, tensors = _written(state, dtype)
    manifest["version"] = __version__
    text = _json(manifest | {"digest": _digest_of(manifest, tensors)})
    if len(text) > MAX_BYTES:
        raise EditFileError(
            f"EditMemory.save: the manifest has {len(text)} characters, more than the {MAX_BYTES} that are read; "
            "save fewer edits to a file."
        )
    with whole(path) as temporary:
        # One entry alone: safetensors writes several in any order, and one memory is to be one file.
        safetensors.torch.save_file(tensors, temporary, metadata={FORMAT: text})


def digest(state: MemoryState) -> str:
    """SHA-256 of everything a state is."""
    return _digest_of(*_written(state, torch.float32))


def _written(state: MemoryState, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = _Tensors(dtype)
    manifest = {
        "fingerprint": state.fingerprint,
        "tokenizer": state.tokenizer,
        "edits": [_edit_written(edit, tensors) for edit in state.history],
        "gone": state.gone,
    }
    return manifest, tensors.found


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False, sort_keys=True)


def _edit_written(edit: Edit, tensors: _Tensors) -> dict[str, Any]:
    change, gate = edit.change, edit.gate
    placed = keyed = None
    if isinstance(change, Placed):
        placed = vars(change) | {"targets": tensors.put(change.targets)}
    else:
        parts = [
            {"coordinate": p.coordinate.to_dict()}
            | {name: tensors.put(getattr(p, name)) for name in ("keys", "targets", "mean", "protect")}
            for p in change.parts
        ]
        keyed = vars(change) | {"parts": parts}
    relation = None
    if gate is not None and gate.relation is not None:
        relation = {"weight": tensors.put(gate.relation.weight), "bias": gate.relation.bias}
    return {
        "id": edit.id,
        "fact": edit.fact.to_dict(),
        "says": edit.says,
        "operation": edit.operation,
        "supersedes": edit.supersedes,
        "gate": None
        if gate is None
        else vars(gate) | {"watches": [vars(watch) for watch in gate.watches], "relation": relation},
        "placed": placed,
        "keyed": keyed,
    }


def _digest_of(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of a manifest, and of the names, types, shapes and bytes of tensors."""
    values = {name: value for name, value in manifest.items() if name != "digest"}
    found = hashlib.sha256(_json(values).encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def load(path: Path) -> MemoryState:
    """Read an edit file; see :meth:`EditMemory.load`. What does not fit together is refused, nothing is guessed.

    Raises:
        EditFileError: the file is missing, damaged, or no edit file.
    """
    manifest, tensors = read_file(path, FORMAT, MANIFEST)
    try:
        return _state(manifest, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, OverflowError) as error:
        raise EditFileError(f"EditMemory.load: {path} does not hold what its manifest says ({shown(error)}).") from None


def read_file(path: Path, form: str, manifest: Form) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the manifest and the tensors of a file, read once and checked against the digest in it.

    Raises:
        EditFileError: the file is missing, damaged, of another format, or was changed after it was written.
    """
    path = path.expanduser()
    try:
        content = path.read_bytes()
        metadata = _metadata(content)
        if form not in metadata:
            raise EditFileError(
                f"EditMemory.load: expected a file of format {form!r}, {path} has {shown(list(metadata), 80)}; make it "
                "again with this version."
            )
        tensors = safetensors.torch.load(content)
    except FileNotFoundError:
        raise EditFileError(f"EditMemory.load: there is no file {path}.") from None
    except (SafetensorError, OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        if isinstance(error, EditFileError):
            raise
        raise EditFileError(
            f"EditMemory.load: {path} is damaged or no safetensors file ({shown(error)}); copy or save it again."
        ) from None
    try:
        values = parse(metadata[form], manifest)
    except EditFileError as error:
        raise EditFileError(f"EditMemory.load: {path} does not hold what an edit file must: {shown(error)}.") from None
    if values["digest"] != _digest_of(values, tensors):
        raise EditFileError(f"EditMemory.load: {path} does not hold what was written to it; copy or save it again.")
    return values, tensors


def _metadata(content: bytes) -> dict[str, str]:
    """The text fields of a safetensors file's header."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(len(content) - 8, 2 * MAX_BYTES):
        raise ValueError("its header is longer than the file")
    header = json.loads(content[8 : 8 + size])
    found = header.get("__metadata__") or {}
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError("its header has another form")
    return found


def _state(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> MemoryState:
    """Put a state together from a manifest of the right form and whatever tensors came with it."""
    edits = manifest["edits"]
    names = [edit["id"] for edit in edits] + manifest["gone"]
    _require(all(names) and len(set(names)) == len(names), "edit ids are empty or not distinct")
    for i, edit in enumerate(edits):
        earlier = {other["id"] for other in edits[:i]} | set(manifest["gone"])
        _require(set(edit["supersedes"]) <= earlier, "an edit supersedes one that was not before it")
        _require(edit["operation"] in OPERATIONS, f"operations other than {OPERATIONS}")
        _require((edit["placed"] is None) != (edit["keyed"] is None), "an edit that adds nothing, or two things")
    for name, found in tensors.items():
        fits = found.dtype in SMALL and found.dim() in (1, 2) and found.numel() > 0
        _require(fits and bool(torch.isfinite(found).all()), f"tensor {name} is empty, not finite or no float")
    known: dict[str, Tensor] = {}

    def tensor(number: int | None) -> Any:
        """A tensor by its number, the same object for all edits that share it."""
        return None if number is None else known.setdefault(str(number), tensors[str(number)].float())

    history = tuple(_edit_read(edit, tensor) for edit in edits)
    _require(known.keys() == tensors.keys(), "tensors that no edit has")
    together = [edit.change for edit in history if isinstance(edit.change, Keyed) and edit.change.together]
    rows = sum(len(part.keys) for change in together for part in change.parts[:1])
    _require(rows <= MAX_KEYS, f"a system of more than {MAX_KEYS} keys")
    alike = {(c.alpha, c.ridge, c.sparsity, c.beta) for c in together}
    _require(len(alike) <= 1, "edits of one system with different strengths")
    _require(len({edit.gate is None for edit in history}) <= 1, "gated edits and such that act whatever is asked")
    topics = [topic for edit in in_force(history) for topic in about(edit.fact)]
    _require(len(set(topics)) == len(topics), "two edits in force about one subject and relation")
    return MemoryState(manifest["fingerprint"], manifest["tokenizer"], history, tuple(manifest["gone"]))


def _edit_read(values: dict[str, Any], tensor: Any) -> Edit:
    gate, relation = values["gate"], None
    if gate is not None:
        if gate["relation"] is not None:
            relation = RelationHead(tensor(gate["relation"]["weight"]), gate["relation"]["bias"])
            _require(relation.weight.dim() == 1, "a relation head of another shape")
        watches = tuple(Watch(w["text"], _tuples(w["tokens"]), w["own"]) for w in gate["watches"])
        _require(all(w.tokens and w.own <= 1e-3 for w in watches), "an answer without tokens, or likelier than sure")
        gate = AnswerGate(
            watches, tuple(gate["names"]), tuple(gate["wordings"]), _tuples(gate["spellings"]), gate["threshold"],
            relation, gate["alone"],
        )  # fmt: skip
    change: Change
    if values["placed"] is not None:
        own = values["placed"]
        change = Placed(_tuples(own["tokens"]), tensor(own["targets"]), own["layer"], own["ends"])
        rows = len(change.targets) if change.targets.dim() == 2 else 0
        _require(rows > 0 and bool(change.tokens), "an edit without targets")
        _require(all(n < rows for way in change.tokens for n in way), "an answer of targets that are not there")
        _require(gate is not None and values["says"] is not None, "an edit by place without a gate or an answer")
    else:
        own = values["keyed"]
        parts = tuple(
            Part(Coordinate(**p["coordinate"]), *(tensor(p[n]) for n in ("keys", "targets", "mean", "protect")))
            for p in own["parts"]
        )
        _require(bool(parts) and len({p.coordinate.site for p in parts}) == len(parts), "parts at no or one site")
        for p in parts:
            _require(p.keys.dim() == 2 and p.keys.shape == p.targets.shape, "keys and targets of different shapes")
            _require(len(p.keys) <= MAX_KEYS, "an edit of too many keys")
            _require((p.mean is None) == (p.protect is None), "a mean without protected keys")
            _require(p.mean is None or p.mean.shape == p.keys.shape[1:], "a mean of another width")
            _require(p.protect is None or p.protect.shape[1:] == p.keys.shape[1:], "protected keys of another width")
        fits = 0 < own["ridge"] and 0 <= own["sparsity"] < 1 and own["beta"] >= 0 and abs(own["alpha"]) < 1e6
        _require(fits and (own["together"] or gate is not None), "a system out of range, or without a gate")
        change = Keyed(parts, own["alpha"], own["ridge"], own["sparsity"], own["beta"], own["together"])
    fact = Fact.from_dict(values["fact"])
    return Edit(
        values["id"], fact, values["says"], values["operation"], change, gate, tuple(values["supersedes"])
    )  # fmt: skip


def _tuples(lists: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    _require(all(lists), "an empty list of tokens")
    return tuple(tuple(own) for own in lists)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
