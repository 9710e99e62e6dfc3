import pytest
import torch

from timerome.functional.corruption import noise_std, seeded_generator, subject_noise


def test_noise_std_is_over_tokens_and_dimensions_together():
    embeddings = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert noise_std(embeddings) == pytest.approx(float(embeddings.flatten().std()), rel=1e-6)
    assert noise_std(embeddings.bfloat16()) == pytest.approx(noise_std(embeddings), rel=0.01)


def test_noise_std_needs_finite_entries():
    with pytest.raises(ValueError, match="two entries"):
        noise_std(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="not finite"):
        noise_std(torch.tensor([[1.0, float("nan")]]))


def test_a_generator_depends_on_seed_and_key_alone():
    def draw(*key):
        return torch.rand(3, generator=seeded_generator(*key)).tolist()

    assert draw(0, "a", 1) == draw(0, "a", 1)
    assert (
        len({tuple(draw(*key)) for key in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a"), (0, "a1")]})
        == 6
    )


def test_noise_is_where_it_should_be_and_as_large():
    positions = torch.arange(400) % 2 == 0
    noise = subject_noise(positions, 64, 3.0, torch.Generator().manual_seed(0))
    assert not noise[~positions].any()
    assert float(noise[positions].std()) == pytest.approx(3.0, rel=0.02)
    assert float(noise[positions].mean()) == pytest.approx(0.0, abs=0.1)
    assert not subject_noise(positions, 4, 0.0, torch.Generator()).any()
    for std in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="std"):
            subject_noise(positions, 4, std, torch.Generator())
