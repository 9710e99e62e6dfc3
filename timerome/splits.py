"""The one place that says which bundled facts are used for what.

A number is reported on ``forget``, its paraphrases, and the ``held_out`` sets. Nothing in them is used to build (but
for ``forget`` itself), protect or choose hyperparameters: that is what the other sets are for. TOFU facts are split by
author, so that no set knows another's authors.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from .datasets import AUTHOR, bundled, bundled_records
from .facts import Fact, FactSet

bundled_facts = bundled


@dataclass(frozen=True)
class DemoSplit:
    """Facts by use; see the module's text.

    Attributes:
        forget: to be forgotten, and reported on; its paraphrases are never shown to the editor.
        protect: whose activations may be protected.
        retain: what else methods that train may keep.
        validation_forget: forgotten in place of ``forget`` while hyperparameters are chosen.
        validation_retain: locality while hyperparameters are chosen.
        held_out: locality as reported, other authors of TOFU.
        held_out_relations: locality as reported, relation facts.
        held_out_unknown: questions on authors the model does not know; locality as reported.
    """

    forget: FactSet
    protect: FactSet
    retain: FactSet
    validation_forget: FactSet
    validation_retain: FactSet
    held_out: FactSet
    held_out_relations: FactSet
    held_out_unknown: FactSet


def demo_split() -> DemoSplit:
    """Return the split that every number of the demo and the README is made with.

    Example:
        >>> split = demo_split()
        >>> len(split.held_out)
        100
    """
    retain, relations, unknown = bundled_facts("retain"), bundled_facts("relations"), bundled_facts("unknown")
    return DemoSplit(
        forget=bundled_facts("forget01"),
        protect=retain[: 4 * AUTHOR],
        retain=retain[4 * AUTHOR : 11 * AUTHOR] + relations[::2],
        validation_forget=retain[11 * AUTHOR : 13 * AUTHOR],
        validation_retain=retain[13 * AUTHOR : 15 * AUTHOR],
        held_out=retain[15 * AUTHOR :],
        held_out_relations=relations[1::2],
        held_out_unknown=unknown[200:300],
    )


@dataclass(frozen=True)
class ScalingSplit:
    """As many facts as asked for, in the order in which they are forgotten, and what stays out of it.

    Attributes:
        forget: the facts to forget: forget01's, those of fourteen retain authors (320 in all), then relation facts.
        reported: those of TOFU; no hyperparameter was chosen on them.
        held_out: locality as reported, two authors of TOFU.
        held_out_relations: locality as reported, relation facts.
    """

    forget: FactSet
    reported: FactSet
    held_out: FactSet
    held_out_relations: FactSet


def scaling_split(n: int) -> ScalingSplit:
    """Return the split for forgetting ``n`` facts; sets of different ``n`` are nested and share what is held out.

    Args:
        n: 1 to 400; TOFU's forget01 has 40 facts, forget05 200, forget10 400.

    Raises:
        ValueError: ``n`` is out of range.

    Example:
        >>> split = scaling_split(200)
        >>> len(split.forget), len(split.held_out)
        (200, 40)
    """
    if not 1 <= n <= 400:
        raise ValueError(f"scaling_split: expected 1 to 400 facts, got {n}.")
    demo, retain = demo_split(), bundled_facts("retain")
    validation = demo.validation_forget + demo.validation_retain
    tofu = demo.forget + FactSet(fact for fact in retain[: 18 * AUTHOR] if fact.id not in set(validation.ids))
    return ScalingSplit(
        forget=(tofu + bundled_facts("relations")[::2])[:n],
        reported=tofu[:n],
        held_out=retain[18 * AUTHOR :],
        held_out_relations=demo.held_out_relations,
    )


@dataclass(frozen=True)
class EditingSplit:
    """Facts by use where answers are replaced: relation facts and TOFU's; see the module's text.

    Every edited fact has a new object: for a relation fact, the object of another fact of its relation; for a TOFU
    record, one of its false answers.

    Attributes:
        relations: edited and reported on; their paraphrases are never shown to the editor.
        tofu: the same, forget01.
        validation_relations: edited while hyperparameters are chosen.
        validation_tofu: the same.
        held_out: locality as reported, other authors of TOFU.
        held_out_relations: locality as reported, relation facts.
        held_out_unknown: locality as reported, questions on authors the model does not know.
    """

    relations: FactSet
    tofu: FactSet
    validation_relations: FactSet
    validation_tofu: FactSet
    held_out: FactSet
    held_out_relations: FactSet
    held_out_unknown: FactSet


def editing_split() -> EditingSplit:
    """Return the split that the numbers on replaced answers are made with.

    Example:
        >>> editing_split().relations[0].new_object is not None
        True
    """
    retain, relations, unknown = bundled_facts("retain"), bundled_facts("relations"), bundled_facts("unknown")
    return EditingSplit(
        relations=other_objects(relations[::4], relations),
        tofu=false_answers("forget01"),
        validation_relations=other_objects(relations[1::4], relations),
        validation_tofu=false_answers("retain")[11 * AUTHOR : 13 * AUTHOR],
        held_out=retain[15 * AUTHOR :],
        held_out_relations=relations[3::4],
        held_out_unknown=unknown[200:300],
    )


def other_objects(facts: Iterable[Fact], pool: Iterable[Fact]) -> FactSet:
    """Give each fact the object of another fact of its relation, drawn by its id."""
    objects: dict[str | None, set[str]] = {}
    for fact in pool:
        objects.setdefault(fact.relation, set()).add(fact.object)
    return FactSet(
        fact.with_new_object(random.Random(fact.id).choice(sorted(objects[fact.relation] - {fact.object})))
        for fact in facts
    )


def false_answers(name: str) -> FactSet:
    """Give each fact of a bundled TOFU set the first false answer of its record."""
    perturbed = {record.id: record.perturbed for record in bundled_records(name)}
    return bundled(name).with_new_object(lambda fact: perturbed[fact.id][0])


@dataclass(frozen=True)
class ShareSplit:
    """The largest share of TOFU that the testbed knows and that can be forgotten with enough left to measure on.

    Attributes:
        forget: 200 records of ten authors, as many as forget05 has.
        held_out: locality as reported.
        held_out_relations: locality as reported, relation facts.
    """

    forget: FactSet
    held_out: FactSet
    held_out_relations: FactSet


def share_split() -> ShareSplit:
    """Return the split on which a share of forget05's size is forgotten.

    Example:
        >>> len(share_split().forget)
        200
    """
    retain, relations = bundled_facts("retain"), bundled_facts("relations")
    return ShareSplit(
        forget=retain[: 10 * AUTHOR],
        held_out=retain[15 * AUTHOR :],
        held_out_relations=relations[1::2],
    )
