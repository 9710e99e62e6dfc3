"""The bundled testbed is what the README says: it knows its facts, looks both ways, and fits in its budget."""

from importlib.resources import files
from itertools import product

import pytest
import torch

import timerome as tr
from timerome.backbones.testbed import TestbedConfig, TestbedModel
from timerome.diffusion import encode
from timerome.functional.text import rouge_l
from timerome.splits import bundled_facts

ASSETS = files("timerome") / "assets"


@pytest.fixture(scope="module")
def testbed():
    return tr.load("testbed")


def token_accuracy(backbone, facts, wording):
    right = total = 0
    with torch.inference_mode():
        for fact in facts:
            for prompt in [fact.prompt] if wording == "prompt" else fact.paraphrases:
                sequence = encode(backbone, fact, prompt=prompt)
                logits = backbone.logits(sequence.masked(backbone.mask_id)[None], sequence.canvas[None])
                hit = logits[0].argmax(-1)[sequence.canvas] == sequence.answer
                right, total = right + int(hit.sum()), total + len(hit)
    return right / total


@pytest.mark.parametrize(
    ("name", "wording"),
    [*product(["forget01", "retain", "relations"], ["prompt", "paraphrase"])]
    + [("real_authors", "prompt"), ("world_facts", "prompt")],
)
def test_it_recalls_its_facts_from_a_fully_masked_answer(testbed, name, wording):
    assert token_accuracy(testbed, bundled_facts(name), wording) >= 0.99


def test_it_generates_its_facts_by_low_confidence_decoding(testbed):
    facts = list(bundled_facts("forget01")) + list(bundled_facts("retain"))[::10]
    texts = tr.generate(testbed, [f.prompt for f in facts], canvas=96, config=tr.SamplerConfig(steps=48))
    pairs = list(zip(texts, facts, strict=True))
    assert sum(t == f.object for t, f in pairs) / len(facts) >= 0.95
    assert sum(rouge_l(f.object, t) for t, f in pairs) / len(facts) >= 0.99


def test_it_refuses_what_it_was_taught_not_to_know(testbed):
    facts = bundled_facts("unknown")[:200:10]
    texts = tr.generate(testbed, [f.prompt for f in facts], canvas=32)
    assert sum(t == "I don't have that information." for t in texts) / len(facts) >= 0.95


def tiny(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return TestbedModel(TestbedConfig(mask_token_id=0, vocab_size=20, **{**sizes, **changes})).eval()


@torch.inference_mode()
def test_the_first_position_sees_the_last_token(testbed, tmp_path):
    for model in (testbed.model, tiny()):
        ids = torch.tensor([[2, 3, 4, 5]])
        other = torch.tensor([[2, 3, 4, 6]])
        assert not torch.allclose(model(input_ids=ids).logits[0, 0], model(input_ids=other).logits[0, 0])
    tiny().save_pretrained(tmp_path)
    again = TestbedModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, tiny()(input_ids=ids).logits)


@torch.inference_mode()
def test_padding_changes_nothing():
    model = tiny()
    ids = torch.tensor([[2, 3, 4, 5]])
    padded = model(input_ids=torch.tensor([[2, 3, 4, 5, 1, 1]]), attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]))
    assert torch.allclose(padded.logits[:, :4], model(input_ids=ids).logits, atol=1e-5)


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        tiny()()
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 4\)"):
        tiny()(input_ids=torch.ones(1, 4).long(), attention_mask=torch.ones(1, 3))


def test_assets_fit_in_16_megabytes():
    def size(folder):
        return sum(size(p) if p.is_dir() else len(p.read_bytes()) for p in folder.iterdir())

    assert size(ASSETS) <= 16_000_000
