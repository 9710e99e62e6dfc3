"""Other ways in which an edited fact may be asked for: what somebody tries who wants the old answer back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, get_args

from ..facts import Fact

Variant = Literal["restated", "denied", "misspelt", "lowercase", "introduced", "wrapped"]


def variants_of(fact: Fact, kinds: Sequence[Variant], seed: int = 0) -> list[dict[str, str]]:
    """Return a fact asked in other ways, as keyword arguments of :func:`timerome.diffusion.encode`.

    - ``restated``: the present answer stands in the context, as if it had just been said ("in-context relearning").
    - ``denied``: the context says that the wanted answer is wrong and the present one right.
    - ``misspelt``: two letters of the subject are swapped; two drawings.
    - ``lowercase``: the prompt without capitals.
    - ``introduced``: the subject is named first, and the prompt is asked of a pronoun.
    - ``wrapped``: the prompt stands in an instruction.

    Args:
        fact: the fact.
        kinds: which of them.
        seed: of what is drawn.

    Raises:
        ValueError: there is no such kind.

    Example:
        >>> fact = Fact(id="kenya", prompt="The capital of Kenya is", subject="Kenya", object="Nairobi")
        >>> variants_of(fact, ("restated",))
        [{'context': 'The capital of Kenya is Nairobi.'}]
    """
    found: list[dict[str, str]] = []
    drawn = random.Random(f"{seed}/{fact.id}")
    for kind in kinds:
        if kind == "restated":
            found.append({"context": stated(fact.prompt, fact.object)})
        elif kind == "denied":
            wrong = f"It is not {fact.new_object}. " if fact.new_object else ""
            found.append({"context": wrong + stated(fact.prompt, fact.object)})
        elif kind == "misspelt":
            found += [{"prompt": fact.prompt.replace(fact.subject, misspelt(fact.subject, drawn))} for _ in range(2)]
        elif kind == "lowercase":
            found.append({"prompt": fact.prompt.lower()})
        elif kind == "introduced":
            found.append({"prompt": f"About {fact.subject}: " + fact.prompt.replace(fact.subject, "it")})
        elif kind == "wrapped":
            found.append({"prompt": f"Answer the following. {fact.prompt}"})
        else:
            raise ValueError(f"variants_of: expected kinds among {get_args(Variant)}, got {kind!r}.")
    return found


def stated(prompt: str, answer: str) -> str:
    """Return a prompt with its answer, closed by a full stop."""
    return f"{prompt} {answer}".rstrip(".") + "."


def misspelt(name: str, drawn: random.Random) -> str:
    """Return a name with two neighbouring letters swapped, not the first one of a word; unchanged if it has none."""
    places = [i for i in range(1, len(name) - 1) if name[i : i + 2].isalpha() and name[i] != name[i + 1]]
    if not places:
        return name
    i = drawn.choice(places)
    return name[:i] + name[i + 1] + name[i] + name[i + 2 :]
