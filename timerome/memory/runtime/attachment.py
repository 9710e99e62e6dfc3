"""A memory acting on a model: hooks that ask each row's candidates and add what the open ones say."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ...backbones import Backbone
from ...coordinates import Site
from ...errors import TimeromeError
from ...hooks import Hooks
from ..answer_gate import Act, Row, log_probabilities
from ..edits import Keyed
from ..naming import Named
from ..reading import Wish, read
from ..relation import asks, features
from .compiled import Allowed, Compiled
from .rows import Rows, RowTracker

# Models that are read as they are: while edits are made or asked, no memory acts on the forwards of this call.
_UNEDITED: ContextVar[frozenset[int]] = ContextVar("timerome_unedited", default=frozenset())
# Which edits the rows of the coming batches may have, by runtime: said by a thread or task for itself.
_SELECTED: ContextVar[Mapping[int, list[Allowed]]] = ContextVar("timerome_selected", default=MappingProxyType({}))  # fmt: skip  # noqa: E501
_NUMBERS = itertools.count()


@contextmanager
def unedited(model: nn.Module) -> Iterator[None]:
    """Leave the forwards inside alone, whatever is attached; those of other threads are edited as ever."""
    token = _UNEDITED.set(_UNEDITED.get() | {id(model)})
    try:
        yield
    finally:
        _UNEDITED.reset(token)


@dataclass
class _Running:
    """What is known of the forward that this thread is in.

    Attributes:
        compiled: the edits, as they were when it began.
        rows: its rows.
        allowed: which edits each may have.
        named: candidates of each row.
        acts: edits at work in each row.
        open_: rows whose candidates are still to be asked at the last block.
        epoch: of the hooks when it began.
    """

    compiled: Compiled
    rows: Rows
    allowed: list[Allowed]
    epoch: int
    named: list[list[Named]] = field(default_factory=list)
    acts: list[list[Act]] = field(default_factory=list)
    open_: list[int] = field(default_factory=list)


class Runtime:
    """One memory on one model, however often it is attached: its hooks, and what each thread is about.

    Hooks are on the model while the memory is attached anywhere and holds an edit. A forward takes the edits as they
    are when it begins; what is known of it stays with its thread.
    """

    def __init__(self, backbone: Backbone, compiled: Compiled) -> None:
        self.backbone, self.compiled = backbone, compiled
        self.number = next(_NUMBERS)
        self._lock = threading.RLock()
        self._handles: list[Attachment] = []
        self._hooks: list[Hooks] = []
        self._hooked: tuple[Site, ...] | None = None
        self._epoch = self._time = 0
        self._local = threading.local()

    def add(self, handle: Attachment) -> None:
        """Let the memory act for one more attachment."""
        with self._lock:
            self._time += not self._handles  # what was seen before is not gone on with
            self._handles.append(handle)
            try:
                self._set_hooks()
            except BaseException:
                self._handles.remove(handle)
                raise

    def drop(self, handle: Attachment) -> None:
        """An attachment leaves; with the last one the hooks do."""
        with self._lock:
            self._handles = [one for one in self._handles if one is not handle]
            self._set_hooks()

    def use(self, compiled: Compiled) -> None:
        """Take over another state of the memory, from the next forward on."""
        with self._lock:
            self.compiled = compiled
            self._set_hooks()

    def _set_hooks(self) -> None:
        wanted = self.compiled.sites if self._handles and self.compiled.edits else None
        if wanted is not None and self.compiled.gated:
            if any(hasattr(parameter, "full_tensor") for parameter in self.backbone.model.parameters()):
                raise RuntimeError(
                    "Attachment.attach: a gate runs parts of the model inside the model's own forward, which a model "
                    "sharded over processes cannot do; use strategy 'ddp' or a device_map, or a paper_memory."
                )
            wanted = tuple(dict.fromkeys((*wanted, Site(self.backbone.n_layers - 1))))
        if wanted == self._hooked:
            return
        for hooks in self._hooks:
            hooks.remove()
        self._hooks, self._hooked = [], None
        self._epoch += 1
        if wanted is None:
            return
        try:
            for hooks in (
                Hooks(self.backbone, begin=self._begin, everywhere=True),
                Hooks(self.backbone, {site: self._editing(site) for site in wanted}, everywhere=True),
            ):
                self._hooks.append(hooks)
                hooks.attach()
        except BaseException:
            for hooks in self._hooks:
                hooks.remove()
            self._hooks = []
            raise
        self._hooked = wanted

    # A forward -------------------------------------------------------------------------------------------------------

    def _begin(self, ids: Tensor, called: Mapping[str, Any]) -> None:
        """At the start of a forward: whose rows these are, and which edits they name."""
        self._local.running = None
        if id(self.backbone.model) in _UNEDITED.get():
            return
        if getattr(self._local, "time", None) != self._time:
            self._local.tracker, self._local.time = RowTracker(self.backbone), self._time
        rows = self._local.tracker.begin(ids, called)
        running = _Running(self.compiled, rows, self._allowed(len(ids)), self._epoch)
        if running.compiled.ungated:
            self._count("*", rows.step, sum(names is None or bool(names) for names in running.allowed))
        if running.compiled.gated:
            self._find(running)
        self._local.running = running

    def _allowed(self, batch: int) -> list[Allowed]:
        """Which edits each row of a forward may have."""
        sets = _SELECTED.get().get(self.number)
        if sets is None:
            return [None] * batch
        rows = self.backbone.announced.rows
        if rows is not None and max(rows, default=-1) < len(sets) and batch % len(rows) == 0:
            return [sets[i] for i in rows] * (batch // len(rows))
        if not sets or batch % len(sets):
            raise TimeromeError(
                f"Attachment.select: edits were named for {len(sets)} rows, but a forward has {batch}; name them for "
                "each batch anew."
            )
        return sets * (batch // len(sets))

    def _find(self, running: _Running) -> None:
        """Find each row's candidates, and those at work where that is known before the last block."""
        compiled, rows = running.compiled, running.rows
        _ = rows.asked  # raises where the rows are not known
        told = rows.whole.masked_fill(~rows.generated, self.backbone.mask_id)
        written = torch.isin(told, compiled.name_tokens).any(1).tolist()
        open_ = rows.masked.any(1).tolist()
        for r, notes in enumerate(rows.notes):
            if notes.get("of") is not compiled:
                known = [act for act in notes.get("acts", ()) if act.edit in compiled.number]
                notes.update(of=compiled, acts=known, prompt=None, told=None, again=[], asked=False, relation={})
            allowed = running.allowed[r]
            if notes["prompt"] is None or notes["allowed"] != allowed:
                notes["allowed"] = allowed
                prompt = rows.whole[r][~rows.generated[r]]
                # A row without an answer asks nothing, or not yet: its prompt may be cached before.
                notes["prompt"] = self._named(compiled, prompt, allowed) if rows.generated[r].any() else None
            if written[r] and open_[r]:
                own = told[r][told[r] != self.backbone.mask_id].tolist()
                if notes["told"] != own:
                    notes["told"], notes["again"] = own, self._named(compiled, torch.tensor(own), allowed)
            named = notes["prompt"] or []
            named = named + [n for n in notes["again"] if n.edit not in {m.edit for m in named}]
            acts = [a for a in notes["acts"] if allowed is None or a.edit in allowed]
            running.named.append(named)
            running.acts.append(acts)
            if open_[r] and (named or not notes["asked"]):
                running.open_.append(r)
        if compiled.relates:
            self._relate(running)
        self._ask_ahead(running)

    def _named(self, compiled: Compiled, ids: Tensor, allowed: Allowed) -> list[Named]:
        if self.backbone.tokenizer is None:
            return compiled.spelt(ids.tolist(), allowed)
        text = self.backbone.tokenizer.decode(ids[ids != self.backbone.mask_id].tolist())
        return compiled.named(str(text), allowed)

    def _relate(self, running: _Running) -> None:
        """Ask the relation heads of candidates whether a row's question is theirs; it is, or the row names them not."""
        compiled, rows = running.compiled, running.rows
        open_ = {
            r: [n for n in running.named[r] if compiled.edits[n.edit].id not in rows.notes[r]["relation"]
                and compiled.relation(n.edit) is not None]
            for r in running.open_
        }  # fmt: skip
        asked = [r for r, named in open_.items() if named]
        if asked:
            prompts = [rows.whole[r][~rows.generated[r]].tolist() for r in asked]
            with unedited(self.backbone.model), self.backbone.on_canvas(None), torch.no_grad():
                found = features(self.backbone, prompts)
            for r, ids, feature in zip(asked, prompts, found, strict=True):
                for n in open_[r]:
                    edit, head = compiled.edits[n.edit], compiled.relation(n.edit)
                    assert head is not None and edit.gate is not None
                    said = rows.notes[r]["relation"][edit.id] = asks(head, feature)
                    if said and edit.gate.alone:
                        masked = (rows.generated[r] & (rows.whole[r] == self.backbone.mask_id)).nonzero().flatten()
                        way = int(self.backbone.begins_a_line(ids))
                        self._work(running, r, [*running.acts[r], compiled.taught(n.edit, masked.tolist(), way)])
        for r in running.open_:
            passed = rows.notes[r]["relation"]
            running.named[r] = [n for n in running.named[r] if passed.get(compiled.edits[n.edit].id, True)]

    def _ask_ahead(self, running: _Running) -> None:
        """Ask in a forward without any memory what the last block of this one cannot tell.

        That is so for edits that act before the last block, and for sequences first seen half unmasked.
        """
        compiled, rows = running.compiled, running.rows
        states: list[tuple[int, Tensor, Tensor, int | None]] = []  # row, ids, masked, where it must begin
        for r in list(running.open_):
            masked = rows.generated[r] & (rows.whole[r] == self.backbone.mask_id)
            if rows.fresh[r] and running.named[r]:
                if bool(masked.any()) and not torch.equal(masked, rows.generated[r]):
                    states.append((r, rows.whole[r], rows.generated[r], None))
                else:
                    for start in compiled.resumes(rows.whole[r], masked, running.named[r]):
                        again = masked.clone()
                        again[start : int(masked.nonzero()[-1]) + 1] = True
                        states.append((r, rows.whole[r], again, start))
            at_work = {a.edit for a in running.acts[r]}
            inner = [n for n in running.named[r] if isinstance(compiled.edits[n.edit].change, Keyed)]
            if any(compiled.edits[n.edit].id not in at_work for n in inner):
                states.append((r, rows.whole[r], masked, None))
                running.open_.remove(r)
        found = self._read([(ids, masked) for _, ids, masked, _ in states])
        for (r, _, _, begun), row in zip(states, found, strict=True):
            acts = compiled.acts(row, running.named[r], running.acts[r], self.follows)
            if begun is not None:
                acts = [a for a in acts if a in running.acts[r] or a.start == begun]
            self._work(running, r, acts)
        for acts in running.acts:
            for name in {a.edit for a in acts}:
                if isinstance(compiled.edits[compiled.number[name]].change, Keyed):
                    self._count(name, rows.step, 1)

    def _read(self, states: Sequence[tuple[Tensor, Tensor]]) -> list[Row]:
        """Read rows with some of their positions masked, without any memory."""
        if not states:
            return []
        site = Site(self.backbone.n_layers - 1)
        wishes, at = [], []
        for ids, masked in states:
            state = torch.where(masked, self.backbone.mask_id, ids)
            wishes.append(Wish(state, {site: self.backbone.reads_from(masked)}))
            at.append(masked.nonzero().flatten())
        rows: list[Row | None] = [None] * len(states)
        with unedited(self.backbone.model), self.backbone.on_canvas(None), torch.no_grad():
            for i, found in read(self.backbone, wishes):
                h = found[site].float()
                where = at[i][len(at[i]) - len(h) :].to(h.device)
                rows[i] = Row(wishes[i].ids, where, log_probabilities(self.backbone, h), h)
        return [row for row in rows if row is not None]

    def follows(self, ids: Tensor, position: int) -> bool:
        """Whether the model, read without any memory, says end-of-text at a position of a row ``(P,)``."""
        where = torch.arange(len(ids)) == position
        (row,) = self._read([(ids, where)])
        return int(row.log_p[-1].argmax()) == self.backbone.eos_id

    def _work(self, running: _Running, r: int, acts: list[Act]) -> None:
        running.acts[r] = acts
        others = [a for a in running.rows.notes[r]["acts"] if a not in acts]
        running.rows.notes[r]["acts"] = [*others, *acts]

    def _editing(self, site: Site) -> Callable[[Tensor], Tensor | None]:
        """Return the hook of a site."""
        last = site == Site(self.backbone.n_layers - 1)

        def edit(h: Tensor) -> Tensor | None:
            running: _Running | None = getattr(self._local, "running", None)
            if running is None or running.epoch != self._epoch or id(self.backbone.model) in _UNEDITED.get():
                return None
            out = self._add(running, h, site)
            if last:
                out = self._place(running, out)
                self._local.running = None
            return None if out is h else out

        return edit

    def _add(self, running: _Running, h: Tensor, site: Site) -> Tensor:
        compiled, rows = running.compiled, running.rows
        chosen = [tuple(compiled.number[a.edit] for a in acts) for acts in running.acts] or [()] * len(h)
        if not any(chosen) and not compiled.ungated:
            return h
        out = compiled.add(h, site, chosen, running.allowed, rows.positions)
        if out is not h:
            self._refuse_nonfinite(h, site)
        return out

    def _place(self, running: _Running, h: Tensor) -> Tensor:
        """Ask the candidates of each row what the last block tells, and put in place what the open ones say."""
        compiled, rows = running.compiled, running.rows
        if not running.open_ and not any(running.acts):
            return h
        masked, predicts = rows.masked, rows.predicts
        columns = {
            r: masked[r].nonzero().flatten() for r in range(len(masked)) if r in running.open_ or running.acts[r]
        }
        asked = [r for r in running.open_ if not self._settled(running, r, predicts[columns[r]])]
        if asked:
            with torch.no_grad():
                hidden = torch.cat([h[r, columns[r].to(h.device)] for r in asked]).float()
                log_p = log_probabilities(self.backbone, hidden)
            if bool(torch.isnan(log_p).any()):
                self._refuse_nonfinite(hidden, Site(self.backbone.n_layers - 1))
            sizes = [len(columns[r]) for r in asked]
            for r, part, own in zip(asked, log_p.split(sizes), hidden.split(sizes), strict=True):
                row = Row(rows.whole[r], predicts[columns[r]].to(h.device), part, own)
                named, notes = running.named[r], rows.notes[r]
                if not notes["asked"]:
                    notes["asked"] = True
                    named = named + compiled.unnamed(row, named, running.allowed[r])
                if named:
                    self._work(running, r, compiled.acts(row, named, running.acts[r], self.follows))
        if not any(running.acts):
            return h
        out = h.clone()
        for r, acts in enumerate(running.acts):
            if acts and len(columns[r]):
                at = predicts[columns[r]].to(h.device)
                compiled.place(out, r, columns[r].to(h.device), at, acts)
                for name in {a.edit for a in acts}:
                    if not isinstance(compiled.edits[compiled.number[name]].change, Keyed):
                        self._count(name, rows.step, 1)
        return out

    def _settled(self, running: _Running, r: int, at: Tensor) -> bool:
        """Whether the edits at work in a row leave no place to any other."""
        return any(a.ends and bool((at >= a.start).all()) for a in running.acts[r])

    def _refuse_nonfinite(self, h: Tensor, site: Site) -> None:
        # A loop that is announced looks at its logits itself.
        if self.backbone.announced.loop is None and not bool(torch.isfinite(h).all()):
            raise FloatingPointError(
                f"EditMemory: activations at {site} are not finite; check the model's weights, dtype and inputs."
            )

    def _count(self, name: str, step: int, n: int) -> None:
        with self._lock:
            for handle in self._handles:
                handle.counts[name, step] += n


class Attachment:
    """Context manager inside which a memory edits every forward of a model, in every thread.

    The same memory attached several times, one within the other or from several threads, acts once, until the last
    attachment leaves. Where it holds no edit, no hook is on the model.

    Attributes:
        counts: rows edited while attached, by edit id (``"*"`` where edits act whatever is asked) and denoising step,
            counted from 0 for each new batch.

    Example:
        >>> import timerome as tr
        >>> backbone = tr.load("testbed")
        >>> fact = tr.Fact(id="egypt", prompt="The capital city of Egypt is", subject="Egypt", object="Cairo")
        >>> memory = tr.EditMemory(backbone)
        >>> _ = memory.replace(fact, "Lagos")
        >>> with memory.attached() as run:
        ...     tr.generate(backbone, fact.prompt, canvas=4), sorted(run.hits)
        ('Lagos', ['egypt'])
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._on = False
        self.counts: Counter[tuple[str, int]] = Counter()

    @property
    def backbone(self) -> Backbone:
        """The model it acts on."""
        return self._runtime.backbone

    @property
    def hits(self) -> Counter[str]:
        """Rows edited, by edit id."""
        return _summed(self.counts, 0)

    @property
    def hits_by_step(self) -> Counter[int]:
        """Rows edited, by denoising step."""
        return _summed(self.counts, 1)

    def attach(self) -> Attachment:
        """Let the memory act; :meth:`remove` undoes it.

        Raises:
            RuntimeError: it is attached already; or the model is sharded and edits are gated.
        """
        if self._on:
            raise RuntimeError("Attachment.attach: this one is attached already; remove() it first.")
        self._runtime.add(self)
        self._on = True
        return self

    def remove(self) -> None:
        """Leave; may be called twice."""
        self._on = False
        self._runtime.drop(self)
        self.select(None)

    def __enter__(self) -> Attachment:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def select(self, sets: Sequence[Iterable[str] | str | None] | None) -> None:
        """Say which edits each row of the coming batches may have; None, and at first, is all of them.

        It holds for the thread or task that says it. A gate still decides whether an edit that a row may have acts.
        Rows are those of the batch as the loop has it: the prompts given to :func:`timerome.generate`, the facts given
        to ``evaluate``, which put them into batches of their own and say so, or the rows of a forward in other loops. A
        forward over a multiple of them, as in classifier-free guidance, repeats them.

        Args:
            sets: for each row the ids of edits, or one id; None for all, empty for none.

        Raises:
            KeyError: no edit in force has such an id.
        """
        chosen: list[Allowed] | None = None
        if sets is not None:
            several = [[ids] if isinstance(ids, str) else ids for ids in sets]
            chosen = [None if ids is None else frozenset(ids) for ids in several]
        known = self._runtime.compiled.number.keys()
        for i, ids in enumerate(chosen or ()):
            if ids is not None and not ids <= known:
                raise KeyError(
                    f"Attachment.select: row {i} names {sorted(ids - known)[:5]}, but no such edit is in force; there "
                    f"are {', '.join(sorted(known)[:10]) or 'none'}."
                )
        said = {n: own for n, own in _SELECTED.get().items() if n != self._runtime.number}
        if chosen is not None:
            said[self._runtime.number] = chosen
        _SELECTED.set(said)

    def __repr__(self) -> str:
        return f"Attachment({'on' if self._on else 'off'}, {self.counts.total()} rows edited)"


def _summed(counts: Counter[tuple[str, int]], by: int) -> Counter[Any]:
    """Sum counts of (edit id, step) over the other of the two."""
    total: Counter[Any] = Counter()
    for key, n in list(counts.items()):
        total[key[by]] += n
    return total
