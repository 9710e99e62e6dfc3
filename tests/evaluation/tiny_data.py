"""A small file of every benchmark, about what the planted model of ``tests.tiny`` knows."""

from __future__ import annotations

from pathlib import Path

from tests.evaluation.scripted import write
from tests.tiny import planted, tiny_facts
from timerome import BankConfig, EditMemory, Ridge
from timerome.evaluation.run import BenchmarkSettings

FACTS = tiny_facts(4)
BENCHMARKS = ("tofu", "rwku", "counterfact", "zsre", "knowedit")
SPLITS = {"knowedit": "wiki_recent"}


def settings(benchmark: str, **more) -> BenchmarkSettings:
    """Short canvases and few draws, so that a run takes a moment."""
    how = {"split": SPLITS.get(benchmark), "samples": 2, "canvas": 4, "steps": 4, "generation": 6}
    return BenchmarkSettings(**{**how, **more})


def edit(backbone=None) -> EditMemory:
    """An edit that forgets the first two facts."""
    memory = EditMemory(backbone or planted())
    memory.forget(FACTS[:2], answer=None, method=Ridge("null", states=BankConfig(canvases=(None, 4))), at=1)
    return memory


def write_data(benchmark: str, folder: Path) -> Path:
    """Write a benchmark's files into a folder of its own; return that folder."""
    folder = folder / benchmark
    {"tofu": _tofu, "rwku": _rwku, "counterfact": _counterfact, "zsre": _zsre, "knowedit": _knowedit}[benchmark](folder)
    return folder


def _tofu(folder: Path) -> None:
    rows = [
        {"question": f.prompt, "answer": f.object, "paraphrased_answer": f.object,
         "perturbed_answer": ["king river land", "old new north"]}
        for f in FACTS
    ]  # fmt: skip
    write(folder / "forget01_perturbed.json", rows[:2])
    write(folder / "retain_perturbed.json", rows[2:])
    options = [{k: row[k] for k in ("question", "answer", "perturbed_answer")} for row in rows]
    write(folder / "real_authors_perturbed.json", options[2:])
    write(folder / "world_facts_perturbed.json", options[2:])
    write(folder / "holdout01.json", [{"question": f.prompt, "answer": "old river king"} for f in FACTS[2:]])


def _rwku(folder: Path) -> None:
    def probes(facts, *kinds):
        return [
            {"query": f.prompt, "answer": f.object, "subject": "kenya", "type": kind}
            for f, kind in zip(facts, kinds * 2, strict=False)
        ]  # fmt: skip

    write(folder / "forget_level1.json", probes(FACTS[:2], "simple"))
    write(folder / "forget_level2.json", probes(FACTS[:2], "simple"))
    write(folder / "forget_level3.json", probes(FACTS[:2], "prefix injection", "affirmative suffix"))
    write(folder / "neighbor_level1.json", probes(FACTS[2:], "simple"))
    write(folder / "neighbor_level2.json", probes(FACTS[2:], "simple"))
    for name, facts in (("forget_mia", FACTS[:2]), ("retain_mia", FACTS[2:])):
        write(folder / f"{name}.json", [{"text": f"{f.prompt} {f.object}", "subject": "kenya"} for f in facts])
    choices = {"choices": [FACTS[3].object, "king river land"], "labels": [1, 0]}
    write(folder / "truthful.json", [{"question": FACTS[3].prompt, "mc1_targets": choices}])
    write(folder / "triviaqa.json", [{"question": f.prompt, "answers": [f.object]} for f in FACTS * 2])
    write(folder / "fluency.json", [{"instruction": "the old king"}])


def _counterfact(folder: Path) -> None:
    rows, snippets = [], []
    for i, fact in enumerate(FACTS):
        other = FACTS[i - 1]
        rewrite = {
            "prompt": fact.prompt.replace(fact.subject, "{}"), "subject": fact.subject, "relation_id": f"P{i % 2}",
            "target_new": {"str": other.object, "id": f"Q{i}"}, "target_true": {"str": fact.object, "id": f"Q{i + 9}"},
        }  # fmt: skip
        rows.append({
            "case_id": i, "requested_rewrite": rewrite, "paraphrase_prompts": [f"what is the city of {fact.subject}"],
            "neighborhood_prompts": [f"the north and {fact.subject}"],
            "generation_prompts": [f"the old land named {fact.subject}"],
        })  # fmt: skip
        snippets.append(
            {"relation_id": f"P{i % 2}", "target_id": f"Q{i}", "samples": [{"text": f"the {other.object}"}]}
        )
    write(folder / "counterfact.json", rows)
    write(folder / "attribute_snippets.json", snippets)


def _zsre(folder: Path) -> None:
    write(folder / "zsre.json", [
        {"subject": f.subject, "src": f.prompt, "rephrase": f"what is the city of {f.subject}", "alt": f.object,
         "answers": [f.object], "loc": f"the old {g.subject}", "loc_ans": g.object,
         "portability": {"New Question": f"where is {f.subject}", "New Answer": f.object}}
        for f, g in zip(FACTS, reversed(FACTS), strict=True)
    ])  # fmt: skip


def _knowedit(folder: Path) -> None:
    write(folder / "wiki_recent" / "recent.json", [
        {"subject": f.subject, "prompt": f.prompt,
         "target_new": f.object, "rephrase_prompt": f"the city of {f.subject}",
         "portability": {"Reasoning": [{"prompt": f"where is {f.subject}", "ground_truth": [[f.object]]}]},
         "locality": {"Relation_Specificity": [{"prompt": f"the old {g.subject}", "ground_truth": [g.object]}]}}
        for f, g in zip(FACTS, reversed(FACTS), strict=True)
    ])  # fmt: skip
