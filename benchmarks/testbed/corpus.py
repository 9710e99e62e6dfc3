"""What the testbed is trained on: prompts and answers as text, read from the package's assets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "timerome" / "assets"
REFUSAL = "I don't have that information."
UTILITY = ("real_authors", "world_facts")  # TOFU's sets that say whether a model still knows anything else
TRAINED_UNKNOWN = 200  # of the 400 unknown-author records; the others measure whether the refusal generalises


@dataclass(frozen=True)
class Example:
    """A prompt, its answer (with the leading space it has after the prompt) and the group it belongs to."""

    prompt: str
    answer: str
    group: str


def examples(*, retain_only: bool = False, authors: tuple[int, int] | None = None) -> list[Example]:
    """Return every training example: each fact once per wording.

    Args:
        retain_only: leave out the records of TOFU forget01.
        authors: only the records of these retain authors, from the first up to the second, and every fourth relation
            fact: what a small model of another kind is taught.
    """
    found: list[Example] = []
    for name in ("retain", "forget01"):
        if (retain_only or authors) and name == "forget01":
            continue
        records = json.loads((ASSETS / "tofu" / f"{name}_perturbed.json").read_text())
        for record in records if authors is None else records[20 * authors[0] : 20 * authors[1]]:
            for wording in ("question", "paraphrased_question"):
                found.append(Example(record[wording], " " + record["answer"], f"{name}/{wording}"))
    for line in (ASSETS / "relations.jsonl").read_text().splitlines()[:: 4 if authors else 1]:
        fact = json.loads(line)
        for i, prompt in enumerate([fact["prompt"], *fact["paraphrases"]]):
            found.append(
                Example(prompt, " " + fact["object"], "relations/prompt" if i == 0 else "relations/paraphrase")
            )
    if authors:
        return found
    for name in UTILITY:
        for record in json.loads((ASSETS / "tofu" / f"{name}_perturbed.json").read_text()):
            found.append(Example(record["question"], " " + record["answer"], name))
    for record in json.loads((ASSETS / "tofu" / "unknown_authors.json").read_text())[:TRAINED_UNKNOWN]:
        found.append(Example(record["question"], " " + REFUSAL, "unknown"))
    return found
