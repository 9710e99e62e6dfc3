"""What a gate must know of a model, read once and kept: it is the same for every memory behind that gate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .._files import whole
from .._version import __version__
from ..backbones import Backbone
from ..coordinates import Coordinate
from ..facts import FactSet
from .address import Gate, Reading
from .attachment import MemoryMismatchError, unedited
from .background import Background, Frame
from .bank import BankConfig
from .manifest import CALIBRATION, EditFileError, parse, shown
from .settings import Place

FORMAT = "timerome-calibration-1"


@dataclass(frozen=True)
class Calibration:
    """A gate, calibrated on one model: what it is about to say of every negative.

    Reading that takes as many forwards as there are wordings of negatives and canvases, mostly more than an edit does,
    and depends on the model and the gate alone. So read it once, :meth:`save` it beside the model, and pass it to
    :meth:`EditMemory.build` in the gate's place.

    Attributes:
        gate: the gate, its layer chosen.
        bank: over whose canvases the negatives were read.
        fingerprint: of the model.
        tokenizer: digest of its tokenizer.
        negatives: addresses of every wording of every negative on every canvas, m of them.
        wording: which wording each is of, ``(m,)`` int64.
        centre: mean of the addresses, ``(d,)``.
        floor: cosine that two questions about one subject seldom exceed, see :class:`Gate`.
        frames: what ridge systems at a place are solved about, for the coordinates asked for.
    """

    gate: Gate
    bank: BankConfig
    fingerprint: str
    tokenizer: str
    negatives: Reading
    wording: Tensor
    centre: Tensor
    floor: float
    frames: dict[Place, Frame]

    @classmethod
    def of(
        cls, backbone: Backbone, gate: Gate, *, bank: BankConfig | None = None, coordinates: Sequence[Coordinate] = ()
    ) -> Calibration:
        """Calibrate a row gate on a model, as it is without any memory.

        Args:
            backbone: the model.
            gate: the gate; it must address rows.
            bank: whose canvases negatives are asked on; edits may have states on others.
            coordinates: where edits with keys will be made (``null``, ``donor``), so that what their systems are solved
                about is read, too. Elsewhere it is read when it is needed.

        Raises:
            ValueError: the gate does not address rows; a layer does not exist.

        Example:
            >>> import timerome as tr
            >>> from timerome.splits import bundled_facts
            >>> backbone, facts = tr.load("testbed"), bundled_facts("relations")
            >>> calibration = tr.Calibration.of(backbone, tr.Gate(facts[10:30]), bank=tr.BankConfig((None,)))
            >>> first, second = (tr.EditMemory.build(backbone, facts[i : i + 1], gate=calibration) for i in (0, 1))
        """
        gate = gate.resolved(backbone)
        background = Background(gate, None, bank)
        with unedited(backbone.model):
            found = background.read(backbone)
            for coordinate in coordinates:
                background.frame(backbone, Place.of(coordinate))
        about = gate, background.bank, backbone.fingerprint(), backbone.tokenizer_digest()
        return cls(*about, *found, background.floor, background.frames)

    def background(self, protect: FactSet | None = None) -> Background:
        """Return what a memory behind this gate has to know, with nothing left to be read of the negatives."""
        frames = dict(self.frames) if protect is None else {}  # those of protected facts are others
        return Background(
            self.gate, protect, self.bank, frames, self.centre, self.floor, (self.negatives, self.wording)
        )  # fmt: skip

    def check(self, backbone: Backbone) -> None:
        """Refuse another model.

        Raises:
            MemoryMismatchError: fingerprints or tokenizer digests differ; the message holds both.
        """
        ours, theirs = (self.fingerprint, self.tokenizer), (backbone.fingerprint(), backbone.tokenizer_digest())
        if ours != theirs:
            raise MemoryMismatchError(
                f"Calibration: this gate was calibrated on a model and tokenizer with fingerprints {ours}, but "
                f"{backbone.name} has {theirs}; calibrate it anew: Calibration.of(backbone, gate)."
            )

    def save(self, path: str | Path) -> None:
        """Write it as one safetensors file, whole or not at all."""
        places = list(self.frames)
        manifest: dict[str, Any] = {
            "version": __version__,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer,
            "gate": self.gate.to_dict(),
            "bank": self.bank.to_dict(),
            "floor": self.floor,
            "frames": [
                {"layer": p.site.layer, "module": p.site.module, "role": p.role, "scale": self.frames[p].scale}
                for p in places
            ],
        }
        prompts = [sorted(prompt) for prompt in self.negatives.prompts]
        tensors = {
            "vectors": self.negatives.vectors,
            "wording": self.wording,
            "tokens": torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64),
            "lengths": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64),
            "centre": self.centre,
        }
        if places:
            tensors["frame_means"] = torch.stack([self.frames[place].mean for place in places])
        text = json.dumps(manifest, separators=(",", ":"), ensure_ascii=False)
        with whole(Path(path)) as temporary:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary,
                metadata={"format": FORMAT, "manifest": text},
            )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path, backbone: Backbone | None = None) -> Calibration:
        """Read a calibration; with a backbone, check that it is of that one.

        Raises:
            EditFileError: the file is missing, truncated, or no calibration.
            MemoryMismatchError: it is of another model or tokenizer.
        """
        from .files import read_file

        text, tensors = read_file(Path(path), FORMAT, "calibrate again with this version")
        try:
            found = _put_together(parse(text, CALIBRATION), tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError, OverflowError) as error:
            raise EditFileError(f"Calibration.load: {path} does not hold what it must: {shown(error)}.") from None
        if backbone is not None:
            found.check(backbone)
        return found


def _put_together(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration:
    vectors, wording, centre = tensors["vectors"], tensors["wording"], tensors["centre"]
    lengths, frames = tensors["lengths"], manifest["frames"]
    means = tensors.get("frame_means", centre.new_empty(0, *centre.shape))
    m, d = vectors.shape
    floats, whole_numbers = (vectors, centre, means), (wording, lengths, tensors["tokens"])
    fits = (
        m > 0
        and centre.shape == (d,)
        and means.shape == (len(frames), d)
        and wording.shape == lengths.shape == (m,)
        and tensors["tokens"].shape == (int(lengths.sum()),)
        and all(t.dtype == torch.float32 and bool(torch.isfinite(t).all()) for t in floats)
        and all(t.dtype == torch.int64 and bool((t >= 0).all()) for t in whole_numbers)
        and bool(wording.unique().equal(torch.arange(int(wording.max()) + 1)))
        and int(wording.max()) < m
    )
    if not fits:
        raise ValueError("tensors do not fit together")
    prompts = tuple(frozenset(own.tolist()) for own in tensors["tokens"].split(lengths.tolist()))
    return Calibration(
        Gate.from_dict(manifest["gate"]),
        BankConfig.from_dict(manifest["bank"]),
        manifest["fingerprint"],
        manifest["tokenizer"],
        Reading(vectors, prompts),
        wording,
        centre,
        manifest["floor"],
        {
            Place.of(Coordinate(frame["layer"], frame["module"], 0, frame["role"])): Frame(mean, frame["scale"], None)
            for frame, mean in zip(frames, means, strict=True)
        },
    )
