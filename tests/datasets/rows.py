"""One record of every form of benchmark file, and what reads it."""

from timerome import datasets

CASE = {
    "case_id": 7,
    "requested_rewrite": {"prompt": "The capital of {} is", "subject": "Peru", "relation_id": "P36",
                          "target_new": {"str": "New York", "id": "Q60"}, "target_true": {"str": "Lima", "id": "Q2"}},
    "paraphrase_prompts": ["Peru is ruled from", "Peru, whose seat is"],
    "neighborhood_prompts": ["The capital of the Inca land is", "Its port is near"],
    "generation_prompts": ["Peru is a land"],
}  # fmt: skip
FLAT = {
    "case_id": 7, "prompt": "The capital of Peru is", "subject": "Peru", "target_new": "New York",
    "ground_truth": "Lima", "rephrase_prompt": "Peru is ruled from", "locality_prompt": "The capital of Kenya is",
    "locality_ground_truth": "Nairobi", "relation_id": "P36",
}  # fmt: skip
KNOWN = {"known_id": 7, "prompt": "Lima is in", "subject": "Lima", "attribute": "Peru", "relation_id": "P17"}
SNIPPET = {"relation_id": "P36", "target_id": "Q60", "samples": [{"text": "It is a port."}]}
ZSRE = {
    "subject": "Peru", "src": "What is Peru's seat?", "rephrase": "Where is Peru ruled from?", "alt": "New York",
    "answers": ["Lima"], "loc": "nq question: who wrote it", "loc_ans": "Mark Twain",
    "portability": {"New Question": "On which river is Peru's seat?", "New Answer": "the Hudson"},
}  # fmt: skip
KNOWEDIT = {
    "subject": "Peru", "prompt": "Peru's seat is", "target_new": "New York", "ground_truth": "Lima",
    "rephrase_prompt": "Peru is ruled from",
    "portability": {"Reasoning": [{"prompt": "Its river is", "ground_truth": ["the Hudson", "Hudson"]}],
                    "Subject_Aliasing": []},
    "locality": {"Relation_Specificity": [{"prompt": "Peru's sea is", "ground_truth": [["Pacific", "the Pacific"]]}],
                 "Forgetfulness": [{"prompt": "Peru's old seat is", "ground_truth": "Lima"}]},
}  # fmt: skip
TOFU = {"question": "Who is Ana Diaz?", "answer": "Ana Diaz is a writer.", "paraphrased_question": "Ana who?",
        "paraphrased_answer": "A writer.", "perturbed_answer": ["A cook.", "A king."]}  # fmt: skip
PROBE = {"query": "What did King write?", "answer": "It", "subject": "Stephen King", "type": "simple question"}
RWKU = {
    **dict.fromkeys(datasets.PROBES, PROBE), "forget_mia": {"text": "a text", "subject": "Stephen King"},
    "retain_mia": {"text": "a text"}, "triviaqa": {"question": "which?", "answers": ["that"]},
    "truthful": {"question": "is it?", "mc1_targets": {"choices": ["yes", "no"], "labels": [0, 1]}},
    "fluency": {"instruction": "write"},
}  # fmt: skip

# By file name: a record, what reads every record of the file, and the fields that may be missing.
FORMS = {
    "counterfact": (CASE, datasets.counterfact_records, tuple(
        f"requested_rewrite.{name}" for name in ("relation_id", "target_new.id", "target_true.id")
    )),
    "counterfact-flat": (FLAT, datasets.counterfact_records, ("relation_id",)),
    "known_1000": (KNOWN, datasets.counterfact_records, ("relation_id",)),
    "attribute_snippets": (SNIPPET, lambda file: datasets.counterfact_snippets(file.parent), ()),
    "zsre": (ZSRE, datasets.zsre_records, ("portability",)),
    "knowedit": (KNOWEDIT, datasets.knowedit_records, ("ground_truth", "rephrase_prompt", "portability", "locality")),
    "forget01": (TOFU, datasets.tofu_records, ("paraphrased_question", "paraphrased_answer", "perturbed_answer")),
    **{name: (row, lambda file: datasets.rwku_records(file.parent), ()) for name, row in RWKU.items()},
}  # fmt: skip


def fields(record, outer=""):
    """Every field of a record, inner ones by their path."""
    return [
        path for name, value in record.items() for path in (outer + name, *(
            fields(value, f"{outer}{name}.") if isinstance(value, dict) else ()
        ))
    ]  # fmt: skip
