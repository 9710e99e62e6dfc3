"""Many threads with one memory, attached and detached beside them: bit for bit what each gives alone; writes JSON.

python -m benchmarks.editing.threads [--calls 10000] [--workers 8]
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import timerome as tr
from timerome.splits import editing_split

from .common import start


def measure(model: tr.Backbone, calls: int, workers: int) -> dict[str, Any]:
    """Ask 24 questions, edited ones and others: by ``generate``, and by forwards of a loop nobody announces."""
    facts = editing_split().relations[:12]
    others = editing_split().held_out_relations[:12]
    memory = tr.EditMemory(model)
    memory.replace(facts)
    prompts = [f.prompt for pair in zip(facts, others, strict=True) for f in pair]
    config = tr.SamplerConfig(steps=4)

    @torch.no_grad()
    def loop(prompt: str) -> list[int]:
        ids = torch.tensor([model.encode(prompt) + [model.mask_id] * 4])
        for _ in range(4):
            confidence, tokens = model.model(ids).logits.softmax(-1).max(-1)
            surest = confidence.masked_fill(ids != model.mask_id, -1).argmax(1, keepdim=True)
            ids = ids.scatter(1, surest, tokens.gather(1, surest))
        return ids[0].tolist()

    def logits(prompt: str) -> bytes:
        with torch.no_grad():
            ids = torch.tensor([model.encode(prompt) + [model.mask_id] * 4])
            return model.model(ids).logits.numpy().tobytes()

    jobs = {
        "generate": lambda p: tr.generate(model, p, canvas=4, config=config), "loop": loop, "logits": logits,
    }  # fmt: skip
    found: Counter[str] = Counter()
    stop = threading.Event()

    def beside() -> None:
        while not stop.is_set():
            with memory.attached():
                stop.wait(0.001)

    with memory.attached():
        wanted = {(kind, p): job(p) for kind, job in jobs.items() for p in prompts}
        restless = threading.Thread(target=beside)
        restless.start()
        kinds = list(jobs)

        def call(i: int) -> None:
            kind, prompt = kinds[i % len(kinds)], prompts[(i // len(kinds)) % len(prompts)]
            try:
                same = jobs[kind](prompt) == wanted[kind, prompt]
                found[f"{kind}, {'same' if same else 'other'}"] += 1
            except BaseException as error:
                found[f"{kind}, {type(error).__name__}"] += 1

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(call, range(calls)))
        stop.set()
        restless.join()
    edited = sum(tr.generate(model, p, canvas=4, config=config) != wanted["generate", p] for p in prompts)
    return {"calls": calls, "workers": workers, "found": dict(found), "texts that the memory changes": edited}


def main() -> None:
    model, results, arguments = start("threads", calls=10000, workers=8)
    depends = {"calls": arguments.calls, "workers": arguments.workers}
    found = results.row("threads", depends, lambda: measure(model, arguments.calls, arguments.workers))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
