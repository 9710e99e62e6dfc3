"""The edit memory: changed by verbs, attached without touching the weights."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..coordinates import Site
from ..errors import MemoryMismatchError, TimeromeError
from ..facts import Fact, FactError, FactSet
from .answer_gate import ROOM, UNLIKELY, Said, gate_of, questions
from .edits import REFUSAL, Edit, Keyed, Operation, Placed
from .methods import At, ByPlace, Method, Ridge, ask
from .relation import relation_head
from .runtime.attachment import Attachment, Runtime, unedited
from .runtime.compiled import Compiled
from .state import MemoryState, OnConflict, Planned, added, merged, plan, undone
from .systems import Systems

if TYPE_CHECKING:
    from .explain import Explanation
    from .ledger import Ledger

Facts = Fact | Iterable[Fact]


class EditMemory:
    """Edits of what a masked diffusion model knows, kept outside its weights. There is nothing to calibrate.

    An edit acts exactly where the unedited model is about to give the answer that the edit replaces, to a text that
    names its subject, in any wording; all else is left alone. Each change is a transaction: all of it happens, or
    nothing.

    Args:
        model: the backbone, from :func:`timerome.load` or :func:`timerome.wrap`; it is held as long as the memory is.

    Attributes:
        state: what the memory is, as a value that never changes; each verb puts another in its place.
        ledger: where changes are recorded; None records nothing.

    Raises:
        TimeromeError: ``model`` is no backbone.

    Example:
        >>> import timerome as tr
        >>> model = tr.load("testbed")
        >>> fact = tr.Fact(id="egypt", prompt="The capital city of Egypt is", subject="Egypt", object="Cairo")
        >>> memory = tr.EditMemory(model)
        >>> edit = memory.replace(fact, "Lagos")
        >>> with memory.attached():
        ...     tr.generate(model, "What is the capital of Egypt? It is the city of", canvas=16)
        'Lagos'
        >>> memory.undo(edit)
        >>> len(memory)
        0
    """

    def __init__(self, model: Backbone) -> None:
        if not isinstance(model, Backbone):
            raise TimeromeError(
                f"EditMemory: expected a Backbone, got {type(model).__name__}; make it one with "
                "timerome.wrap(model, tokenizer)."
            )
        self._become(MemoryState(model.fingerprint(), model.tokenizer_digest()), model)

    def _become(self, state: MemoryState, model: Backbone | None) -> None:
        self.state, self._model, self.ledger = state, model, _no_ledger()
        self._systems = Systems()
        self._runtimes: weakref.WeakKeyDictionary[nn.Module, Runtime] = weakref.WeakKeyDictionary()

    @classmethod
    def of_state(cls, state: MemoryState, model: Backbone | None = None) -> EditMemory:
        """Return a memory that is a state; with a model, check that it belongs to it.

        Raises:
            MemoryMismatchError: it was made on another model or tokenizer.
        """
        memory = cls.__new__(cls)
        memory._become(state, None)
        if model is not None:
            memory._model = memory._belonging(model)
        return memory

    @classmethod
    def build(cls, model: Backbone, facts: Facts, *, method: Method | None = None) -> EditMemory:
        """Return a new memory with some edits: facts with a ``new_object`` are replaced, others forgotten.

        Args:
            model: the backbone.
            facts: one or several.
            method: how what is added is computed, see :meth:`replace`.

        Raises:
            FactError: there is no fact, or one does not fit.
        """
        memory, facts = cls(model), _several(facts)
        planned = plan(memory.state, facts, "error")
        says = [fact.new_object or REFUSAL for fact in facts]
        made = memory._make(model, planned, says, None, method, None)
        ops: list[Operation] = ["forget" if fact.new_object is None else "replace" for fact in facts]
        memory._commit(added(memory.state, [replace(e, operation=op) for e, op in zip(made, ops, strict=True)]))
        return memory

    # Verbs -----------------------------------------------------------------------------------------------------------

    def replace(
        self,
        facts: Facts,
        answer: str | None = None,
        *,
        method: Method | None = None,
        at: At = None,
        threshold: float | None = None,
        on_conflict: OnConflict = "replace",
    ) -> Any:
        """Have facts answered otherwise: with ``answer``, or each with its own ``new_object``.

        Args:
            facts: one or several; all or none are edited.
            answer: what to say instead, for all of them.
            method: how what is added is computed: :class:`ByPlace` (default), or :class:`Ridge`.
            at: where, for a method that leaves it open: a layer, a site, a coordinate, several of them, a mapping of
                these by fact id or group, or a function of the fact. ``trace.best()`` gives one.
            threshold: the edit acts where the present answer is likelier than this, in nats a token; by default two
                nats less likely than in the fact's own question.
            on_conflict: where an edit in force is about the same subject and relation: ``"replace"`` it (it comes back
                if the new one is undone), ``"keep"`` it, or ``"error"``.

        Returns:
            The :class:`Edit` of a single fact; a list of them, in order, of several.

        Raises:
            FactError: a fact has no new answer, or does not fit.
            EditConflictError: facts conflict and ``on_conflict`` says so, or with one another; nothing was changed.
            MemoryMismatchError: the model is no longer the one the memory was made on.

        Example:
            >>> import timerome as tr
            >>> model = tr.load("testbed")
            >>> facts = tr.datasets.bundled("relations")
            >>> str(tr.EditMemory(model).replace(facts[0], "Lagos"))
            'country_capital_city-0: The capital city of Nigeria is Abuja → Lagos'
        """
        several = _several(facts)
        says = [fact.new_object if answer is None else answer for fact in several]
        if without := [fact.id for fact, text in zip(several, says, strict=True) if text is None]:
            raise FactError(
                f"EditMemory.replace: facts {without[:5]} have no new_object; give an answer, or forget() them."
            )
        return self._change("replace", facts, says, method, at, threshold, on_conflict)

    def forget(
        self,
        facts: Facts,
        *,
        answer: str | None = REFUSAL,
        method: Method | None = None,
        at: At = None,
        threshold: float | None = None,
        on_conflict: OnConflict = "replace",
    ) -> Any:
        """Have facts left unsaid; other arguments as in :meth:`replace`.

        Args:
            facts: one or several; all or none are forgotten.
            answer: what to say instead; None is what the model would say if it were not asked, by :class:`Ridge`.
            method: by default :class:`ByPlace`, or with ``answer=None`` ``Ridge(targets="null")``.
            at: where.
            threshold: of the gate.
            on_conflict: where an edit in force is about the same.
        """
        return self._change("forget", facts, [answer] * len(_several(facts)), method, at, threshold, on_conflict)

    def teach(
        self, facts: Facts, *, method: Method | None = None, at: At = None, on_conflict: OnConflict = "replace"
    ) -> Any:
        """Teach facts that the model does not know: each is answered with its ``new_object``, or else its ``object``.

        There is no present answer to watch for: what a model says of what it does not know, it says of much else. A
        classifier of the question, solved in closed form from the fact's wordings and a bank of other questions about
        the subject, tells when the edit acts. Arguments as in :meth:`replace`.

        Example:
            >>> import timerome as tr
            >>> model = tr.load("testbed")
            >>> fact = tr.Fact(id="z", prompt="The capital city of Zubrowka is", subject="Zubrowka", object="Lutz")
            >>> memory = tr.EditMemory(model)
            >>> _ = memory.teach(fact)
            >>> with memory.attached():
            ...     tr.generate(model, "The capital city of Zubrowka is", canvas=8)
            'Lutz'
        """
        says = [fact.new_object or fact.object for fact in _several(facts)]
        return self._change("teach", facts, says, method, at, None, on_conflict)

    def undo(self, *edits: Edit | str | Iterable[Edit | str]) -> None:
        """Take edits back, whatever came after them; what they superseded acts again. No model is needed.

        Args:
            edits: edits, or their ids; lists of them will do.

        Raises:
            KeyError: there is no such edit (also where it was undone before); nothing was changed.
        """
        several = [one for e in edits for one in ([e] if isinstance(e, (Edit, str)) else e)]
        ids = [one if isinstance(one, str) else one.id for one in several]
        gone = [edit for edit in self.state.history if edit.id in ids]
        self._commit(undone(self.state, ids), "undo", gone)

    def merge(self, other: EditMemory, *, on_conflict: OnConflict = "error") -> tuple[Edit, ...]:
        """Take over another memory's edits in force; one transaction. No model is needed.

        Returns:
            The edits taken over; those that both have are left as they are.

        Raises:
            MemoryMismatchError: the memories were made on different models; nothing was changed.
            EditConflictError: edits conflict and ``on_conflict`` is ``"error"``; nothing was changed.
        """
        state, taken = merged(self.state, other.state, on_conflict)
        if taken:
            self._commit(state, "merge", taken)
        return taken

    def diff(self, other: EditMemory) -> Difference:
        """Return how another memory differs from this one; false where it does not."""
        mine, theirs = ({edit.id: edit for edit in memory.edits} for memory in (self, other))
        about = [name for name in ("fingerprint", "tokenizer") if getattr(self, name) != getattr(other, name)]
        return Difference(
            added=tuple(edit for name, edit in theirs.items() if name not in mine),
            removed=tuple(edit for name, edit in mine.items() if name not in theirs),
            changed=tuple(
                (edit, theirs[name]) for name, edit in mine.items() if name in theirs and not _same(edit, theirs[name])
            ),
            about=tuple(about),
        )

    def rebase(self, model: Backbone) -> EditMemory:
        """Return a memory with the same edits, made anew on another model from their facts.

        Raises:
            FactError: a fact does not fit that model.
        """
        memory, history = EditMemory(model), []
        for edit in self.state.history:
            planned = [Planned(edit.fact, edit.id, edit.supersedes)]
            threshold = None if edit.gate is None else edit.gate.threshold
            if edit.gate is None:
                raise TimeromeError("EditMemory.rebase: make a paper_memory anew with its own arguments.")
            method, at = _method_of(edit)
            (made,) = memory._make(model, planned, [edit.says], edit.operation, method, threshold, at)
            history.append(made)
        memory._commit(replace(memory.state, history=tuple(history), gone=self.state.gone))
        return memory

    def explain(self, prompt: str, *, canvas: int | None = None) -> Explanation:
        """Say which edits a prompt names, how likely the answer of each is against its threshold, and which act.

        What is asked is the question with its canvas fully masked, the state of the first step.

        Args:
            prompt: the prompt.
            canvas: answer positions; by default enough for every answer watched for.

        Example:
            >>> import timerome as tr
            >>> model = tr.load("testbed")
            >>> memory = tr.EditMemory(model)
            >>> _ = memory.replace(tr.datasets.bundled("relations")[0], "Lagos")
            >>> memory.explain("The capital of Nigeria is").acting
            ('country_capital_city-0',)
            >>> memory.explain("The official language of Nigeria is").candidates[0].why
            'the model is not about to say it'
        """
        from .explain import explain

        model = self.model
        runtime = self._runtime(model)
        longest = max((len(w) for e in self.edits if e.gate for x in e.gate.watches for w in x.tokens), default=0)
        with unedited(model.model):
            asked = ask(model, prompt, canvas or max(longest + ROOM, 2 * ROOM))
            return explain(runtime.compiled, prompt, asked, runtime.follows)

    # Making ----------------------------------------------------------------------------------------------------------

    def _change(
        self,
        operation: Operation,
        facts: Facts,
        says: Sequence[str | None],
        method: Method | None,
        at: At,
        threshold: float | None,
        on_conflict: OnConflict,
    ) -> Any:
        model = self._belonging(self.model)
        several = _several(facts)
        planned = plan(self.state, several, on_conflict)
        fresh = [(item, text) for item, text in zip(planned, says, strict=True) if not item.kept]
        if fresh:
            items, texts = zip(*fresh, strict=True)
            made = self._make(model, items, texts, operation, method, threshold, at)
            self._commit(added(self.state, made), operation, made)
        present = {edit.id: edit for edit in self.state.history}
        edits = [present[item.id] for item in planned]
        return edits[0] if isinstance(facts, Fact) else edits

    def _make(
        self,
        model: Backbone,
        planned: Sequence[Planned],
        says: Sequence[str | None],
        operation: Operation | None,
        method: Method | None,
        threshold: float | None,
        at: At = None,
    ) -> list[Edit]:
        """Return new edits, read from the model as it is without any memory."""
        facts = [item.fact for item in planned]
        with unedited(model.model):
            said = questions(model, facts, says)
            changes = self._changes(model, facts, says, said, method, at)
            made = []
            for item, text, found, change in zip(planned, says, said, changes, strict=True):
                if operation == "teach":
                    gate = replace(gate_of(model, item.fact, ()), relation=relation_head(model, item.fact), alone=True)
                else:
                    gate = gate_of(model, item.fact, found.watches, threshold)
                    if max(watch.own for watch in found.watches) < UNLIKELY and threshold is None:
                        warnings.warn(
                            f"EditMemory: {model.name} is not about to say {item.fact.object!r} to "
                            f"{item.fact.prompt[:60]!r} ({found.watches[0].own:.1f} nats a token), nor anything else "
                            "it is sure of: the edit may act late, or never. To have it say something new, teach() it.",
                            stacklevel=4,
                        )
                made.append(Edit(item.id, item.fact, text, operation or "replace", change, gate, item.supersedes))
            return made

    def _changes(
        self,
        model: Backbone,
        facts: Sequence[Fact],
        says: Sequence[str | None],
        said: Sequence[Said],
        method: Method | None,
        at: At,
    ) -> Sequence[Placed | Keyed]:
        """Return what is added for each fact; all of them say something, or none does."""
        unasked = says[0] is None
        method = method or (Ridge(targets="null") if unasked else ByPlace())
        if isinstance(method, ByPlace):
            if unasked:
                raise TimeromeError(
                    "ByPlace says something instead; give an answer, or use method=Ridge(targets='null')."
                )
            told = [text for text in says if text is not None]
            found = zip(facts, told, said, strict=True)
            return [method.place(model, fact, text, one.asked, at) for fact, text, one in found]
        if not isinstance(method, Ridge):
            raise TimeromeError(f"EditMemory: expected method ByPlace(...) or Ridge(...), got {method!r:.60}.")
        if unasked != (method.targets in ("null", "corrupt")):
            raise TimeromeError(
                f"EditMemory: Ridge(targets={method.targets!r}) "
                + ("needs an answer to say." if unasked else "says nothing; pass answer=None to forget().")
            )
        return method.system(model, [f.with_new_object(text) for f, text in zip(facts, says, strict=True)], at)

    def _commit(self, state: MemoryState, operation: str | None = None, edits: Sequence[Edit] = ()) -> None:
        """Put a state in place of this one, and tell whatever is attached and the ledger; all or nothing."""
        before = self.state
        try:
            self._put(state)
            if self.ledger is not None and operation is not None:
                self.ledger.record(operation, edits, self)
        except BaseException:
            self._put(before)
            raise

    def _put(self, state: MemoryState) -> None:
        self.state = state
        for runtime in list(self._runtimes.values()):
            runtime.use(self._compiled(runtime.backbone))

    def _compiled(self, model: Backbone) -> Compiled:
        return Compiled.of(model, self.edits, self._systems.of(self.edits))

    def _runtime(self, model: Backbone) -> Runtime:
        found = self._runtimes.get(model.model)
        if found is None:
            found = self._runtimes[model.model] = Runtime(model, self._compiled(model))
        return found

    def _belonging(self, model: Backbone) -> Backbone:
        """Return the model, once it is sure that the memory was made on it; one without a tokenizer fits any.

        Raises:
            MemoryMismatchError: fingerprints or tokenizer digests differ; the message holds both.
        """
        pairs = [("model", self.fingerprint, model.fingerprint())]
        if model.tokenizer is not None:
            pairs.append(("tokenizer", self.tokenizer, model.tokenizer_digest()))
        for what, wanted, came in pairs:
            if wanted != came:
                raise MemoryMismatchError(
                    f"EditMemory: this memory was made on a {what} with fingerprint {wanted}, but {model.name} has "
                    f"{came}; load the {what} it was made on, or rebase() the memory on this one."
                )
        # A file may lie about what it was made on.
        layers = [site.layer for edit in self.state.history for site in edit.change.sites]
        widths = {t.shape[-1] for edit in self.state.history for t in _tensors(edit)}
        placed = {e.change.layer for e in self.state.history if isinstance(e.change, Placed)}
        if (
            max(layers, default=0) >= model.n_layers
            or not widths <= {model.hidden_size}
            or not placed <= {model.n_layers - 1}
        ):
            raise MemoryMismatchError(
                f"EditMemory: this memory reaches layer {max(layers)} and has a width of {sorted(widths)}, but "
                f"{model.name} has {model.n_layers} layers of {model.hidden_size}; load the model it was made on."
            )
        return model

    # Use -------------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Backbone:
        """The backbone.

        Raises:
            TimeromeError: the memory was loaded without one.
        """
        if self._model is None:
            raise TimeromeError(
                "EditMemory: no model is known; load the memory with one, EditMemory.load(path, model), or pass it to "
                "attached(model)."
            )
        return self._model

    @property
    def fingerprint(self) -> str:
        """Of the model it was made on."""
        return self.state.fingerprint

    @property
    def tokenizer(self) -> str:
        """Digest of that model's tokenizer."""
        return self.state.tokenizer

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits in force, in order."""
        return self.state.edits

    @property
    def facts(self) -> FactSet:
        """The facts of the edits in force, each with what is said of it as ``new_object``."""
        return FactSet([edit.fact.with_new_object(edit.says) for edit in self.edits])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the edits in force."""
        return sum(t.numel() * t.element_size() for edit in self.edits for t in _tensors(edit))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the edits in force act."""
        return tuple(dict.fromkeys(site for edit in self.edits for site in edit.change.sites))

    def digest(self) -> str:
        """SHA-256 of everything the memory is: facts, gates, tensors, what was undone."""
        from .edit_file import digest

        return digest(self.state)

    def attached(self, model: Backbone | None = None) -> Attachment:
        """Return a context manager inside which every forward of the model is edited.

        Hooks are removed on exit and on any exception; weights and buffers are never written. Edits made meanwhile act
        from the next forward on.

        Args:
            model: another backbone around the same weights; by default the memory's own.

        Raises:
            MemoryMismatchError: the memory was made on another model or tokenizer.
        """
        model = self._belonging(self.model if model is None else model)
        if self._model is None:
            self._model = model
        return Attachment(self._runtime(model))

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the memory as one safetensors file, its manifest and a digest inside; whole or not at all.

        Args:
            path: the file.
            dtype: of its tensors; bfloat16 halves the file and rounds them.
        """
        from .edit_file import save

        save(self.state, Path(path), dtype)

    @classmethod
    def load(cls, path: str | Path, model: Backbone | None = None) -> EditMemory:
        """Read a memory; with a model, check that it was made on that one.

        Raises:
            EditFileError: the file is missing, damaged, or no edit file.
            MemoryMismatchError: it was made on another model or tokenizer.
        """
        from .edit_file import load

        return cls.of_state(load(Path(path)), model)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, here or in another process, knows neither this one's model nor its hooks."""
        return {"state": self.state, "ledger": self.ledger}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self._become(values["state"], None)
        self.ledger = values["ledger"]

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        shown = ", ".join(edit.id for edit in self.edits[:3]) + (", …" if len(self) > 3 else "")
        return f"EditMemory({len(self)} edits in force{': ' if shown else ''}{shown})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(e.id)}</td><td>{escape(e.fact.prompt)}</td><td>{escape(e.fact.object)}</td>"
            f"<td>{escape(e.says or '(unasked)')}</td></tr>"
            for e in self.edits[:50]
        )
        head = "".join(f"<th>{name}</th>" for name in ("edit", "prompt", "old", "new"))
        return f"<p>{len(self)} edits in force</p><table><tr>{head}</tr>{rows}</table>"


@dataclass(frozen=True)
class Difference:
    """How a memory differs from another.

    Attributes:
        added: edits that only the second has.
        removed: edits that only the first has.
        changed: pairs of edits of one id that are not the same.
        about: names of what else differs: fingerprint, tokenizer.
    """

    added: tuple[Edit, ...]
    removed: tuple[Edit, ...]
    changed: tuple[tuple[Edit, Edit], ...]
    about: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.about)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values: prompt, old answer, new one."""

        def of(edit: Edit) -> dict[str, Any]:
            return {"id": edit.id, "prompt": edit.fact.prompt, "old": edit.fact.object, "new": edit.says}

        return {
            "added": [of(edit) for edit in self.added],
            "removed": [of(edit) for edit in self.removed],
            "changed": [{"from": of(a), "to": of(b)} for a, b in self.changed],
            "about": list(self.about),
        }


def paper_memory(
    model: Backbone,
    facts: Facts,
    *,
    at: At = None,
    alpha: float = 1.0,
    ridge: float = 0.01,
    sparsity: float = 0.5,
    rank: int = 64,
    method: Ridge | None = None,
) -> EditMemory:
    """Return the paper's form: one ridge system over all facts, added at every token of every forward.

    It has no gate and protects nothing: what else the model is asked changes, too. It is there to be measured beside
    the gated form. Facts with a ``new_object`` are replaced (``lens`` targets), if all have one, others forgotten
    (``null``). What the paper's text leaves open is ours: μ is the mean key, keys are read over a bank of partially
    masked states, at most ``rank`` a fact by pivoted Cholesky.

    Args:
        model: the backbone.
        facts: one or several.
        at: where; from a trace, ``trace.best()``.
        alpha: strength α.
        ridge: λ > 0, relative.
        sparsity: q, 0 <= q < 1.
        rank: most keys a fact.
        method: all of these and more in one value, in their place.

    Raises:
        FactError: a fact does not fit.
        TimeromeError: a value is out of range, or both ``method`` and its parts are given.

    Source: TimeROME-DLM (Yao et al. 2026, arXiv 2606.12841).
    """
    several = _several(facts)
    if method is not None and (alpha, ridge, sparsity, rank) != (1.0, 0.01, 0.5, 64):
        raise TimeromeError("paper_memory: give alpha, ridge, sparsity and rank, or method=Ridge(...), not both.")
    replaced = all(fact.new_object is not None for fact in several)
    targets = "lens" if replaced else "null"
    ridge_method = method or Ridge(targets, rank, ridge, sparsity, alpha)  # type: ignore[arg-type]
    memory = EditMemory(model)
    planned = plan(memory.state, several, "error")
    with unedited(model.model):
        changes = ridge_method.system(model, several, at, together=True)
    edits = [
        Edit(item.id, item.fact, item.fact.new_object, "replace" if item.fact.new_object else "forget", change)
        for item, change in zip(planned, changes, strict=True)
    ]
    memory._commit(added(memory.state, edits))
    return memory


def _several(facts: Facts) -> list[Fact]:
    found = [facts] if isinstance(facts, Fact) else list(facts) if isinstance(facts, Iterable) else [facts]
    strange = [one for one in found if not isinstance(one, Fact)]
    if isinstance(facts, (str, bytes, dict)) or strange:
        came = facts if isinstance(facts, (str, bytes, dict)) else strange[0]
        raise FactError(
            f"EditMemory: expected a Fact or several, got {came!r:.60}; make one with "
            "Fact(id=..., prompt=..., subject=..., object=...)."
        )
    if not found:
        raise FactError("EditMemory: expected at least one fact, got none.")
    return found


def _tensors(edit: Edit) -> list[Tensor]:
    found = []
    if isinstance(edit.change, Placed):
        found.append(edit.change.targets)
    else:
        found += [t for p in edit.change.parts for t in (p.keys, p.targets, p.mean, p.protect) if t is not None]
    if edit.gate is not None and edit.gate.relation is not None:
        found.append(edit.gate.relation.weight)
    return found


def _same(a: Edit, b: Edit) -> bool:
    if (a.fact, a.says, a.operation, type(a.change)) != (b.fact, b.says, b.operation, type(b.change)):
        return False
    pairs = zip(_tensors(a), _tensors(b), strict=False)
    # Read in another batch, an activation may differ in its last digits.
    return len(_tensors(a)) == len(_tensors(b)) and all(
        x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in pairs
    )


def _method_of(edit: Edit) -> tuple[Method, At]:
    """The method an edit was made by, as far as it is kept, and where."""
    if isinstance(edit.change, Placed):
        return ByPlace(), None
    raise TimeromeError(f"EditMemory.rebase: make the edit {edit.id!r} by Ridge anew; its targets are not kept.")


def _no_ledger() -> Ledger | None:
    return None
