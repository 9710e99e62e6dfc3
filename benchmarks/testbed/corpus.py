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


def examples(*, retain_only: bool = False) -> list[Example]:
    """Return every training example: each fact once per wording.

    Args:
        retain_only: leave out the records of TOFU forget01.
    """
    found: list[Example] = []
    for name in ("retain", "forget01"):
        if retain_only and name == "forget01":
            continue
        for record in json.loads((ASSETS / "tofu" / f"{name}_perturbed.json").read_text()):
            for wording in ("question", "paraphrased_question"):
                found.append(Example(record[wording], " " + record["answer"], f"{name}/{wording}"))
    for line in (ASSETS / "relations.jsonl").read_text().splitlines():
        fact = json.loads(line)
        for i, prompt in enumerate([fact["prompt"], *fact["paraphrases"]]):
            found.append(
                Example(prompt, " " + fact["object"], "relations/prompt" if i == 0 else "relations/paraphrase")
            )
    for name in UTILITY:
        for record in json.loads((ASSETS / "tofu" / f"{name}_perturbed.json").read_text()):
            found.append(Example(record["question"], " " + record["answer"], name))
    for record in json.loads((ASSETS / "tofu" / "unknown_authors.json").read_text())[:TRAINED_UNKNOWN]:
        found.append(Example(record["question"], " " + REFUSAL, "unknown"))
    return found
