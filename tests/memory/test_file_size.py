"""What an edit file costs at the width of an 8B model, a fact; and that what is left out of it decides nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import timerome as tr
from tests.tiny import tiny_facts, tiny_llada
from timerome.functional.gate import deciding
from timerome.memory import Edit, Settings
from timerome.memory.address import threshold_of, wordings
from timerome.memory.background import Background, Frame
from timerome.memory.edit import Part
from timerome.memory.files import _all_scores
from timerome.memory.settings import Place
from timerome.splits import bundled_facts

D, KB = 4096, 1024
AT = tr.Coordinate(20)
FACTS = bundled_facts("relations")


def memory_of(kind: str, n: int) -> tr.EditMemory:
    """Edits of rank 1 with random tensors: one key and one target, or one change of one place of the answer.

    ``half`` in the kind: keys as a bfloat16 model gives them.
    """
    generator = torch.Generator().manual_seed(0)

    def rows(count: int = 1) -> torch.Tensor:
        return torch.randn(count, D, generator=generator)

    bank = tr.BankConfig(canvases=(None,))
    by_place, addressed = kind == "by place", kind != "paper"
    own = Settings(
        AT, rank=1, bank=bank, shared=not addressed, by_place=by_place, estimator="lens" if by_place else "null"
    )  # fmt: skip

    def keys() -> torch.Tensor:
        found = rows(0 if by_place else 1)
        return found.bfloat16().float() if "half" in kind else found

    negatives = FACTS[100:150]
    background = Background(
        tr.Gate(negatives, layer=20), None, bank, {Place.of(AT): Frame(rows()[0], 1.0, None)}, rows()[0]
    ) if addressed else Background()  # fmt: skip
    w = sum(len(wordings(fact)) for fact in negatives)
    edits = [
        Edit(
            fact.id, fact.with_new_object("Lagos") if by_place else fact, own,
            (Part(AT, keys(), rows()),), address=rows() if addressed else None,
            subject=((17, 240),) if addressed else (), address_scores=torch.rand(w) if addressed else None,
        )
        for fact in FACTS[:n]
    ]  # fmt: skip
    return tr.EditMemory(own, edits, background=background, fingerprint="0" * 16, tokenizer="0" * 16)


def bytes_a_fact(kind: str, dtype: torch.dtype, folder: Path) -> float:
    sizes = []
    for n in (10, 30):
        memory_of(kind, n).save(folder / "edit.safetensors", dtype=dtype)
        sizes.append((folder / "edit.safetensors").stat().st_size)
    return (sizes[1] - sizes[0]) / 20


@pytest.mark.parametrize("kind", ["paper", "by place"])
def test_a_fact_of_rank_1_takes_33_kb_and_half_of_it_in_bfloat16(kind: str, tmp_path: Path) -> None:
    assert bytes_a_fact(kind, torch.float32, tmp_path) <= 33 * KB
    assert bytes_a_fact(kind, torch.bfloat16, tmp_path) <= 33 * KB / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gate_adds_an_address_in_half_precision_and_little_else(dtype: torch.dtype, tmp_path: Path) -> None:
    added = bytes_a_fact("keys and address", dtype, tmp_path) - bytes_a_fact("paper", dtype, tmp_path)
    assert 2 * D <= added <= 2 * D + 64


def test_keys_of_a_half_precision_model_take_half_the_bytes_and_lose_nothing(tmp_path: Path) -> None:
    kind, path = "half, keys and address", tmp_path / "edit.safetensors"
    assert bytes_a_fact(kind, torch.float32, tmp_path) <= 33 * KB
    memory = memory_of(kind, 3)
    memory.save(path)
    again = tr.EditMemory.load(path)
    for one, two in zip(memory.history, again.history, strict=True):
        assert torch.equal(one.keys, two.keys) and torch.equal(one.targets, two.targets)
    for one, two in zip(memory.systems, again.systems, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.solved, two.solved, strict=True))


# Scores that are left out ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.none() | st.floats(0.001, 0.999), st.integers(0, 2**16))
def test_the_largest_scores_of_each_edit_decide_alone(n: int, edits: int, epsilon: float | None, seed: int) -> None:
    """For the edits that are left, whichever those are; ties included."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 12, (edits, n), generator=generator) / 12
    largest = scores.topk(deciding(n, epsilon), 1)
    again = _all_scores(largest.values, largest.indices, n)
    left = torch.rand(edits, generator=generator) < 0.7
    left[0] = True
    try:
        wanted = threshold_of(scores[left].amax(0), epsilon)
    except ValueError:  # too few to promise it
        return
    assert threshold_of(again[left].amax(0), epsilon) == wanted
    assert (again >= scores - 1e-6).all()


def test_an_address_is_in_the_file_to_the_last_bit(tmp_path: Path) -> None:
    backbone = tiny_llada()
    gate = tr.Gate(tr.FactSet(tiny_facts(8)[4:]), layer=1)
    memory = tr.EditMemory.build(backbone, tiny_facts(2), gate=gate)
    memory.save(tmp_path / "edit.safetensors")
    again = tr.EditMemory.load(tmp_path / "edit.safetensors", backbone)
    assert memory.book is not None and again.book is not None
    assert torch.equal(memory.book.vectors, again.book.vectors)
    assert memory.book.threshold == again.book.threshold
    torch.testing.assert_close(memory.book.vectors.norm(dim=1), torch.ones(len(memory.book.vectors)), rtol=0, atol=1e-3)
