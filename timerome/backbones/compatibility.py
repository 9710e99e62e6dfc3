"""What breaks when published modelling files meet another transformers version than their authors', and its mending.

transformers 5 dropped a config attribute and an entry of a table that these files read, calls a method with an argument
they do not know, and, worst, builds models in a way that leaves buffers which are not in the checkpoint uninitialised:
the rotary frequencies, so that the logits are wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn


def mend(model: nn.Module) -> tuple[str, ...]:
    """Put right what is known to break in an already built model; say what was.

    Nothing that is in a checkpoint is changed: only derived buffers and attributes that are missing.
    """
    done = [*_mend_config(model), *_mend_rotary(model), *_mend_attention_types(model)]
    return tuple(done)


def _mend_config(model: nn.Module) -> Iterator[str]:
    if type(model).__module__.startswith("transformers."):
        return  # its own classes do not read what its configs do not have
    config = getattr(model, "config", None)
    # Every layer of the model shares one config object, or holds one of its own that was made from it.
    inner = getattr(getattr(model, "model", None), "config", None)
    for found in {id(c): c for c in (config, inner)}.values():
        if found is not None and hasattr(found, "to_dict") and not hasattr(found, "use_cache"):
            found.use_cache = False
            yield "config.use_cache was missing; set to False"


def _mend_rotary(model: nn.Module) -> Iterator[str]:
    """Recompute rotary frequencies that differ from what their own initialiser gives."""
    wrong = 0
    for module in model.modules():
        frequencies, initialise = getattr(module, "inv_freq", None), getattr(module, "rope_init_fn", None)
        # Scaled variants change their frequencies as sequences grow: those are none of our business.
        if not isinstance(frequencies, Tensor) or initialise is None or frequencies.is_meta:
            continue
        if "dynamic" in str(getattr(module, "rope_type", "")) or "longrope" in str(getattr(module, "rope_type", "")):
            continue
        arguments = getattr(module, "rope_kwargs", None) or {}
        right, scaling = initialise(getattr(module, "config", None), torch.device("cpu"), **arguments)
        right = right.to(frequencies.device, frequencies.dtype)
        if frequencies.shape == right.shape and torch.allclose(frequencies, right, rtol=1e-2, atol=0):
            continue
        with torch.no_grad():
            module.inv_freq = right
        # Kept beside the buffer by these files, and possibly still on the meta device.
        if hasattr(module, "original_inv_freq"):
            module.original_inv_freq = right
        if hasattr(module, "attention_scaling"):
            module.attention_scaling = scaling
        wrong += 1
    if wrong:
        yield f"rotary frequencies of {wrong} module(s) held other values than the config gives; recomputed"


def _mend_attention_types(model: nn.Module) -> Iterator[str]:
    """Layers of transformers 5.23 no longer carry the attention type that subclasses written for 4.57 read."""
    config, layers = getattr(model, "config", None), getattr(getattr(model, "model", None), "layers", None)
    kinds = getattr(config, "layer_types", None)
    if not type(model).__name__.startswith("A2D") or layers is None or not kinds:
        return
    missing = [
        (layer, kind) for layer, kind in zip(layers, kinds, strict=False) if not hasattr(layer, "attention_type")
    ]
    for layer, kind in missing:
        layer.attention_type = kind
    if missing:
        yield f"attention_type of {len(missing)} layers was missing; set from config.layer_types"


@contextmanager
def published_code() -> Iterator[None]:
    """Lend transformers, while a checkpoint's own code is imported and built, the names that code still expects.

    Only what is missing is added, and it is taken away again.
    """
    from transformers import modeling_rope_utils
    from transformers.utils import import_utils

    table: dict[str, Any] = modeling_rope_utils.ROPE_INIT_FUNCTIONS
    added_rope = "default" not in table
    if added_rope:
        table["default"] = default_rope
    added_fx = not hasattr(import_utils, "is_torch_fx_available")
    if added_fx:
        import_utils.is_torch_fx_available = lambda: True
    try:
        yield
    finally:
        if added_rope:
            table.pop("default", None)
        if added_fx:
            del import_utils.is_torch_fx_available


def default_rope(
    config: Any = None, device: Any = None, seq_len: int | None = None, **arguments: Any
) -> tuple[Tensor, float]:
    """Return rotary frequencies ``(dim / 2,)`` and their scaling, 1, of the unscaled kind (RoFormer, Su et al. 2021).

    Takes a config, or the ``dim`` and ``base`` that older modelling files pass instead.
    """
    if config is None:
        base, dim = arguments["base"], arguments["dim"]
    else:
        parameters = getattr(config, "rope_parameters", None) or {}
        base = getattr(config, "rope_theta", None) or parameters.get("rope_theta", 10000.0)
        heads = config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        partial = getattr(config, "partial_rotary_factor", None) or parameters.get("partial_rotary_factor", 1.0)
        dim = int(dim * partial)
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float32) / dim
    return 1.0 / base**exponent, 1.0


def mend_class(cls: type) -> None:
    """Teach a model class from a checkpoint's own code what transformers 5 expects of it at ``from_pretrained``."""
    if not hasattr(cls, "all_tied_weights_keys"):
        # Set by post_init in transformers 5; LLaDA's class does not call it. It ties nothing in the published models.
        cls.all_tied_weights_keys = {}  # type: ignore[attr-defined]
    tie: Callable[..., Any] | None = getattr(cls, "tie_weights", None)
    if tie is None or any(p.kind is Parameter.VAR_KEYWORD for p in signature(tie).parameters.values()):
        return
    known = set(signature(tie).parameters)

    def tie_weights(self: Any, *given: Any, **named: Any) -> Any:
        accepted = {name: value for name, value in named.items() if name in known}
        return tie(self, *given[: len(known) - 1], **accepted)

    cls.tie_weights = tie_weights  # type: ignore[attr-defined]
