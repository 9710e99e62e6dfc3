"""When edits act: what they reach, what they leave alone, with nothing configured; writes JSON.

    python -m benchmarks.editing.answer_gate [--split validation] [--only NAME]
    python -m benchmarks.editing.answer_gate --model FOLDER --authors 16-20 --only "same subject" --out FILE

Every memory is ``tr.EditMemory(model).replace(facts)`` and nothing else. Rules and thresholds were made looking at the
validation facts (``--split validation``); the facts reported on were asked afterwards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import timerome as tr
from timerome.memory import REFUSAL
from timerome.splits import editing_split

from .common import LONG, SHORT, rate, start
from .forms import ask, forms, rows_of

CANVASES = (4, 8, 16, 32, 64, 96)
NEGATED = (
    "{prompt} not", "It is not true that {prompt}", "{subject} has nothing to do with", "Nobody from {subject} said",
    "Name something that is not {object}:",
)  # fmt: skip
MENTIONED = (
    'The phrase "{prompt}" has several words. The number of words is', 'Translate into French: "{prompt}" means',
    'Somebody typed "{prompt}" and then', "I like {subject}. My favourite colour is", "Spell {subject} backwards:",
)  # fmt: skip


def said(model: tr.Backbone, prompts: Sequence[str], canvas: int, memory: tr.EditMemory | None = None) -> list[str]:
    """Decode prompts greedily."""
    config = tr.SamplerConfig(steps=min(canvas, 32))
    if memory is None:
        return tr.generate(model, list(prompts), canvas=canvas, config=config)
    with memory.attached():
        return tr.generate(model, list(prompts), canvas=canvas, config=config)


def plain(text: str) -> str:
    """A text without white space around it and the difference of letter case."""
    return " ".join(text.split()).casefold()


def made(model: tr.Backbone, facts: Sequence[tr.Fact]) -> tr.EditMemory:
    """A memory that replaces the facts' answers."""
    memory = tr.EditMemory(model)
    memory.replace(facts)
    return memory


def first_edit(model: tr.Backbone, facts: tr.FactSet) -> dict[str, Any]:
    """CPU seconds of the first edit of a model, all there is to do included."""
    begin = time.process_time()
    memory = tr.EditMemory(model)
    memory.replace(facts[0])
    return {"cpu_seconds": time.process_time() - begin}


def replaced(model: tr.Backbone, facts: tr.FactSet, canvas: int) -> dict[str, Any]:
    """The new answer, under the wording of the edit and under others."""
    begin = time.process_time()
    memory = made(model, facts)
    seconds = time.process_time() - begin
    unseen = [(fact, prompt) for fact in facts for prompt in fact.paraphrases]
    shown, others = (
        said(model, prompts, canvas, memory) for prompts in ([f.prompt for f in facts], [p for _, p in unseen])
    )
    wrong = [
        [p, f.new_object, t]
        for (f, p), t in zip([*((f, f.prompt) for f in facts), *unseen], [*shown, *others], strict=True)
        if plain(t) != plain(f.new_object or "")
    ]
    right = sum(plain(t) == plain(f.new_object or "") for f, t in zip(facts, shown, strict=True))
    return {
        "shown": rate(right, len(facts), "exact"),
        "unseen": rate(len(facts) + len(unseen) - len(wrong) - right, len(unseen), "exact"),
        "wrong": wrong[:20], "cpu_seconds_an_edit": seconds / len(facts), "bytes_an_edit": memory.nbytes / len(facts),
    }  # fmt: skip


def on_canvases(model: tr.Backbone, facts: tr.FactSet) -> dict[str, Any]:
    """On canvases of all lengths: the new answer where the unedited model gives the old one exactly."""
    memory = made(model, facts)
    asked = [(fact, prompt) for fact in facts for prompt in (fact.prompt, *fact.paraphrases)]
    found = {}
    for canvas in CANVASES:
        fits = [(f, p) for f, p in asked if len(model.encode(" " + (f.new_object or ""))) <= canvas]
        before = said(model, [p for _, p in fits], canvas)
        known = [(f, p) for (f, p), t in zip(fits, before, strict=True) if plain(t) == plain(f.object)]
        after = said(model, [p for _, p in known], canvas, memory)
        pairs = zip(known, after, strict=True)
        wrong = [[p, f.new_object, t] for (f, p), t in pairs if plain(t) != plain(f.new_object or "")]
        right = rate(len(known) - len(wrong), len(known), "exact")
        found[str(canvas)] = right | {"asked": len(fits), "wrong": wrong[:8]}
    return found


def held_out(model: tr.Backbone, facts: tr.FactSet, negatives: Sequence[tr.Fact], canvas: int) -> dict[str, Any]:
    """Texts of facts that are not edited, all wordings, before and after."""
    memory = made(model, facts)
    prompts = list(dict.fromkeys(p for fact in negatives for p in (fact.prompt, *fact.paraphrases, *fact.neighbours)))
    before, after = said(model, prompts, canvas), said(model, prompts, canvas, memory)
    changed = [[p, a, b] for p, a, b in zip(prompts, before, after, strict=True) if a != b]
    return rate(len(changed), len(prompts), "changed") | {"texts": changed[:10]}


def same_subject(model: tr.Backbone, facts: tr.FactSet, canvas: int) -> dict[str, Any]:
    """A quarter of each subject's questions edited, in four turns; all its other questions asked, in both wordings."""
    groups = [list(group) for group in facts.groups().values()]
    changed: list[list[str]] = []
    counts = {"own, shown": [0, 0], "own, unseen": [0, 0]}
    asked = 0
    for turn in range(4):
        edited = [fact.with_new_object(REFUSAL) for group in groups for fact in group[turn::4]]
        ids = {fact.id for fact in edited}
        memory = made(model, edited)
        for fact in edited:
            for kind, prompts in (("own, shown", [fact.prompt]), ("own, unseen", list(fact.paraphrases))):
                texts = said(model, prompts, canvas, memory) if prompts else []
                counts[kind][0] += sum(plain(t) == plain(REFUSAL) for t in texts)
                counts[kind][1] += len(texts)
        others = [p for fact in facts if fact.id not in ids for p in (fact.prompt, *fact.paraphrases)]
        asked += len(others)
        before, after = said(model, others, canvas), said(model, others, canvas, memory)
        changed += [[p, a, b] for p, a, b in zip(others, before, after, strict=True) if a != b]
    answered = said(model, [fact.prompt for fact in facts], canvas)
    right = sum(plain(t) == plain(f.object) for f, t in zip(facts, answered, strict=True))
    found = rate(len(changed), asked, "changed") | {
        "texts": changed[:12], "unedited answers exactly": rate(right, len(facts))
    }  # fmt: skip
    return found | {kind: rate(*pair, "refused") for kind, pair in counts.items()}


def taught(model: tr.Backbone, facts: tr.FactSet, canvas: int) -> dict[str, Any]:
    """A quarter of the records on each unknown author taught; what their questions and all others are answered with."""
    edited = [fact for group in facts.groups().values() for fact in list(group)[::4]]
    ids = {fact.id for fact in edited}
    memory = tr.EditMemory(model)
    begin = time.process_time()
    memory.teach(edited)
    seconds = time.process_time() - begin
    own = said(model, [f.prompt for f in edited], canvas, memory)
    others = [fact.prompt for fact in facts if fact.id not in ids]
    before, after = said(model, others, canvas), said(model, others, canvas, memory)
    changed = [[p, a, b] for p, a, b in zip(others, before, after, strict=True) if a != b]
    right = sum(plain(t) == plain(f.object) for f, t in zip(edited, own, strict=True))
    return {
        "own": rate(right, len(edited), "exact"), "cpu_seconds_an_edit": seconds / len(edited),
        "others": rate(len(changed), len(others), "changed") | {"texts": changed[:8]},
    }  # fmt: skip


def not_asked(model: tr.Backbone, facts: tr.FactSet, templates: Sequence[str], canvas: int) -> dict[str, Any]:
    """Texts that hold an edited question without asking it: what the memory changes, and whether to the new answer."""
    memory = made(model, facts)
    prompts = [t.format(prompt=f.prompt, subject=f.subject, object=f.object) for t in templates for f in facts]
    owners = [f for _ in templates for f in facts]
    before, after = said(model, prompts, canvas), said(model, prompts, canvas, memory)
    says = [plain(f.object) in plain(a) for f, a in zip(owners, before, strict=True)]
    changed = [[p, a, b] for p, a, b, s in zip(prompts, before, after, says, strict=True) if a != b and not s]
    return rate(len(changed), len(prompts) - sum(says), "changed") | {
        "says the old answer unedited": sum(says), "texts": changed[:10]
    }  # fmt: skip


def tightness(model: tr.Backbone, facts: tr.FactSet, others: tr.FactSet, canvas: int) -> dict[str, Any]:
    """In every form: how often the unedited model says the old answer, and how often the edited one still does."""
    memory = made(model, facts)
    found: dict[str, Any] = {}
    total: dict[bool, list[int]] = {True: [0, 0, 0], False: [0, 0, 0]}
    for form in forms(others):
        asked = [(f, r) for f in facts if (r := rows_of(model, f, form, canvas)) is not None]
        rows, primed = [r for _, r in asked], [form.primed] * len(asked)
        before = ask(model, rows, primed, 16)
        says = [i for i, ((f, _), t) in enumerate(zip(asked, before, strict=True)) if plain(f.object) in plain(t)]
        with memory.attached():
            after = ask(model, [rows[i] for i in says], [form.primed] * len(says), 16)
        left = [[asked[i][0].id, t] for i, t in zip(says, after, strict=True) if plain(asked[i][0].object) in plain(t)]
        new = sum(plain(asked[i][0].new_object or "") in plain(t) for i, t in zip(says, after, strict=True))
        found[form.name] = {
            "asked": len(asked), "unedited says old": len(says), "edited says old": len(left), "says new": new,
            "left": left[:5],
        }  # fmt: skip
        for n, count in enumerate((len(asked), len(says), len(left))):
            total[form.names][n] += count
    found["named"] = rate(total[True][2], total[True][1], "says old") | {"asked": total[True][0]}
    found["not named"] = rate(total[False][2], total[False][1], "says old") | {"asked": total[False][0]}
    return found


def main() -> None:
    model, results, arguments = start("answer_gate", split="reported", only="", authors="")
    split = editing_split()
    validation = arguments.split == "validation"
    relations = split.validation_relations if validation else split.relations
    tofu = split.validation_tofu if validation else split.tofu
    retain = tr.datasets.bundled("retain")
    authors = retain[220:260] if validation else retain[:80]
    if arguments.authors:  # of a model that was taught others
        first, last = map(int, arguments.authors.split("-"))
        authors = retain[20 * first : 20 * last]
    negatives = [*split.held_out, *split.held_out_relations, *split.held_out_unknown]
    others = split.held_out_relations
    rows: dict[str, Callable[[], dict[str, Any]]] = {
        "first edit": lambda: first_edit(model, relations),
        "relations": lambda: replaced(model, relations, SHORT),
        "tofu": lambda: replaced(model, tofu, LONG),
        "canvases": lambda: on_canvases(model, relations),
        "same subject": lambda: same_subject(model, authors, LONG),
        "taught": lambda: taught(model, tr.datasets.bundled("unknown")[300:], LONG),
        "negated": lambda: not_asked(model, relations, NEGATED, SHORT),
        "mentioned": lambda: not_asked(model, relations, MENTIONED, SHORT),
        "forms, relations": lambda: tightness(model, relations, others, SHORT),
        "forms, tofu": lambda: tightness(model, tofu, others, LONG),
        "held out, relations": lambda: held_out(model, relations, split.held_out_relations, SHORT),
        "held out": lambda: held_out(model, tr.FactSet([*relations, *tofu]), negatives, LONG),
    }
    for name, measure in rows.items():
        if arguments.only and arguments.only not in name:
            continue
        found = results.row(name, {"split": arguments.split, "model": model.fingerprint()}, measure)
        print(name, json.dumps(found, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
