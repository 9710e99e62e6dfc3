"""CounterFact, zsRE, KnowEdit: answers to be replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .._json import is_text
from ..facts import FactSet
from ._reading import Questions, Record, Row, as_facts, find, read_rows, stem


def counterfact(path: str | Path, split: str | None = None) -> FactSet:
    """Read facts of CounterFact: ``counterfact`` (ROME's schema), ``counterfact-flat`` (EasyEdit's), ``known_1000``.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     line = '{"known_id": 7, "prompt": "Paris is in", "subject": "Paris", "attribute": "France"}'
        ...     _ = Path(folder, "known_1000.jsonl").write_text(line)
        ...     counterfact(folder, "known_1000").ids
        ('known-7',)
    """
    return as_facts("counterfact", path, split, counterfact_records(path, split))


def counterfact_records(path: str | Path, split: str | None = None) -> list[Record]:
    """Read what :func:`counterfact` reads, every record of it."""
    file = find(path, *([split] if split else ("counterfact", "multi_counterfact", "counterfact-flat")))
    found: dict[str, Record] = {}
    read: Callable[[Row], Record] | None = None
    for row in read_rows(file):
        # A file is of one form, that of its first record, so that a field which another one lacks is named.
        read = read or next((form for name, form in _FORMS.items() if name in row.values), _flat)
        record = read(row)
        if record.id in found:
            raise row.wrong("case_id", "another id than an earlier record has", row.get("case_id"))
        found[record.id] = record
    return list(found.values())


def _rewrite(row: Row) -> Record:
    subject, true = row.text("requested_rewrite.subject"), row.text("requested_rewrite.target_true.str")
    # No str.format: what stands in a file may be a format of its own.
    wanted = "a text with {} for the subject"
    prompt = row.take("requested_rewrite.prompt", wanted, lambda v: is_text(v) and "{}" in v).replace("{}", subject)
    return Record(
        f"counterfact-{row.number('case_id')}", prompt, subject, true, row.text("requested_rewrite.target_new.str"),
        row.texts("paraphrase_prompts"), row.texts("neighborhood_prompts"),
        row.maybe("requested_rewrite.relation_id"), neighbour_object=true, generation=row.texts("generation_prompts"),
        new_id=row.maybe("requested_rewrite.target_new.id"),
    )  # fmt: skip


def _flat(row: Row) -> Record:
    return Record(
        f"counterfact-{row.number('case_id')}", row.text("prompt"), row.text("subject"), row.text("ground_truth"),
        row.text("target_new"), (row.text("rephrase_prompt"),), (row.text("locality_prompt"),),
        row.maybe("relation_id"), neighbour_object=row.text("locality_ground_truth"),
    )  # fmt: skip


def _known(row: Row) -> Record:
    return Record(
        f"known-{row.number('known_id')}", row.text("prompt"), row.text("subject"), row.text("attribute"),
        relation=row.maybe("relation_id"),
    )  # fmt: skip


_FORMS = {"known_id": _known, "requested_rewrite": _rewrite}


def counterfact_snippets(path: str | Path) -> dict[tuple[str, str], list[str]] | None:
    """Read ROME's ``attribute_snippets.json``: texts on subjects that truly have an object, by relation and object.

    Returns:
        The texts; None if the path is a file, or a folder without that one.

    Raises:
        FactError: a record is malformed; the message names file, record and field.
    """
    try:
        file = find(path, "attribute_snippets")
    except FileNotFoundError:
        return None
    if file == Path(path):
        return None
    found: dict[tuple[str, str], list[str]] = {}
    for row in read_rows(file):
        texts = [sample.text("text") for sample in row.rows("samples")]
        found.setdefault((row.text("relation_id"), row.text("target_id")), []).extend(texts)
    return found


def zsre(path: str | Path, split: str | None = None) -> FactSet:
    """Read facts of zsRE, in MEND's schema; the one neighbour is an unrelated question.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     line = ('{"subject": "Lima", "src": "Where is Lima?", "answers": ["Peru"], "alt": "Mali", '
        ...             '"rephrase": "Lima is where?", "loc": "Who wrote It?", "loc_ans": "King"}')
        ...     _ = Path(folder, "zsre.jsonl").write_text(line)
        ...     zsre(folder)[0].new_object
        'Mali'
    """
    return as_facts("zsre", path, split, zsre_records(path, split))


def zsre_records(path: str | Path, split: str | None = None) -> list[Record]:
    """Read what :func:`zsre` reads, every record of it; what follows from an edit is the group ``"one hop"``."""
    return [
        Record(
            f"zsre-{i:04d}", row.text("src"), row.text("subject"), row.answer("answers"), row.text("alt"),
            (row.text("rephrase"),), (row.text("loc"),), neighbour_object=row.text("loc_ans"),
            portability={} if row.get("portability") is None else {
                "one hop": ((row.text("portability.New Question"), row.text("portability.New Answer")),)
            },
        )
        for i, row in enumerate(read_rows(find(path, *([split] if split else ("zsre", "zsre*")))))
    ]  # fmt: skip


def knowedit(path: str | Path, split: str | None = None) -> FactSet:
    """Read facts of KnowEdit: ``ZsRE``, ``wiki_counterfact``, ``wiki_recent``, where the object is the new one.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     line = '{"prompt": "Lima is in", "subject": "Lima", "target_new": "Mali", "ground_truth": ["Peru"]}'
        ...     _ = Path(folder, "train_cf.jsonl").write_text(line)
        ...     knowedit(folder)[0].object
        'Peru'
    """
    return as_facts("knowedit", path, split, knowedit_records(path, split))


def knowedit_records(path: str | Path, split: str | None = None) -> list[Record]:
    """Read what :func:`knowedit` reads, every record of it."""
    file = find(path, split or "*")
    found = []
    for i, row in enumerate(read_rows(file)):
        new, rephrase, locality = row.text("target_new"), row.maybe("rephrase_prompt"), _questions(row, "locality")
        found.append(Record(
            f"knowedit-{split or stem(file)}-{i:04d}", row.text("prompt"), row.text("subject"),
            row.answer("ground_truth") if row.get("ground_truth") else new, new, (rephrase,) if rephrase else (),
            tuple(dict.fromkeys(prompt for group in locality.values() for prompt, _ in group)),
            portability=_questions(row, "portability"), locality=locality,
        ))  # fmt: skip
    return found


def _questions(row: Row, path: str) -> Questions:
    """Return questions and first answers by group, those with any."""
    if (groups := row.get(path)) is None:
        return {}
    if not isinstance(groups, dict):
        raise row.wrong(path, "an object of lists of questions", groups)
    inner = Row(row.place, groups, f"{path}.")
    found = {name: inner.rows(name) for name in groups}
    return {name: tuple((q.text("prompt"), q.answer("ground_truth")) for q in of) for name, of in found.items() if of}
