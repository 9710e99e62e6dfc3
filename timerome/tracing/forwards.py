"""Batched forwards of many restorations, in which a row begins only at the layer where it is first restored.

What lies below a restoration is the same as without it. So one row runs from the start for each state (tokens and
noise), and each restoration of that state joins the batch, as a copy of that row, at the output of the block before its
site: with L layers, restoring block l costs (L - 1 - l) / L of a forward. Only the canvas is unembedded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Site
from ..hooks import Hooks, OutputHook


@dataclass(frozen=True)
class Patch:
    """One output to be replaced at some positions.

    Attributes:
        site: whose output.
        where: at which positions, boolean ``(L,)``.
        value: gives the output to take, ``(L, d)``; called when that site runs, so that one at a time is in memory.
    """

    site: Site
    where: Tensor
    value: Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One forward that is wanted.

    Attributes:
        state: rows of one state have the same ids and noise.
        ids: ``(L,)``.
        noise: added to the embeddings, ``(L, d)``, or None.
        patches: what is restored; none leaves the state's own run.
    """

    state: int
    ids: Tensor
    noise: Tensor | None = None
    patches: tuple[Patch, ...] = ()

    @property
    def joins_after(self) -> int:
        """The last block whose output this row shares with its state's own run; -1 is none."""
        return min(_shared_blocks(patch.site) for patch in self.patches) if self.patches else -1


def fitting(device: torch.device, length: int) -> int:
    """How many rows of so many positions make a good batch.

    On a CPU, 1024 positions: enough that a product is no slower a row, and few enough that what a layer reads and
    writes stays in the caches (at 8192 positions the testbed took up to 1.4 times as long). Elsewhere 32 rows.

    Example:
        >>> fitting(torch.device("cpu"), 60)
        17
    """
    return max(2, 1024 // length) if device.type == "cpu" else 32


def _shared_blocks(site: Site) -> int:
    return site.layer if site.module == "block" else site.layer - 1


@dataclass
class Batch:
    """Rows of one forward: ``roots`` run from the start, ``joiners`` begin later, as a copy of one of them.

    Attributes:
        roots: (index among the wanted rows or None, row).
        joiners: (index, row, its root).
    """

    roots: list[tuple[int | None, Row]] = field(default_factory=list)
    joiners: list[tuple[int, Row, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.roots) + len(self.joiners)

    def cost(self, n_layers: int) -> float:
        """What the forward costs, in forwards of one row."""
        return len(self.roots) + sum((n_layers - 1 - row.joins_after) / n_layers for _, row, _ in self.joiners)


def batches(rows: Sequence[Row], n_layers: int, size: int, join: bool) -> Iterator[Batch]:
    """Put rows into batches of at most ``size`` (at least 2 where rows join), rows of one state side by side."""
    by_state: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_state.setdefault(row.state, []).append(i)
    batch = Batch()
    for members in by_state.values():
        own = [i for i in members if not rows[i].patches]
        late = [i for i in members if join and rows[i].joins_after >= 0]
        saved = sum((1 + rows[i].joins_after) / n_layers for i in late)
        if not own and saved <= 1:
            late = []  # a run of the state's own would cost more than joining it saves
        joining = set(late)
        for i in members:
            if i not in joining:
                if len(batch) >= size:
                    yield batch
                    batch = Batch()
                batch.roots.append((i, rows[i]))
        root: int | None = None
        if late and own and batch.roots:
            root = next((n for n, (i, _) in enumerate(batch.roots) if i in own), None)
        for i in late:
            if root is None or len(batch) >= size:
                if len(batch) + 2 > max(size, 2):
                    yield batch
                    batch = Batch()
                root = len(batch.roots)
                batch.roots.append((None, Row(rows[i].state, rows[i].ids, rows[i].noise)))
            batch.joiners.append((i, rows[i], root))
    if len(batch):
        yield batch


def run_batch(
    backbone: Backbone, batch: Batch, canvas: Tensor, reads: Callable[[Tensor], Tensor]
) -> tuple[list[int], Tensor, Tensor]:
    """Run one batch.

    Args:
        backbone: the model.
        batch: its rows.
        canvas: the positions that are generated, boolean ``(L,)``.
        reads: which positions of states ``(rows, L)`` are to be predicted, boolean ``(rows, L)``.

    Returns:
        Indices of the wanted rows; at which positions each of them was predicted, ``(rows, L)``; and the logits there,
        row after row, float32 or wider, ``(n, V)``.
    """
    joiners = sorted(batch.joiners, key=lambda joiner: joiner[1].joins_after)
    rows = [row for _, row in batch.roots] + [row for _, row, _ in joiners]
    patched: dict[Site, list[tuple[int, Patch]]] = {}
    joining: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        for patch in row.patches:
            patched.setdefault(patch.site, []).append((place, patch))
    for _, row, root in joiners:
        joining.setdefault(row.joins_after, []).append(root)
    sites = dict.fromkeys([*patched, *(Site(layer) for layer in joining)])
    outputs = {
        site: _site_hook(joining.get(site.layer, []) if site.module == "block" else [], patched.get(site, []))
        for site in sites
    }
    noises = [row.noise for _, row in batch.roots]
    ids = torch.stack([row.ids for row in rows])
    indices = [i for i, _ in batch.roots] + [i for i, _, _ in joiners]
    wanted = torch.tensor([i is not None for i in indices], device=ids.device)
    where = reads(ids) & wanted[:, None]
    with Hooks(backbone, outputs, _noise_hook(noises)):
        logits = logits_at(backbone, ids[: len(batch.roots)], canvas, where)
    return [i for i in indices if i is not None], where[wanted], logits


def logits_at(backbone: Backbone, ids: Tensor, canvas: Tensor, where: Tensor) -> Tensor:
    """Return the logits ``(n, V)`` that predict the n positions ``where`` says, float32 or wider.

    No other position is unembedded.

    Args:
        backbone: the model.
        ids: what it is given, ``(B, L)``.
        canvas: the positions that are generated, boolean ``(L,)``.
        where: boolean ``(rows, L)``; rows that join the forward come after the B.
    """
    row, position = where.nonzero(as_tuple=True)
    position = (position - backbone.shift).clamp_min(0)
    narrowed = False

    def narrow(module: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal narrowed
        narrowed = True
        return args[0][row.to(args[0].device), position.to(args[0].device)][None], *args[1:]

    # A head that is a function of the embedding's weight is never called as a module: then all logits come back.
    handle = backbone.head.register_forward_pre_hook(narrow)
    try:
        with backbone.on_canvas(canvas.expand_as(ids)):
            logits = backbone.forward(ids)
    finally:
        handle.remove()
    logits = logits[0] if narrowed else logits[row.to(logits.device), position.to(logits.device)]
    if backbone.architecture.excludes_mask:
        logits = logits.index_fill(-1, torch.tensor([backbone.mask_id], device=logits.device), -torch.inf)
    return logits if logits.dtype == torch.float64 else logits.float()


def can_join(backbone: Backbone, ids: Tensor, canvas: Tensor) -> bool:
    """Whether rows may join a running forward of this model, found by trying it.

    Not where other hooks are on the model (a memory's address belongs to whole rows), nor where a block takes anything
    whose size is the batch's, such as a mask a row.

    Args:
        backbone: the model.
        ids: a state, ``(L,)``.
        canvas: boolean ``(L,)``.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in backbone.model.modules()):
        return False
    other = ids.clone()
    other[0] = backbone.mask_id if int(ids[0]) != backbone.mask_id else 0
    nowhere = torch.zeros_like(canvas)
    roots: list[tuple[int | None, Row]] = [(0, Row(0, ids)), (1, Row(1, other))]
    joiners: list[tuple[int, Row, int]] = []
    for layer in range(backbone.n_layers):
        for root, state in ((0, ids), (1, other)):
            # Replaced at no position: so it has to give what its root gives.
            patch = Patch(Site(layer), nowhere, lambda state=state: state[:, None])  # type: ignore[misc]
            joiners.append((2 + len(joiners), Row(root, state, None, (patch,)), root))
    try:
        found, _, flat = run_batch(backbone, Batch(roots, joiners), canvas, canvas.expand_as)
    except (RuntimeError, ValueError, IndexError):
        return False
    logits = rearrange(flat, "(row place) v -> row place v", row=len(found))
    source = torch.tensor([0, 1, *(root for _, _, root in joiners)])
    expected = logits[:2][source[torch.tensor(found)].to(logits.device)]
    scale = logits[:2].abs().amax()
    return bool((logits - expected).abs().amax() <= 1e-3 * scale)


def _site_hook(roots: Sequence[int], patches: Sequence[tuple[int, Patch]]) -> OutputHook:
    def change(output: Tensor) -> Tensor:
        output = torch.cat([output, output[torch.tensor(roots, device=output.device)]]) if roots else output.clone()
        by_value: dict[Callable[[], Tensor], list[tuple[int, Tensor]]] = {}
        for place, patch in patches:
            by_value.setdefault(patch.value, []).append((place, patch.where))
        for value, places in by_value.items():
            where = torch.stack([positions for _, positions in places]).to(output.device)
            row, position = where.nonzero(as_tuple=True)
            if len(row):
                place_of = torch.tensor([place for place, _ in places], device=output.device)
                output[place_of[row], position] = value().to(output)[position]
        return output

    return change


def _noise_hook(noises: Sequence[Tensor | None]) -> Callable[[Tensor, Tensor], Tensor] | None:
    present = next((noise for noise in noises if noise is not None), None)
    if present is None:
        return None
    stacked = torch.stack([torch.zeros_like(present) if noise is None else noise for noise in noises])

    def add(ids: Tensor, embedded: Tensor) -> Tensor:
        return embedded + stacked.to(embedded)

    return add
