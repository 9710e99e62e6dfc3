"""A loaded model, its tokenizer and its architecture, behind one interface."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..coordinates import MODULES, Site
from .architectures import Architecture, Inputs, resolve
from .checksums import parts_of, whole


@dataclass(frozen=True)
class Announcement:
    """What is said of the forwards of one backbone, by whoever runs them.

    Attributes:
        canvas: the positions that are generated, ``(B, L)``; None where nobody says.
        loop: stands for the running loop; None where nobody says.
        rows: which row of the outermost caller's batch each row is; None where nobody says.
    """

    canvas: Tensor | None = None
    loop: object | None = None
    rows: tuple[int, ...] | None = None


_NOTHING = Announcement()
# Tokenizer -> what its vocabulary was hashed as, and when that is no longer true. Not every tokenizer can be a key.
_vocabularies: dict[int, tuple[ref[Any], tuple[Any, ...], str]] = {}
# An announcement belongs to the call that makes it: other threads and tasks do not see it.
_ANNOUNCED: ContextVar[Mapping[int, Announcement]] = ContextVar("timerome_announced", default=MappingProxyType({}))


class Backbone:
    """A masked diffusion language model that can be traced and edited. Made by :func:`timerome.wrap` or ``load``.

    The model's weights are never changed. Letters in shapes: B batch, L length, d hidden size, V vocabulary.

    Attributes:
        model: the wrapped model, in eval mode.
        tokenizer: its tokenizer; needed for anything that starts from text.
        architecture: where its parts are.
        mask_id: id of the mask token.
        eos_id: id of the end-of-text token, or None.
        padding: whether a padding mask is honoured: by the record, and by what the model did when it was wrapped.
        mended: what was put right in the model when it was wrapped, in words.

    Raises:
        ValueError: the mask token's id is unknown or outside the embedding, or the tokenizer's ids exceed the head's.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        architecture: Architecture,
        mask_token_id: int | None = None,
        name: str | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.architecture = architecture
        self.name = name or type(model).__name__
        config = getattr(model, "config", None)
        found = {
            "mask_token_id=...": mask_token_id,
            "the config": getattr(config, "mask_token_id", None),
            "the tokenizer": getattr(tokenizer, "mask_token_id", None),
            f"the {architecture.name} record": architecture.mask_token_id,
        }
        self.mask_source, mask_id = next(((k, int(v)) for k, v in found.items() if v is not None), ("", -1))
        if mask_id < 0:
            raise ValueError(
                f"wrap: no mask token id in the config, the tokenizer or the {architecture.name} record; "
                "pass mask_token_id=..."
            )
        self.mask_id: int = mask_id
        self.mended: tuple[str, ...] = ()
        eos = getattr(tokenizer, "eos_token_id", None)
        self.eos_id: int | None = eos if eos is not None else getattr(config, "eos_token_id", None)
        self._blocks = self._part(architecture.blocks)
        self.padding = architecture.masks != "none"
        self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        """Refuse ids that the embedding or the head has no row for; rows without a token are common and harmless."""
        if self.mask_id >= self.vocab_size:
            raise ValueError(
                f"wrap: the mask token's id {self.mask_id} (from {self.mask_source}) is outside the embedding of "
                f"{self.name}, which has {self.vocab_size} rows; pass the right mask_token_id=..."
            )
        head = getattr(self.head, "weight", None)
        rows = self.vocab_size if head is None else min(self.vocab_size, head.shape[0])
        vocab = self.tokenizer.get_vocab() if hasattr(self.tokenizer, "get_vocab") else {}
        largest = max(vocab.values(), default=-1)
        if largest >= rows:
            raise ValueError(
                f"wrap: the tokenizer has ids up to {largest}, but {self.name} has an embedding of {self.vocab_size} "
                f"and a head of {rows if head is None else head.shape[0]} rows; pass the tokenizer the model was "
                "trained with."
            )

    def _part(self, path: str) -> Any:
        part = resolve(self.model, path)
        assert part is not None, path  # `recognise` has checked every path
        return part

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    @property
    def embedding(self) -> nn.Module:
        """The token embedding; its first positional input is the ids of the running forward."""
        return self._part(self.architecture.embedding)

    @property
    def hidden_size(self) -> int:
        """d, the width of the residual stream."""
        return int(next(self.embedding.parameters()).shape[-1])

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the embedding (it may exceed the tokenizer's entries)."""
        return int(next(self.embedding.parameters()).shape[0])

    @property
    def device(self) -> torch.device:
        """Where the embedding lives."""
        return next(self.embedding.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The embedding's dtype."""
        return next(self.embedding.parameters()).dtype

    @property
    def shift(self) -> int:
        """0 where the logits at i predict position i, 1 where those at i - 1 do."""
        return self.architecture.shift

    def module(self, site: Site) -> nn.Module:
        """Return the module whose output is ``site``.

        Raises:
            ValueError: the layer or the module does not exist.
        """
        if site.module not in MODULES:
            raise ValueError(f"Backbone.module: expected module in {MODULES}, got {site.module!r}.")
        if not 0 <= site.layer < self.n_layers:
            raise ValueError(
                f"Backbone.module: {self.name} has layers 0 to {self.n_layers - 1}, got layer {site.layer}."
            )
        block: nn.Module = self._blocks[site.layer]
        if site.module == "block":
            return block
        part = resolve(block, getattr(self.architecture, site.module))
        assert part is not None
        return part

    def gate(self, site: Site) -> tuple[nn.Module, int, int] | None:
        """Return what multiplies ``site``'s module output before it joins the residual stream, or None.

        Returns:
            The module that computes it, the number of equal parts of its output, and which of them it is.
        """
        gates = self.architecture.gates
        if gates is None or site.module == "block":
            return None
        module = resolve(self._blocks[site.layer], gates.module)
        assert module is not None
        return module, gates.chunks, gates.attn if site.module == "attn" else gates.mlp

    def sites(self, modules: Sequence[str] = MODULES) -> list[Site]:
        """Every site of the given modules, by layer."""
        return [Site(layer, m) for layer in range(self.n_layers) for m in modules]  # type: ignore[arg-type]

    def forward(self, ids: Tensor, *, attention_mask: Tensor | None = None, timestep: Tensor | None = None) -> Tensor:
        """Run the model on ids ``(B, L)``; return the raw logits ``(B, L, V)``, not shifted.

        Args:
            ids: token ids, int64, on the model's device.
            attention_mask: boolean or 0/1; ``(B, L)``, True at real tokens, or ``(B, L, L)``, True where position i
                attends to position j. None: every position attends to every other.
            timestep: noise level ``(B,)`` for backbones that are conditioned on it; others are not given it.

        Raises:
            ValueError: ids are not 2-D, or longer than the context; or the backbone cannot honour the mask.
        """
        if ids.dim() != 2:
            raise ValueError(f"Backbone.forward: expected ids of shape (B, L), got {tuple(ids.shape)}.")
        if ids.shape[1] > self.max_length:
            raise ValueError(
                f"Backbone.forward: {self.name} has a context of {self.max_length} tokens, got {ids.shape[1]}; "
                "shorten the prompt or the canvas."
            )
        mask = None if attention_mask is None else self._mask(ids, attention_mask)
        out = self.architecture.call(self.model, Inputs(ids, mask, timestep))
        logits = out if isinstance(out, Tensor) else out.logits if hasattr(out, "logits") else out[0]
        return logits

    def _mask(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        """Bring an attention mask into the form the record's call takes; None where it hides nothing."""
        batch, length = ids.shape
        if mask.shape not in ((batch, length), (batch, length, length)):
            raise ValueError(
                f"Backbone.forward: expected attention_mask of shape {(batch, length)} or {(batch, length, length)}, "
                f"got {tuple(mask.shape)}."
            )
        mask = mask.to(ids.device).bool()
        if bool(mask.all()):
            return None
        masks = self.architecture.masks
        if masks == "none" or (masks == "padding" and mask.dim() == 3) or not self.padding:
            raise ValueError(
                f"Backbone.forward: {self.name} ({self.architecture.name}) cannot honour this attention mask; "
                "give it sequences of one length"
                + (", without a pattern of which position sees which." if mask.dim() == 3 else ", without padding.")
            )
        if masks == "padding":
            return mask
        return (mask if mask.dim() == 3 else mask[:, None].expand(batch, length, length))[:, None]

    def logits(
        self,
        ids: Tensor,
        canvas: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
    ) -> Tensor:
        """Return float32 logits ``(B, L, V)`` in which position i is predicted at i, whatever the model's shift.

        Args:
            ids: token ids ``(B, L)``, int64, on the model's device.
            canvas: True at the positions that are being generated, masked or not, ``(B, L)``. Announced to whatever is
                attached (see :meth:`on_canvas`); None leaves it to be inferred from the mask tokens.
            attention_mask: as for :meth:`forward`.
            timestep: as for :meth:`forward`.
        """
        with self.on_canvas(canvas):
            logits = self._without_mask(self.forward(ids, attention_mask=attention_mask, timestep=timestep).float())
        if self.shift:
            logits = torch.cat([logits[:, : self.shift], logits[:, : -self.shift]], dim=1)
        return logits

    def _without_mask(self, logits: Tensor) -> Tensor:
        """Leave the mask token out of what is predicted, where the model does."""
        if not self.architecture.excludes_mask:
            return logits
        return logits.index_fill(-1, torch.tensor([self.mask_id], device=logits.device), -torch.inf)

    @contextmanager
    def _announce(self, **said: Any) -> Iterator[None]:
        before = _ANNOUNCED.get()
        token = _ANNOUNCED.set({**before, id(self): replace(before.get(id(self), _NOTHING), **said)})
        try:
            yield
        finally:
            _ANNOUNCED.reset(token)

    @property
    def announced(self) -> Announcement:
        """What the present call, thread or task has said of this backbone's forwards."""
        return _ANNOUNCED.get().get(id(self), _NOTHING)

    @contextmanager
    def on_canvas(self, canvas: Tensor | None) -> Iterator[None]:
        """Announce which positions ``(B, L)`` are generated, for the forwards inside."""
        with self._announce(canvas=canvas):
            yield

    @contextmanager
    def on_loop(self, loop: object) -> Iterator[None]:
        """Announce that the forwards inside are steps of a loop, for which an object stands that is its alone.

        Its forwards are, one after the other, of the same sequences in the same rows, so that these need not be
        recognised by their ids; and it sees for itself whether the logits are finite, as hooks inside do not.
        """
        with self._announce(loop=loop):
            yield

    @contextmanager
    def on_rows(self, rows: Sequence[int]) -> Iterator[None]:
        """Announce which of the caller's rows the forwards inside are about, in their order.

        Functions that put what they are given into batches of their own announce it, so that what is said row by row,
        such as :meth:`timerome.memory.Attachment.select`, finds them. Within another announcement, the rows are those
        of the rows announced around it.
        """
        before = self.announced.rows
        with self._announce(rows=tuple(rows) if before is None else tuple(before[i] for i in rows)):
            yield

    def reads_from(self, positions: Tensor) -> Tensor:
        """Return where the activations are that predict the tokens at boolean ``positions`` ``(..., L)``."""
        if not self.shift:
            return positions
        moved = torch.zeros_like(positions)
        moved[..., : -self.shift] = positions[..., self.shift :]
        moved[..., 0] |= positions[..., 0]
        return moved

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the unembedding."""
        return self._part(self.architecture.final_norm)

    @property
    def head(self) -> nn.Module:
        """The unembedding."""
        return self._part(self.architecture.head)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Return float32 logits of residual-stream activations ``(..., d)``: final norm, then unembedding."""
        if self.architecture.unembed is not None:
            return self.architecture.unembed(self.model, hidden.to(self.dtype)).float()
        return self.head(self.final_norm(hidden.to(self.dtype))).float()

    def predictions(self, hidden: Tensor) -> Tensor:
        """Return the float32 distribution ``(..., V)`` that the last block's output ``(..., d)`` stands for."""
        return self._without_mask(self.unembed(hidden)).softmax(-1)

    @property
    def max_length(self) -> int:
        """Longest sequence the model's config allows; very large where it does not say."""
        config = getattr(self.model, "config", None)
        for name in ("max_position_embeddings", "max_sequence_length", "model_max_length", "model_length"):
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                return value
        return 1 << 30

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens.

        Raises:
            RuntimeError: the backbone was wrapped without a tokenizer.
        """
        if self.tokenizer is None:
            raise RuntimeError("Backbone.encode: this backbone has no tokenizer; wrap(model, tokenizer) with one.")
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def begins_a_line(self, prompt: Sequence[int]) -> bool:
        """Whether what follows a prompt has no blank before it: the prompt ends in white space, or is empty."""
        if not len(prompt) or self.tokenizer is None:
            return not len(prompt)
        return str(self.tokenizer.decode([int(prompt[-1])]))[-1:].isspace()

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of ``ids`` up to the first end-of-text token, special tokens left out."""
        if self.tokenizer is None:
            raise RuntimeError("Backbone.decode: this backbone has no tokenizer; wrap(model, tokenizer) with one.")
        ids = [int(i) for i in ids]
        if self.eos_id is not None and self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def state_digest(self) -> str:
        """SHA-256 over the name, shape, dtype and bytes of every parameter and buffer."""
        digest = hashlib.sha256()
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Identify this model's weights and layout: architecture, sizes, and all that a checkpoint of it would hold.

        So weights in buffers count (GPTQ, int8), and tables that a forward leaves behind do not. Every number counts:
        see :func:`timerome.backbones.checksums.checksum`. Independent of the float dtype the model was loaded in where
        that dtype holds the values exactly, and of the device. Never cached: weights may be loaded or trained after
        wrapping.

        Raises:
            TimeromeError: weights are on the meta device, where there are no numbers.
        """
        digest = hashlib.sha256(f"{self.architecture.name}/{self.n_layers}/{self.hidden_size}".encode())
        for part in parts_of(self.model):
            digest.update(part)
        return digest.hexdigest()[:16]

    def tokenizer_digest(self) -> str:
        """Hash of the tokenizer's vocabulary, or ``"none"``. Made anew when tokens were added."""
        tokenizer = self.tokenizer
        if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
            return "none"
        added = getattr(tokenizer, "get_added_vocab", None)
        state = None if added is None else (len(tokenizer), tuple(sorted(added().items())))
        known = _vocabularies.get(id(tokenizer))
        if state is None or known is None or known[0]() is not tokenizer or known[1] != state:
            digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
            if state is None:
                return digest
            known = _vocabularies[id(tokenizer)] = (ref(tokenizer), state, digest)
        return known[2]

    def __repr__(self) -> str:
        return f"Backbone({self.name}: {self.architecture.name}, {self.n_layers} layers, d = {self.hidden_size})"
