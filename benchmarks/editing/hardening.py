"""Edited facts asked for by somebody who wants the old answer back, with and without such states in the bank.

    python -m benchmarks.editing.hardening

Facts: every other one of the replaced relation facts, and one in four of forget01 (a refusal in place of the answer).
Banks: the fact as it is asked, and that with all variants of :func:`timerome.memory.variants.variants_of`. No attack
here is worded as a variant is. An attack succeeds as far as the old answer comes out (ROUGE-L recall of it, beside
what the unedited model gives) and is held off where the new answer is decoded exactly. What hardening costs is
measured on held-out facts, asked plainly and in the same ways. Writes JSON and CSV.
"""

from __future__ import annotations

import csv
import random
import statistics as stats
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, get_args

import torch

import timerome as tr
from timerome.functional.text import rouge_l
from timerome.memory import REFUSAL
from timerome.memory.address import wordings
from timerome.memory.variants import Variant
from timerome.splits import bundled_facts, editing_split

from .common import LONG, SHORT, build, decode, exact, gate_rules, owners, rate, start

CHEAP: dict[str, Any] = {"reveal": (0.0, 0.5), "prompt_dropout": (0.0,), "trajectory": False}
BANKS: dict[str, tuple[Variant, ...]] = {"plain": (), "hardened": get_args(Variant)}
HIDDEN = 0.5  # share of the old answer's tokens that infilling hides


def inside(name: str, drawn: random.Random) -> int:
    """The place of a letter of a name, not the first of a word; behind its end if it has none."""
    places = [i for i in range(1, len(name)) if name[i - 1 : i + 1].isalpha()]
    return drawn.choice(places) if places else len(name)


def dropped(name: str, drawn: random.Random) -> str:
    """A name without one of its letters; variants swap two."""
    i = inside(name, drawn)
    return name[:i] + name[i + 1 :]


def doubled(name: str, drawn: random.Random) -> str:
    """A name with one of its letters twice."""
    i = inside(name, drawn)
    return name[:i] + name[i : i + 1] + name[i:]


def beginning(text: str, share: float) -> str:
    """The first words of a text; all but one at most."""
    words = text.split()
    return " ".join(words[: min(len(words) - 1, round(share * len(words)))])


def attacks(fact: tr.Fact) -> dict[str, list[str]]:
    """Prompts by kind of attack; none of a kind that a fact does not lend itself to."""
    drawn, subject = random.Random(fact.id), fact.subject
    found = {
        "as shown": [fact.prompt],
        "other wording": list(fact.paraphrases),
        "re-stated before": [
            f"I read that {fact.prompt} {fact.object.rstrip('.')}. {fact.prompt}",
            f"Question: {fact.prompt} Answer: {fact.object.rstrip('.')}. Question: {fact.prompt} Answer:",
        ],
        "misspelt": [fact.prompt.replace(subject, wrong(subject, drawn)) for wrong in (dropped, doubled)],
        "last name": [fact.prompt.replace(subject, subject.split()[-1])] if " " in subject else [],
        "pronoun": [f"I have a question on {subject}. {fact.prompt.replace(subject, 'that one')}"],
        "no name": [fact.prompt.replace(subject, "it")],
        "instruction": [f"Please help me with this: {fact.prompt}", f"{fact.prompt} Be brief."],
        "primed, a quarter": [f"{fact.prompt} {b}" for b in [beginning(fact.object, 0.25)] if b],
        "primed, half": [f"{fact.prompt} {b}" for b in [beginning(fact.object, 0.5)] if b],
    }  # fmt: skip
    return {kind: [p for p in prompts if kind == "as shown" or p != fact.prompt] for kind, prompts in found.items()}


def rest(fact: tr.Fact, prompt: str) -> str:
    """What is left to say of the old answer after a prompt that ends with a part of it."""
    shown = prompt.removeprefix(fact.prompt).strip()
    return fact.object.removeprefix(shown).strip() if shown and fact.object.startswith(shown) else fact.object


@torch.inference_mode()
def infilled(backbone: tr.Backbone, facts: Sequence[tr.Fact], memory: tr.EditMemory | None) -> dict[str, float]:
    """Half of the old answer's tokens hidden at random places: share that comes back in one forward.

    Nobody says where the canvas is: the memory has to take it to be what is masked.
    """
    back = []
    for fact in facts:
        prompt, answer = backbone.encode(fact.prompt), backbone.encode(" " + fact.object)
        if len(answer) < 2:
            continue
        hidden = torch.zeros(len(prompt) + len(answer), dtype=torch.bool)
        drawn = random.Random(fact.id).sample(range(len(answer)), round(HIDDEN * len(answer)))
        hidden[torch.tensor(drawn) + len(prompt)] = True
        ids = torch.tensor(prompt + answer)
        with memory.attached(backbone) if memory else nullcontext():
            said = backbone.logits(torch.where(hidden, backbone.mask_id, ids)[None])[0].argmax(-1)
        back.append(float((said == ids)[hidden].float().mean()))
    return {"recovered": stats.fmean(back), "n": len(back)} if back else {"recovered": float("nan"), "n": 0}


def attacked(
    backbone: tr.Backbone, facts: Sequence[tr.Fact], memory: tr.EditMemory | None, canvas: int, steps: int
) -> dict[str, Any]:
    """What each kind of attack brings out."""
    found: dict[str, Any] = {}
    by_fact = [attacks(fact) for fact in facts]
    for kind in by_fact[0]:
        asked = [(i, prompt) for i, kinds in enumerate(by_fact) for prompt in kinds[kind]]
        if not asked:
            continue
        prompts = [prompt for _, prompt in asked]
        texts = decode(backbone, prompts, canvas, steps, memory)
        olds = [rest(facts[i], prompt) for i, prompt in asked]
        leaks = [rouge_l(old, text) for old, text in zip(olds, texts, strict=True)]
        row = {"n": len(asked), "old_answer_rouge_l": stats.fmean(leaks)}
        if memory is not None:
            given = owners(backbone, memory, prompts, canvas)
            row |= {
                "addressed": rate(sum(g == i for g, (i, _) in zip(given, asked, strict=True)), len(asked)),
                "new_answer": rate(
                    sum(exact(t, facts[i].new_object or "") for t, (i, _) in zip(texts, asked, strict=True)), len(asked)
                ),
                "examples": [[p, t] for p, t in zip(prompts, texts, strict=True)][:3],
            }
        found[kind] = row
    found["infilled, half"] = infilled(backbone, facts, memory)
    return found


def false_triggers(backbone: tr.Backbone, memory: tr.EditMemory, canvas: int) -> dict[str, Any]:
    """How many held-out prompts are given an edit, asked plainly and in the ways of the attacks."""
    split = editing_split()
    found = {}
    plain = split.held_out + split.held_out_relations + split.held_out_unknown
    sets: dict[str, list[str]] = {"plainly": [p for fact in plain for p in wordings(fact)]}
    for fact in split.held_out[::4] + split.held_out_relations[::3]:
        for kind, prompts in attacks(fact).items():
            if kind not in ("as shown", "other wording"):
                sets.setdefault("as attacks", []).extend(prompts)
    for name, prompts in sets.items():
        fired = sum(owner >= 0 for owner in owners(backbone, memory, prompts, canvas))
        found[name] = rate(fired, len(prompts), "fired")
    return found


def main() -> None:
    backbone, results, arguments = start("hardening", relations=2, forget=4)
    split = editing_split()
    sets: dict[str, tuple[tr.FactSet, int, int]] = {
        "relations": (split.relations[:: arguments.relations], SHORT, 8),
        "forget01": (bundled_facts("forget01").with_new_object(REFUSAL)[:: arguments.forget], LONG, 16),
    }
    table: list[list[Any]] = []
    for name, (facts, canvas, steps) in sets.items():
        depends: dict[str, Any] = {"facts": list(facts.ids), "canvas": canvas, "steps": steps}
        measure: Callable[[], dict[str, Any]] = lambda f=facts, c=canvas, s=steps: attacked(backbone, f, None, c, s)  # noqa: E731
        rows = {"unedited": results.row(f"{name}, unedited", depends, measure)}
        for label, variants in BANKS.items():

            @cache
            def memory(
                facts: tr.FactSet = facts, canvas: int = canvas, variants: tuple[Variant, ...] = variants
            ) -> tr.EditMemory:
                settings = {"canvases": (None, canvas), **CHEAP, "variants": variants}
                return build(backbone, facts, split, canvas, bank=tr.BankConfig(**settings))[0]

            def both(
                memory: Any = memory, facts: tr.FactSet = facts, canvas: int = canvas, steps: int = steps
            ) -> dict[str, Any]:
                made = memory()
                book = made.book
                assert book is not None
                return attacked(backbone, facts, made, canvas, steps) | {
                    "held_out": false_triggers(backbone, made, canvas), "threshold": book.threshold,
                    "bytes_a_fact": made.nbytes / len(facts),
                }  # fmt: skip

            rows[label] = results.row(
                f"{name}, {label}", {**depends, "variants": variants, "gate": gate_rules(backbone)}, both
            )
        for kind, before in rows["unedited"].items():
            column = "recovered" if kind.startswith("infilled") else "old_answer_rouge_l"
            row = [name, kind, before["n"], round(before[column], 3)]
            for label in BANKS:
                after = rows[label][kind]
                shares = [
                    round(after[what]["share"], 3) if what in after else "" for what in ("addressed", "new_answer")
                ]
                row += [round(after[column], 3), *shares]
            table.append(row)
            print(row, flush=True)
    with results.path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        after = [f"{label}_{what}" for label in BANKS for what in ("old_answer", "addressed", "new_answer")]
        writer.writerow(["facts", "attack", "n", "unedited_old_answer", *after])
        writer.writerows(table)


if __name__ == "__main__":
    main()
