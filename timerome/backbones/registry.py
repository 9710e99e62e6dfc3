"""Recognise and wrap backbones."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .architectures import Architecture
from .backbone import Backbone
from .compatibility import mend
from .probes import probe
from .records import BUILT_IN

_architectures: list[Architecture] = list(BUILT_IN)
_probed: WeakKeyDictionary[nn.Module, dict[Architecture, bool]] = WeakKeyDictionary()


class UnknownArchitectureError(ValueError):
    """No record fits the model; the message lists every record and why it does not fit."""


def register(architecture: Architecture) -> None:
    """Add an architecture, ahead of those registered before; one of the same name is replaced.

    Raises:
        TypeError: ``architecture`` is no :class:`Architecture`.
    """
    if not isinstance(architecture, Architecture):
        raise TypeError(f"register: expected an Architecture, got {type(architecture).__name__}.")
    _architectures[:] = [architecture, *(a for a in _architectures if a.name != architecture.name)]


def architectures() -> list[Architecture]:
    """Return the registered architectures, in the order in which they are tried."""
    return list(_architectures)


def recognise(model: nn.Module) -> Architecture:
    """Return the first architecture whose structure and class fit ``model``.

    Raises:
        UnknownArchitectureError: none fits, or the one that does says why it cannot be used.
    """
    reasons = []
    for architecture in _architectures:
        if architecture.refusal and architecture.covers(model):
            raise UnknownArchitectureError(f"wrap: {type(model).__name__} cannot be used: {architecture.refusal}.")
        reason = architecture.mismatch(model)
        if reason is None and architecture.explicit:
            reason = f"has the structure, but so has a causal model; if it is one of these, pass {architecture.name!r}"
        if reason is None:
            return architecture
        reasons.append(f"  {architecture.name}: {reason}")
    raise UnknownArchitectureError(
        f"wrap: {type(model).__name__} fits no known architecture:\n" + "\n".join(reasons) + "\n"
        "Describe yours with timerome.backbones.register(Architecture(...)), or pass architecture=..."
    )


def find(architecture: str | Architecture) -> Architecture:
    """Return the registered architecture of a name, or the one given.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(architecture, Architecture):
        return architecture
    for known in _architectures:
        if known.name == architecture:
            return known
    raise ValueError(
        f"wrap: expected an architecture among {', '.join(a.name for a in _architectures)}, got {architecture!r}."
    )


def wrap(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    architecture: str | Architecture | None = None,
    mask_token_id: int | None = None,
    name: str | None = None,
    check: bool = True,
) -> Backbone:
    """Make a backbone of a loaded model. The model is put in eval mode; its parameters are left as they are.

    What is known to break with the running transformers version is mended (``Backbone.mended`` says what), and two
    short forwards find out whether the model looks ahead and whether it honours a padding mask.

    Args:
        model: a Hugging Face model or ``nn.Module`` of a known architecture.
        tokenizer: its tokenizer; without one, only token-level functions work.
        architecture: where its parts are, or the name of a registered record; recognised by default.
        mask_token_id: overrides what config, tokenizer or architecture say.
        name: used in messages and manifests.
        check: run those two forwards.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        UnknownArchitectureError: no architecture fits.
        CausalModelError: the model does not look ahead.
        ValueError: the mask token's id is unknown or outside the embedding, the tokenizer has ids that the head has
            not, or ``architecture`` does not fit.

    Example:
        >>> import timerome as tr
        >>> backbone = tr.load("testbed")
        >>> tr.wrap(backbone.model, backbone.tokenizer).architecture.name
        'testbed'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"wrap: expected an nn.Module, got {type(model).__name__}.")
    if architecture is None:
        architecture = recognise(model)
    else:
        architecture = find(architecture)
        if reason := architecture.refusal or architecture.mismatch(model):
            raise ValueError(f"wrap: the model does not fit architecture {architecture.name!r}: it {reason}.")
    mended = mend(model)
    backbone = Backbone(model, tokenizer, architecture=architecture, mask_token_id=mask_token_id, name=name)
    backbone.mended = mended
    if check:
        # Once a model: hooks that are on it by the time it is wrapped again, a memory's say, must not see the probe.
        known = _probed.setdefault(model, {})
        if architecture not in known:
            known[architecture] = probe(backbone)
        backbone.padding = known[architecture]
    return backbone
