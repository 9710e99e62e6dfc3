import multiprocessing
import os
import random
import signal
import time

import pytest

import timerome as tr
from tests.tiny import decoded_facts, tiny_llada
from tests.tracing.test_tracer import same
from timerome.tracing import Shard


def tracer(backbone):
    return tr.CausalTracer(backbone, tr.TraceConfig(draws=2, commits="both"))


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_and_resumed_is_the_same(tmp_path, seed):
    """SIGKILL, which leaves no time to tidy up; three times over, then to the end."""
    backbone = tiny_llada()
    facts = decoded_facts(backbone, 6)
    path = tmp_path / "t.jsonl"
    begin = time.monotonic()
    whole = tracer(backbone).trace(facts)
    seconds = time.monotonic() - begin
    draw = random.Random(seed)
    for _ in range(3):
        child = multiprocessing.get_context("fork").Process(
            target=tracer(backbone).trace, args=(facts,), kwargs={"checkpoint": path}
        )
        child.start()
        time.sleep(draw.uniform(0, seconds))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    resumed = tracer(backbone).trace(facts, checkpoint=path)
    assert same(whole, resumed) and whole.summary() == resumed.summary()


def test_processes_that_share_a_trace_give_what_one_gives(tmp_path):
    """Without processes: each share's records, then every share told the others'."""
    backbone = tiny_llada()
    facts = decoded_facts(backbone, 5)
    whole = tracer(backbone).trace(facts)
    # What a process sends does not depend on what it receives first, so its messages can be collected in turn.
    first: dict[int, bytes] = {}

    class KilledError(Exception):
        pass

    for rank in range(3):

        def stop(mine, rank=rank):
            first[rank] = mine
            raise KilledError

        with pytest.raises(KilledError):
            tracer(backbone).trace(facts, checkpoint=tmp_path / "t.jsonl", shard=Shard(rank, 3, stop))
    second: dict[int, bytes] = {}
    for rank in range(3):

        def gather(mine, rank=rank):
            if mine == first[rank]:
                return [first[r] for r in range(3)]
            second[rank] = mine
            raise KilledError

        with pytest.raises(KilledError):
            tracer(backbone).trace(facts, checkpoint=tmp_path / "t.jsonl", shard=Shard(rank, 3, gather))
    for rank in range(3):
        parts = {**{first[r]: first for r in first}, **{second[r]: second for r in second}}

        def tell(mine, parts=parts):
            return [parts[mine][r] for r in range(3)]

        found = tracer(backbone).trace(facts, checkpoint=tmp_path / "t.jsonl", shard=Shard(rank, 3, tell))
        assert same(whole, found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.jsonl", "t.jsonl.1", "t.jsonl.2"]


def test_a_shard_outside_its_world_is_refused():
    with pytest.raises(ValueError, match="rank"):
        Shard(2, 2)
