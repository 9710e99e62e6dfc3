"""The testbed architecture: a Llama that attends in both directions, on transformers 4.46 and 5.x alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


class TestbedConfig(LlamaConfig):
    """Configuration of :class:`TestbedModel`: a ``LlamaConfig`` that also names the mask token."""

    model_type = "timerome_testbed"
    __test__ = False

    def __init__(self, mask_token_id: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mask_token_id = mask_token_id
        # v5 reads this; 4.x ignores it silently and stays causal, hence the explicit mask in `forward`.
        self.is_causal = False
        self.use_cache = False


class TestbedModel(LlamaForCausalLM):
    """A masked diffusion language model with Llama's layers and full attention.

    ``forward`` takes ``input_ids`` or ``inputs_embeds`` of batch B and length L and an optional boolean or 0/1
    ``attention_mask`` of shape ``(B, L)`` (0 = padding); logits have shape ``(B, L, V)`` and are not shifted.
    """

    config_class = TestbedConfig
    __test__ = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model with every position attending to every position that is not padding."""
        source = input_ids if input_ids is not None else inputs_embeds
        if source is None:
            raise ValueError("TestbedModel: give input_ids or inputs_embeds; got neither.")
        batch, length = source.shape[:2]
        # A 4-D additive mask is taken as it is by every supported transformers version.
        rows = 1 if attention_mask is None else batch  # one for all, so that rows may join a running forward
        bias = torch.zeros(rows, 1, length, length, dtype=self.dtype, device=source.device)
        if attention_mask is not None:
            if attention_mask.shape != (batch, length):
                raise ValueError(
                    f"TestbedModel: expected attention_mask of shape {(batch, length)}, got "
                    f"{tuple(attention_mask.shape)}."
                )
            bias = bias.masked_fill(~attention_mask.bool()[:, None, None, :], torch.finfo(self.dtype).min)
        kwargs["use_cache"] = False
        return super().forward(input_ids=input_ids, attention_mask=bias, inputs_embeds=inputs_embeds, **kwargs)
