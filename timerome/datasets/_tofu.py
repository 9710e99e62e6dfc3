"""TOFU: questions about authors who do not exist, and the answers."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from ..facts import FactSet
from ._names import author_name, described, mention
from ._reading import Record, as_facts, find, read_rows, stem

AUTHOR = 20  # questions an author, in order

_BUNDLED = {
    "forget01": "forget01_perturbed", "retain": "retain_perturbed", "unknown": "unknown_authors",
    "real_authors": "real_authors_perturbed", "world_facts": "world_facts_perturbed",
}  # fmt: skip


def tofu(path: str | Path, split: str | None = None) -> FactSet:
    """Read facts of TOFU: ``forget01``, ``retain``, …, of files called ``…_perturbed``, which have paraphrases, if any.

    TOFU names no subject: it is what the question calls the author, whose name is the one that most of the twenty
    records around it hold, or else the longest capitalised phrase of the question, such as where they were born.

    Example:
        >>> from importlib.resources import files
        >>> facts = tofu(files("timerome") / "assets" / "tofu", "forget01")
        >>> facts[1].subject, facts[1].group, len(facts[1].paraphrases)
        ('Basil Mahfouz Al-Kuwaiti', 'Basil Mahfouz Al-Kuwaiti', 1)
    """
    return as_facts("tofu", path, split, tofu_records(path, split))


def tofu_records(path: str | Path, split: str | None = None) -> list[Record]:
    """Read what :func:`tofu` reads, every record of it, with perturbed answers where the file has them."""
    file = find(path, f"{split or '*'}_perturbed", split or "*")
    split = (split or stem(file)).removesuffix("_perturbed")
    of_authors, records = split not in ("real_authors", "world_facts"), []
    rows = [
        (row.text("question"), row.text("answer"), row.maybe("paraphrased_question"), row.maybe("paraphrased_answer"),
         row.texts("perturbed_answer") if row.get("perturbed_answer") is not None else ())
        for row in read_rows(file)
    ]  # fmt: skip
    for i, (question, answer, paraphrase, reworded, perturbed) in enumerate(rows):
        if i % AUTHOR == 0:
            author = author_name(f"{q} {a}" for q, a, *_ in rows[i : i + AUTHOR]) if of_authors else ""
            group = author or (f"tofu-{split}-author-{i // AUTHOR}" if of_authors else None)
        records.append(Record(
            f"tofu-{split}-{i:04d}", question, mention(author, question) or described(question), answer,
            paraphrases=(paraphrase,) if paraphrase else (), group=group, reworded=reworded, perturbed=perturbed,
        ))  # fmt: skip
    return records


def bundled(name: str) -> FactSet:
    """Return a bundled set of facts.

    Args:
        name: ``"forget01"`` (40 records of two authors), ``"retain"`` (400 of twenty authors), ``"relations"`` (274
            facts of eight relations), ``"real_authors"`` (100), ``"world_facts"`` (117), all known to the testbed, or
            ``"unknown"`` (400 records of twenty authors it does not know; it was taught to refuse the first 200 and
            never saw the others).

    Raises:
        ValueError: there is no such set.

    Example:
        >>> len(bundled("forget01"))
        40
    """
    if name != "relations":
        return as_facts("bundled", name, None, bundled_records(name))
    with as_file(files("timerome") / "assets" / "relations.jsonl") as file:
        return FactSet.from_jsonl(file)


def bundled_records(name: str) -> list[Record]:
    """Return the records of a bundled set of TOFU, with their perturbed answers.

    Raises:
        ValueError: there is no such set.

    Example:
        >>> len(bundled_records("forget01")[0].perturbed)
        5
    """
    if name not in _BUNDLED:
        raise ValueError(f"datasets.bundled: expected one of {', '.join((*_BUNDLED, 'relations'))}, got {name!r}.")
    with as_file(files("timerome") / "assets" / "tofu" / f"{_BUNDLED[name]}.json") as file:
        return tofu_records(file, name)
