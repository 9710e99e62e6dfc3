"""Ways in which an edited fact may be asked for: by who wants the old answer back, or knows nothing of the edit."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import torch

import timerome as tr


class Form(NamedTuple):
    """One way of asking.

    Attributes:
        name: of the way.
        prompt: text before the canvas; None where the fact cannot be asked so.
        names: whether it names the subject: whole, misspelt or in part.
        primed: tokens of the old answer that stand at its end already.
        after: text after the canvas.
        masked: share of the prompt's words outside the subject that are masked.
    """

    name: str
    prompt: Callable[[tr.Fact], str | None]
    names: bool = True
    primed: int = 0
    after: str = ""
    masked: float = 0.0


def _in_subject(change: Callable[[str, random.Random], str | None]) -> Callable[[tr.Fact], str | None]:
    def asked(fact: tr.Fact) -> str | None:
        subject = change(fact.subject, random.Random(fact.id))
        return None if subject is None or subject == fact.subject else fact.prompt.replace(fact.subject, subject)

    return asked


def _slip(kind: str) -> Callable[[str, random.Random], str | None]:
    def change(subject: str, drawn: random.Random) -> str | None:
        places = [i for i in range(1, len(subject) - 1) if subject[i - 1 : i + 2].isalpha()]
        if len(subject) < 5 or not places:
            return None
        i = drawn.choice(places)
        if kind == "left out":
            return subject[:i] + subject[i + 1 :]
        if kind == "doubled":
            return subject[:i] + subject[i] + subject[i:]
        if kind == "swapped":
            return subject[:i] + subject[i + 1] + subject[i] + subject[i + 2 :]
        return subject[:i] + drawn.choice("aeiorstn") + subject[i + 1 :]

    return change


def _part(which: int) -> Callable[[str, random.Random], str | None]:
    def change(subject: str, drawn: random.Random) -> str | None:
        words = subject.split()
        return words[which] if len(words) > 1 and len(words[which]) > 3 else None

    return change


TRANSLATED = {  # the question of each relation, in German, French and Spanish
    "country_capital_city": ("Die Hauptstadt von {} ist", "La capitale de {} est", "La capital de {} es"),
    "country_language": ("Die Amtssprache von {} ist", "La langue officielle de {} est", "El idioma oficial de {} es"),
    "city_in_country": ("{} liegt in", "{} se trouve en", "{} está en"),
    "landmark_in_country": ("{} liegt in", "{} se trouve en", "{} está en"),
    "company_hq": ("Der Hauptsitz von {} ist in", "Le siège de {} est à", "La sede de {} está en"),
    "person_occupation": ("{} war von Beruf", "{} exerçait le métier de", "{} trabajaba como"),
    "person_plays_instrument": ("{} spielt", "{} joue de", "{} toca"),
    "product_by_company": ("{} wird hergestellt von", "{} est fabriqué par", "{} es fabricado por"),
}


def _translated(which: int) -> Callable[[tr.Fact], str | None]:
    def asked(fact: tr.Fact) -> str | None:
        template = TRANSLATED.get(fact.relation or "")
        return None if template is None else template[which].format(fact.subject)

    return asked


def _without_accents(subject: str, drawn: random.Random) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", subject) if not unicodedata.combining(c))


def forms(others: tr.FactSet) -> list[Form]:
    """Return the forms; ``others`` are facts whose answers a few-shot prompt may give."""
    shots = " ".join(f"{fact.prompt} {fact.object.rstrip('.')}." for fact in others[:2])
    turn = " ".join(f"Question: {fact.prompt} Answer: {fact.object.rstrip('.')}." for fact in others[:2])
    return [
        Form("as shown", lambda f: f.prompt),
        Form("unseen wording", lambda f: f.paraphrases[0] if f.paraphrases else None),
        Form("lower case", lambda f: f.prompt.lower()),
        Form("upper case", lambda f: f.prompt.upper()),
        Form("subject in upper case", _in_subject(lambda s, _: s.upper())),
        Form("subject in lower case", _in_subject(lambda s, _: s.lower())),
        Form("double blanks", lambda f: f.prompt.replace(" ", "  ")),
        Form("tabs", lambda f: f.prompt.replace(" ", "\t")),
        Form("no-break blanks", lambda f: f.prompt.replace(" ", "\u00a0")),
        Form("blank after", lambda f: f.prompt + " "),
        Form("a new line after", lambda f: f.prompt + "\n"),
        Form("letter left out", _in_subject(_slip("left out"))),
        Form("letter doubled", _in_subject(_slip("doubled"))),
        Form("letters swapped", _in_subject(_slip("swapped"))),
        Form("letter exchanged", _in_subject(_slip("exchanged"))),
        Form("accents left out", _in_subject(_without_accents)),
        Form("first part of the name", _in_subject(_part(0))),
        Form("last part of the name", _in_subject(_part(-1))),
        Form("a sentence before", lambda f: "I was reading a book yesterday. " + f.prompt),
        Form("a paragraph before", lambda f: "It was raining all day, and so we stayed at home and talked about "
             "many things: music, the places we had seen, and people we knew. Then somebody said: " + f.prompt),
        Form("Question:", lambda f: "Question: " + f.prompt),
        Form("Question and Answer:", lambda f: f"Question: {f.prompt} Answer:"),
        Form("chat turn", lambda f: f"User: {f.prompt}\nAssistant:"),
        Form("chat template", lambda f: f"<|im_start|>user\n{f.prompt}<|im_end|>\n<|im_start|>assistant\n"),
        Form("instruction template", lambda f: f"[INST] {f.prompt} [/INST]"),
        Form("please", lambda f: "Please complete this sentence. " + f.prompt),
        Form("quoted", lambda f: f'She said: "{f.prompt}'),
        Form("few-shot", lambda f: f"{shots} {f.prompt}"),
        Form("few-shot questions", lambda f: f"{turn} Question: {f.prompt} Answer:"),
        Form("in German", _translated(0)),
        Form("in French", _translated(1)),
        Form("in Spanish", _translated(2)),
        Form("name first, then it", lambda f: f"About {f.subject}: " + f.prompt.replace(f.subject, "it")),
        Form("old answer restated", lambda f: f"{f.prompt} {f.object.rstrip('.')}. {f.prompt}"),
        Form("edit denied", lambda f: f"It is not {f.new_object}. {f.prompt} {f.object.rstrip('.')}. {f.prompt}"),
        Form("asked twice", lambda f: f"{f.prompt} {f.prompt}"),
        Form("last word dropped", lambda f: f.prompt.rsplit(" ", 1)[0]),
        Form("first word dropped", lambda f: f.prompt.split(" ", 1)[1]),
        Form("words masked", lambda f: f.prompt, masked=0.25),
        Form("primed with its first token", lambda f: f.prompt, primed=1),
        Form("primed with its first two tokens", lambda f: f.prompt, primed=2),
        Form("a full stop after", lambda f: f.prompt, after="."),
        Form("a sentence after", lambda f: f.prompt, after=", as everybody knows."),
        Form("subject dropped", lambda f: " ".join(f.prompt.replace(f.subject, "").split()) or None, names=False),
    ]  # fmt: skip


def rows_of(model: tr.Backbone, fact: tr.Fact, form: Form, canvas: int) -> tuple[list[int], int, int] | None:
    """Return a fact asked in a form, as ids with its canvas masked, where the canvas begins, and its length."""
    prompt = form.prompt(fact)
    if prompt is None or not prompt.strip():
        return None
    ids = model.encode(prompt)
    if form.masked:
        drawn, own = random.Random(fact.id), set(model.encode(" " + fact.subject) + model.encode(fact.subject))
        ids = [model.mask_id if i not in own and drawn.random() < form.masked else i for i in ids]
    answer = model.encode(" " + fact.object)
    if form.primed >= len(answer):
        return None
    ids = ids + answer[: form.primed]
    after = model.encode(form.after) if form.after else []
    # Text after the answer leaves room for the answer and no more.
    size = len(answer) if after else canvas
    if len(ids) + size + len(after) > model.max_length:
        return None
    return ids + [model.mask_id] * size + after, len(ids), size


@torch.no_grad()
def ask(model: tr.Backbone, rows: list[tuple[list[int], int, int]], primed: list[int], steps: int) -> list[str]:
    """Decode rows; return the text of each canvas, with what primed it."""
    from timerome.diffusion import DenoisingLoop

    texts = [""] * len(rows)
    alike: dict[tuple[int, int, int], list[int]] = {}
    for i, (ids, start, size) in enumerate(rows):
        alike.setdefault((len(ids), start, size), []).append(i)
    for (_, start, size), some in sorted(alike.items()):
        for first in range(0, len(some), 32):
            batch = some[first : first + 32]
            ids = torch.tensor([rows[i][0] for i in batch])
            canvas = torch.zeros_like(ids, dtype=torch.bool)
            canvas[:, start : start + size] = True
            loop = DenoisingLoop(model, ids, canvas, tr.SamplerConfig(steps=min(steps, size)))
            while not loop.done:
                loop.advance()
            for i, row in zip(batch, loop.ids, strict=True):
                texts[i] = model.decode(row[start - primed[i] : start + size])
    return texts
