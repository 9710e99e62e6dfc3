"""One memory and many threads: what each of them gets is what it would get alone, bit for bit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import timerome as tr
from tests.lightning.loops import count_hooks, gated_memory, masked_rows, shared_memory
from tests.tiny import MASK, decoded_facts, tiny_dream, tiny_facts, tiny_llada

CONFIG = tr.SamplerConfig(steps=3)


@pytest.fixture(scope="module", params=[tiny_llada, tiny_dream])
def backbone(request: pytest.FixtureRequest) -> tr.Backbone:
    return request.param()


def logits(backbone: tr.Backbone, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return backbone.model(rows).logits


def loop(backbone: tr.Backbone, rows: Tensor) -> Tensor:
    """Someone else's sampler."""
    ids = rows.clone()
    for position in range(ids.shape[1] - 3, ids.shape[1]):
        ids[:, position] = logits(backbone, ids)[:, position - backbone.shift].argmax(-1)
    return ids


def jobs(backbone: tr.Backbone) -> list[Callable[[], Any]]:
    """What threads do, each thing by itself."""
    facts, rows = tiny_facts(8), masked_rows(backbone, 8)
    return [
        *(lambda f=f: tr.generate(backbone, f.prompt, canvas=3, config=CONFIG) for f in facts[:4]),
        *(lambda i=i: logits(backbone, rows[i : i + 2]) for i in range(0, 6, 2)),
        *(lambda i=i: loop(backbone, rows[i : i + 1]) for i in (0, 2, 5)),
        lambda: tr.generate(backbone, [f.prompt for f in facts[4:]], canvas=3, config=CONFIG),
    ]


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("kind", ["placed", "keyed", "paper"])
def test_threads_get_what_each_would_alone(backbone: tr.Backbone, kind: str) -> None:
    """F3: generating, bare forwards and foreign loops, under one memory that others attach and leave meanwhile."""
    if kind == "placed":
        memory = gated_memory(backbone, slice(0, 4))
    elif kind == "paper":
        memory = shared_memory(backbone, slice(0, 2))
    else:  # acts before the last block, so that candidates are asked in forwards of their own
        memory = tr.EditMemory(backbone)
        states = tr.BankConfig((None,), (0.0,))
        memory.forget(decoded_facts(backbone, 4), answer=None, at=1, method=tr.Ridge(sparsity=0.0, states=states))
    work = jobs(backbone)
    plain = [job() for job in work]
    with memory.attached() as run:
        wanted = [job() for job in work]
        assert not all(map(same, plain, wanted))
        before = run.hits
        wrong: list[Any] = []
        stop = threading.Event()

        def beside() -> None:
            while not stop.is_set():
                with memory.attached():
                    pass

        def one(n: int) -> None:
            i = n % len(work)
            try:
                found = work[i]()
                if not same(found, wanted[i]):
                    wrong.append((i, found))
            except BaseException as error:  # none at all, and no BaseException from another thread's reading
                wrong.append((i, repr(error)))

        other = threading.Thread(target=beside)
        other.start()
        try:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(one, range(2 * len(work))))
        finally:
            stop.set()
            other.join()
        assert not wrong
        assert run.hits == {name: 3 * n for name, n in before.items()}
    assert all(map(same, [job() for job in work], plain))
    assert count_hooks(backbone.model) == 0


def test_threads_without_a_memory_leave_nothing_behind(backbone: tr.Backbone) -> None:
    """F3b: neither a canvas nor rows nor a loop stay announced, so later loops are edited as ever."""
    memory, rows = gated_memory(backbone, slice(0, 3)), masked_rows(backbone, 5)
    with memory.attached():
        before = loop(backbone, rows)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: tr.generate(backbone, tiny_facts(5)[i % 5].prompt, canvas=3), range(40)))
    said = backbone.announced
    assert (said.canvas, said.loop, said.rows) == (None, None, None)
    with memory.attached() as run:
        assert torch.equal(loop(backbone, rows), before)
    assert run.hits == {"tiny-0": 3, "tiny-1": 3, "tiny-2": 3}


def test_attaching_in_one_thread_edits_in_all_and_selecting_in_one_alone(backbone: tr.Backbone) -> None:
    memory, rows = gated_memory(backbone, slice(0, 2)), masked_rows(backbone, 2)
    plain = logits(backbone, rows)
    with memory.attached() as run, ThreadPoolExecutor(1) as pool:
        every = logits(backbone, rows)
        assert torch.equal(pool.submit(logits, backbone, rows).result(), every)
        run.select([[], []])
        assert torch.equal(logits(backbone, rows), plain)
        assert torch.equal(pool.submit(logits, backbone, rows).result(), every)


def test_tasks_select_for_themselves(backbone: tr.Backbone) -> None:
    memory, rows = gated_memory(backbone, slice(0, 2)), masked_rows(backbone, 2)
    found: dict[str, Tensor] = {}
    with memory.attached() as run:

        async def ask(name: str, sets: list[Any] | None) -> None:
            run.select(sets)
            await asyncio.sleep(0)
            found[name] = logits(backbone, rows)

        async def main() -> None:
            await asyncio.gather(ask("none", [[], []]), ask("all", None), ask("first", [None, []]))

        asyncio.run(main())
        every = logits(backbone, rows)
    plain = logits(backbone, rows)
    assert torch.equal(found["none"], plain)
    assert torch.equal(found["all"], every)
    assert torch.equal(found["first"], torch.stack([every[0], plain[1]]))


def test_edits_made_in_one_thread_act_in_the_others_from_their_next_forward_on(backbone: tr.Backbone) -> None:
    """A forward takes the edits as they are when it begins: old or new, never half of each."""
    memory, rows = gated_memory(backbone), masked_rows(backbone, 1)
    fact = decoded_facts(backbone, 1)[0]
    plain = logits(backbone, rows)
    with memory.attached():
        first = logits(backbone, rows)
        memory.replace(fact, "born new land")
        second = logits(backbone, rows)
        memory.undo(*[e.id for e in memory.edits])
        wrong, stop = [], threading.Event()

        def watch() -> None:
            while not stop.is_set():
                found = logits(backbone, rows)
                if not any(torch.equal(found, known) for known in (plain, first, second)):
                    wrong.append(found)

        threads = [threading.Thread(target=watch) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(6):
            name = memory.replace(fact, "born new land").id
            memory.undo(name)
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert torch.equal(logits(backbone, rows), plain)
    assert (rows == MASK).any()
