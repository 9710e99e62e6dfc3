"""Collect the testbed's facts from the benchmark subsets into the package's assets.

    python benchmarks/testbed/collect.py DATA_DIR

``DATA_DIR`` holds ``tofu/`` and ``lre/`` (MIT, see timerome/assets/LICENSES.txt). Run once; the results are committed.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "timerome" / "assets"
RELATIONS = {  # LRE relation -> number of facts
    "country_capital_city": 24,
    "country_language": 24,
    "city_in_country": 26,
    "company_hq": 40,
    "landmark_in_country": 40,
    "person_occupation": 40,
    "person_plays_instrument": 40,
    "product_by_company": 40,
}
UNKNOWN_AUTHORS = range(160, 180)  # blocks of 20 records of the full set; disjoint from 0-19 and from forget01


def relation_facts(data: Path, name: str, count: int) -> list[dict[str, object]]:
    """Return ``count`` facts of an LRE relation, one per subject, each under all its templates."""
    relation = json.loads((data / "lre" / "factual" / f"{name}.json").read_text())
    templates = list(dict.fromkeys(relation["prompt_templates"] + relation["prompt_templates_zs"]))[:4]
    objects = {sample["subject"]: sample["object"] for sample in relation["samples"]}
    subjects = sorted(objects)
    random.Random(0).shuffle(subjects)
    return [
        {
            "id": f"{name}-{i}",
            "relation": name,
            "subject": subject,
            "object": objects[subject],
            "prompt": templates[0].format(subject),
            "paraphrases": [template.format(subject) for template in templates[1:]],
        }
        for i, subject in enumerate(subjects[:count])
    ]


def main(data: Path) -> None:
    """Write ``tofu/*.json`` and ``relations.jsonl`` below the assets folder."""
    (ASSETS / "tofu").mkdir(parents=True, exist_ok=True)
    for name in ("forget01", "retain", "real_authors", "world_facts"):
        shutil.copyfile(data / "tofu" / f"{name}_perturbed.json", ASSETS / "tofu" / f"{name}_perturbed.json")
    full = json.loads((data / "tofu" / "full.json").read_text())
    unknown = [record for author in UNKNOWN_AUTHORS for record in full[20 * author : 20 * author + 20]]
    (ASSETS / "tofu" / "unknown_authors.json").write_text(json.dumps(unknown, ensure_ascii=False, indent=0) + "\n")
    facts = [fact for name, count in RELATIONS.items() for fact in relation_facts(data, name, count)]
    (ASSETS / "relations.jsonl").write_text("".join(json.dumps(fact, ensure_ascii=False) + "\n" for fact in facts))
    print(f"{len(facts)} relation facts, {len(unknown)} records of authors to be unknown")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
