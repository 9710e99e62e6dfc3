"""Edit files: one safetensors file with a JSON manifest in its header. Nothing in it is code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._files import whole
from .._version import __version__
from ..coordinates import Coordinate
from ..facts import Fact, FactSet
from ..functional.gate import deciding
from .address import Gate, wordings
from .background import Background, Frame
from .bank import BankConfig
from .edit import OPERATIONS, Edit, Part, Spared
from .manifest import MANIFEST, EditFileError, parse, shown
from .memory import EditMemory
from .settings import Place, Settings

FORMAT = "timerome-edit-5"
MAX_KEYS = 20_000  # in one system: its factor would take 3 GB

SMALL = {torch.float32, torch.bfloat16, torch.float16}


def save(memory: EditMemory, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write ``memory`` to ``path``: to a temporary file beside it first, then moved in place.

    Args:
        memory: what to write.
        path: the file.
        dtype: of keys, targets and protected keys; half precision nearly halves the file.

    Addresses are in half precision from the start, and float32 tensors that bfloat16 holds exactly, as it does the keys
    of a model of that precision, are written in it. Of the calibration scores, those are written that can decide about
    a threshold: the r largest of all edits taken together are among the r largest of each.
    """
    if dtype not in SMALL:
        raise ValueError(f"EditMemory.save: expected float32, bfloat16 or float16, got {dtype}.")
    history, background = memory.history, memory.background
    kinds = list(dict.fromkeys([memory.settings, *(edit.settings for edit in history)]))
    frames = list(background.frames.items())
    gate = background.gate
    manifest: dict[str, Any] = {
        "version": __version__,
        "fingerprint": memory.fingerprint,
        "tokenizer": memory.tokenizer,
        "settings": [settings.to_dict() for settings in kinds],
        "edits": [
            {
                "id": edit.id,
                "fact": edit.fact.to_dict(),
                "settings": kinds.index(edit.settings),
                "operation": edit.operation,
                "supersedes": edit.supersedes,
                "rows": [len(part.targets) for part in edit.parts],
                "address": 0 if edit.address is None else len(edit.address),
                "subject": edit.subject,
            }
            for edit in history
        ],
        "retired": memory.retired,
        "spared": [vars(one) | {"address": len(one.address)} for one in memory.spared],
        "floor": background.floor,
        "gate": None if gate is None else gate.to_dict(),
        "protect": None if background.protect is None else [fact.to_dict() for fact in background.protect],
        "bank": background.bank.to_dict(),
        "frames": [
            {
                "layer": place.site.layer,
                "module": place.site.module,
                "role": place.role,
                "scale": frame.scale,
                "protect": 0 if frame.protect is None else len(frame.protect),
            }
            for place, frame in frames
        ],
    }
    tensors: dict[str, Tensor] = {}

    def put(name: str, rows: list[Tensor], dtype: torch.dtype = dtype) -> None:
        if rows:
            tensors[name] = _in(torch.cat(rows), dtype)

    def put_scores(name: str, scores: list[Tensor]) -> None:
        if gate is not None and scores:
            largest = torch.stack(scores).topk(deciding(len(scores[0]), gate.epsilon), 1)
            put(name, [largest.values], torch.float32)
            put(f"{name}_of", [largest.indices], torch.int32)

    put("keys", [part.keys for edit in history if not edit.settings.by_place for part in edit.parts])
    put("targets", [part.targets for edit in history for part in edit.parts])
    put("address", [edit.address for edit in history if edit.address is not None], torch.float16)
    put("spared", [one.address for one in memory.spared], torch.float16)
    put_scores("address_scores", [edit.address_scores for edit in history if edit.address_scores is not None])
    put_scores("token_scores", [edit.token_scores for edit in history if edit.token_scores is not None])
    put("frame_means", [frame.mean[None] for _, frame in frames], torch.float32)
    put("protect", [frame.protect for _, frame in frames if frame.protect is not None])
    put("centre", [] if background.centre is None else [background.centre[None]], torch.float32)
    text = json.dumps(manifest, separators=(",", ":"), ensure_ascii=False)
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "manifest": text})


def _in(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in a type, or in half of its bytes where they are all held exactly: keys that such a model gave are."""
    if dtype is torch.float32 and torch.equal(rows.bfloat16().float(), rows):
        dtype = torch.bfloat16
    return rows.to(dtype).contiguous()


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of an edit file without reading its tensors.

    Raises:
        EditFileError: the file is missing, truncated, or no edit file.
    """
    return _read(path, tensors=False)[0]


def load(path: Path) -> EditMemory:
    """Read an edit file; see :meth:`EditMemory.load`. What does not fit together is refused, nothing is guessed."""
    manifest, tensors = _read(path, tensors=True)
    try:
        memory = _memory(manifest, tensors)
        _ = memory.systems  # solved now, so that what cannot be is refused here and not in somebody's loop
        return memory
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, OverflowError) as error:
        raise EditFileError(f"EditMemory.load: {path} does not hold what its manifest says ({shown(error)}).") from None


def _read(path: Path, tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    text, found = read_file(path, FORMAT, "build the memory again with this version", tensors)
    try:
        return parse(text, MANIFEST), found
    except EditFileError as error:
        raise EditFileError(f"EditMemory.load: {path} does not hold what an edit file must: {shown(error)}.") from None


def read_file(path: Path, form: str, otherwise: str, tensors: bool = True) -> tuple[str, dict[str, Tensor]]:
    """Return the manifest's text and the tensors of a file of a format.

    Raises:
        EditFileError: the file is missing, truncated, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != form:
                raise EditFileError(
                    f"EditMemory.load: expected a file of format {form!r}, {path} has {metadata.get('format')!r}; "
                    f"{otherwise}."
                )
            # Cloned, so that nothing hangs on a file that another process may cut short.
            found = {name: file.get_tensor(name).clone() for name in file.keys()} if tensors else {}  # noqa: SIM118
    except FileNotFoundError:
        raise EditFileError(f"EditMemory.load: there is no file {path}.") from None
    except (SafetensorError, OSError) as error:
        raise EditFileError(
            f"EditMemory.load: {path} is damaged or no safetensors file ({error}); copy or save it again."
        ) from error
    return metadata.get("manifest", ""), found


def _memory(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> EditMemory:
    """Put a memory together from a manifest of the right form and whatever tensors came with it."""
    settings = [Settings.from_dict(values) for values in manifest["settings"]]
    edits, frames, spared = manifest["edits"], manifest["frames"], manifest["spared"]
    _require(bool(settings) and len({s.shared for s in settings}) == 1, "no settings, or shared and single ones")
    names = [edit["id"] for edit in edits] + manifest["retired"]
    _require(all(names) and len(set(names)) == len(names), "edit ids are empty or not distinct")
    undone = [one["id"] for one in spared]
    _require(len(set(undone)) == len(undone) and set(undone) <= set(manifest["retired"]), "spared edits never undone")
    _require({n for e in edits for n in e["supersedes"]} <= set(names), "an edit supersedes one that never was")
    _require(all(e["operation"] in OPERATIONS for e in edits), f"operations other than {OPERATIONS}")
    gate = None if manifest["gate"] is None else Gate.from_dict(manifest["gate"])
    protect = None if manifest["protect"] is None else FactSet(map(Fact.from_dict, manifest["protect"]))
    addressed, gated = gate is not None and gate.address, gate is not None and gate.token

    scored = {}  # names of calibration scores, and of how many negatives
    if gate is not None and gate.address:
        scored["address_scores"] = sum(len(wordings(fact)) for fact in gate.negatives)
    if gate is not None and gate.token:
        scored["token_scores"] = len(gate.negatives)
    placed = [settings[edit["settings"]].by_place for edit in edits]
    counts = [n for edit in edits for n in edit["rows"]]
    keyed = [0 if own else n for own, edit in zip(placed, edits, strict=True) for n in edit["rows"]]
    held = [frame["protect"] for frame in frames]
    _require(all(counts) and sum(counts) + sum(held) <= MAX_KEYS * max(1, len(edits)), "edits without or of many keys")
    if settings[0].shared:
        _require(sum(counts) + sum(held) <= MAX_KEYS, f"a system of more than {MAX_KEYS} keys")
    width = next((tensors[name].shape[-1] for name in ("targets", "spared") if name in tensors), None)
    wanted: dict[str, tuple[int | None, int | None]] = {}
    if edits:
        wanted |= {"targets": (sum(counts), width)}
        if sum(keyed):
            wanted |= {"keys": (sum(keyed), width)}
        if addressed:
            _require(all(edit["address"] for edit in edits), "edits without address")
            wanted |= {"address": (sum(edit["address"] for edit in edits), width)}
        for name, n in scored.items():
            wanted |= dict.fromkeys((name, f"{name}_of"), (len(edits), deciding(n, gate.epsilon if gate else None)))
    if spared:
        _require(addressed and all(one["address"] for one in spared), "spared questions without address")
        wanted |= {"spared": (sum(one["address"] for one in spared), width)}
    if frames:
        wanted |= {"frame_means": (len(frames), width)}
    if sum(held):
        wanted |= {"protect": (sum(held), width)}
    if addressed and (edits or spared or "centre" in tensors):
        wanted |= {"centre": (1, width)}
    _require(tensors.keys() == wanted.keys(), f"tensors {sorted(tensors)} instead of {sorted(wanted)}")
    for name, (rows, columns) in wanted.items():
        tensor = tensors[name]
        fits = tensor.dim() == 2 and rows in (None, len(tensor)) and columns in (None, tensor.shape[1])
        _require(fits and tensor.shape[-1] > 0, f"{name} has the shape {tuple(tensor.shape)}")
        if name.endswith("_of"):
            inside = tensor.dtype == torch.int32 and bool(((tensor >= 0) & (tensor < scored[name[:-3]])).all())
            _require(inside, f"{name} are no numbers of negatives")
            continue
        _require(tensor.dtype in SMALL and bool(torch.isfinite(tensor).all()), f"{name} is not finite or no float")
        tensors[name] = tensor.float()
    scores = {name: _all_scores(tensors[name], tensors[f"{name}_of"], n) for name, n in scored.items() if edits}

    def rows_of(name: str, sizes: list[int]) -> list[Tensor]:
        return list(tensors[name].split(sizes)) if name in tensors else []

    targets = rows_of("targets", counts)
    keys = rows_of("keys", keyed) or [part[:0] for part in targets]
    addresses = rows_of("address", [edit["address"] for edit in edits]) if addressed else []
    asked = rows_of("spared", [one["address"] for one in spared])
    history, at = [], 0
    for i, values in enumerate(edits):
        own = settings[values["settings"]]
        _require(len(own.coordinates) == len(values["rows"]), f"edit {values['id']!r} has parts at other coordinates")
        parts = []
        for coordinate in own.coordinates:
            parts.append(Part(coordinate, keys[at], targets[at]))
            at += 1
        history.append(
            Edit(
                id=values["id"],
                fact=Fact.from_dict(values["fact"]),
                settings=own,
                parts=tuple(parts),
                operation=values["operation"],
                supersedes=tuple(values["supersedes"]),
                address=addresses[i] if addressed else None,
                subject=tuple(tuple(ids) for ids in values["subject"]) if addressed else (),
                address_scores=scores["address_scores"][i] if addressed else None,
                token_scores=scores["token_scores"][i] if gated else None,
            )
        )
    means, guarded = tensors.get("frame_means"), rows_of("protect", held)
    known: dict[Place, Frame] = {}
    for i, values in enumerate(frames):
        place = Place.of(Coordinate(values["layer"], values["module"], 0, values["role"]))
        _require(place not in known and values["scale"] >= 0, "frames that repeat, or of negative scale")
        _require(bool(values["protect"]) == (protect is not None), "frames with other protected facts than the memory")
        assert means is not None
        known[place] = Frame(means[i], values["scale"], guarded[i] if values["protect"] else None)
    places = {Place.of(part.coordinate) for edit in history if not edit.settings.by_place for part in edit.parts}
    _require(places <= known.keys() or (gate is None and protect is None), "edits at places without a frame")
    return EditMemory(
        settings[0],
        history,
        background=Background(
            gate,
            protect,
            BankConfig.from_dict(manifest["bank"]),
            known,
            tensors["centre"][0] if "centre" in tensors else None,
            manifest["floor"],
        ),
        retired=manifest["retired"],
        spared=[
            Spared(**one | {"address": address, "spellings": tuple(map(tuple, one["spellings"]))})
            for one, address in zip(spared, asked, strict=True)
        ],
        fingerprint=manifest["fingerprint"],
        tokenizer=manifest["tokenizer"],
    )


def _all_scores(largest: Tensor, where: Tensor, n: int) -> Tensor:
    """Scores of ``n`` negatives, ``(edits, n)``, of which the largest are known; the others become just less."""
    less = torch.nextafter(largest.amin(1, keepdim=True), torch.tensor(-torch.inf))
    return less.repeat(1, n).scatter(1, where.long(), largest)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
