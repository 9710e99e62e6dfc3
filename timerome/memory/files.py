"""Edit files: one safetensors file with a JSON manifest in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._files import whole
from .._version import __version__
from ..backbones import Backbone
from ..coordinates import Site
from ..facts import Fact
from .address import AddressBook
from .attachment import check_belongs
from .memory import Edit, EditMemory, Settings

FORMAT = "timerome-edit-1"


class EditFileError(ValueError):
    """A file is no edit file, or damaged."""


def save(memory: EditMemory, path: Path) -> None:
    """Write ``memory`` to ``path``: to a temporary file beside it first, then moved in place."""
    book = memory.book
    manifest: dict[str, Any] = {
        "version": __version__,
        "fingerprint": memory.fingerprint,
        "tokenizer": memory.tokenizer,
        "settings": memory.settings.to_dict(),
        "facts": [edit.fact.to_dict() for edit in memory.edits],
        "counts": [len(edit.keys) for edit in memory.edits],
        "token_threshold": memory.token_threshold,
        "address": None if book is None else {"site": list(book.site), "span": book.span, "threshold": book.threshold},
    }
    tensors = {
        "keys": torch.cat([edit.keys for edit in memory.edits]),
        "targets": torch.cat([edit.targets for edit in memory.edits]),
        "mean": memory.mean,
    }
    if memory.protect is not None:
        tensors["protect"] = memory.protect
    if book is not None:
        tensors |= {
            "address.mean": book.mean,
            "address.vectors": book.vectors,
            "address.owner": book.owner,
            "address.calibration": book.calibration,
        }
    metadata = {"format": FORMAT, "manifest": json.dumps(manifest)}
    with whole(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of an edit file without reading its tensors.

    Raises:
        EditFileError: the file is missing, truncated, or no edit file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise EditFileError(f"EditMemory.load: there is no file {path}.") from None
    except (SafetensorError, OSError) as error:
        raise EditFileError(
            f"EditMemory.load: {path} is damaged or no safetensors file ({error}); copy or save it again."
        ) from error
    if metadata.get("format") != FORMAT:
        raise EditFileError(
            f"EditMemory.load: expected a file of format {FORMAT!r}, {path} has {metadata.get('format')!r}."
        )
    try:
        return dict(json.loads(metadata["manifest"]))
    except (KeyError, ValueError) as error:
        raise EditFileError(f"EditMemory.load: the manifest of {path} is unreadable ({error}).") from error


def load(path: Path, backbone: Backbone | None) -> EditMemory:
    """Read an edit file; see :meth:`EditMemory.load`."""
    manifest = read_manifest(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        counts = manifest["counts"]
        facts = [Fact.from_dict(fact) for fact in manifest["facts"]]
        keys, targets = tensors["keys"].split(counts), tensors["targets"].split(counts)
        address, book = manifest["address"], None
        if address is not None:
            book = AddressBook(
                site=Site(*address["site"]),
                span=address["span"],
                mean=tensors["address.mean"],
                vectors=tensors["address.vectors"],
                owner=tensors["address.owner"],
                threshold=address["threshold"],
                calibration=tensors["address.calibration"],
            )
        memory = EditMemory(
            Settings.from_dict(manifest["settings"]),
            [Edit(*parts) for parts in zip(facts, keys, targets, strict=True)],
            mean=tensors["mean"],
            protect=tensors.get("protect"),
            book=book,
            token_threshold=manifest["token_threshold"],
            fingerprint=manifest["fingerprint"],
            tokenizer=manifest["tokenizer"],
        )
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise EditFileError(f"EditMemory.load: {path} does not hold what its manifest says ({error}).") from error
    if backbone is not None:
        check_belongs(memory, backbone)
    return memory
