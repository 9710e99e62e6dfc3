"""Recognise, wrap and load backbones."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .architectures import BUILT_IN, Architecture
from .backbone import Backbone

_architectures: list[Architecture] = list(BUILT_IN)


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
        UnknownArchitectureError: none fits.
    """
    reasons = []
    for architecture in _architectures:
        reason = architecture.mismatch(model)
        if reason is None:
            return architecture
        reasons.append(f"  {architecture.name}: {reason}")
    raise UnknownArchitectureError(
        f"wrap: {type(model).__name__} fits no known architecture:\n" + "\n".join(reasons) + "\n"
        "Describe yours with timerome.backbones.register(Architecture(...)), or pass architecture=..."
    )


def wrap(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    architecture: Architecture | None = None,
    mask_token_id: int | None = None,
    name: str | None = None,
) -> Backbone:
    """Make a backbone of a loaded model. The model is put in eval mode and otherwise left as it is.

    Args:
        model: a Hugging Face model or ``nn.Module`` of a known architecture.
        tokenizer: its tokenizer; without one, only token-level functions work.
        architecture: where its parts are; recognised by default.
        mask_token_id: overrides what config, tokenizer or architecture say.
        name: used in messages and manifests.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        UnknownArchitectureError: no architecture fits.
        ValueError: the mask token's id is unknown, or ``architecture`` does not fit.

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
    elif reason := architecture.mismatch(model):
        raise ValueError(f"wrap: the model does not fit architecture {architecture.name!r}: it {reason}.")
    return Backbone(model, tokenizer, architecture=architecture, mask_token_id=mask_token_id, name=name)


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Backbone:
    """Load a backbone: the bundled ``"testbed"``, a local folder, or a Hub id.

    Args:
        source: ``"testbed"``, a folder written by ``save_pretrained``, or a Hub id.
        dtype: of the weights; float32 by default for the testbed, otherwise what the checkpoint says.
        device: where to put the model.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run modelling code that comes with the checkpoint. Off unless asked for.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        ValueError: the checkpoint brings its own code and ``trust_remote_code`` is not set.
        UnknownArchitectureError: the model is of no known architecture.

    Example:
        >>> import timerome as tr
        >>> tr.load("testbed")
        Backbone(testbed: testbed, 6 layers, d = 192)
    """
    if str(source) == "testbed":
        with as_file(files("timerome") / "assets" / "testbed") as folder:
            return _load_testbed(folder, dtype or torch.float32, device, "testbed")
    folder = Path(source)
    if folder.is_dir():
        config = folder / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"load: expected a model folder with config.json, found none in {folder}.")
        if '"timerome_testbed"' in config.read_text():
            return _load_testbed(folder, dtype or torch.float32, device, folder.name)
    return _load_pretrained(str(source), dtype, device, revision, trust_remote_code)


def _load_testbed(folder: Path, dtype: torch.dtype, device: str | torch.device, name: str) -> Backbone:
    from transformers import PreTrainedTokenizerFast

    from .testbed import TestbedModel

    model = TestbedModel.from_pretrained(folder).to(device=torch.device(device), dtype=dtype)
    return wrap(model, PreTrainedTokenizerFast.from_pretrained(folder), name=name)


def _load_pretrained(
    source: str, dtype: torch.dtype | None, device: str | torch.device, revision: str | None, trust_remote_code: bool
) -> Backbone:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **where)
    except ValueError as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ValueError(
                f"load: {source} brings its own modelling code, which is not run unless asked for; "
                "read it, then pass trust_remote_code=True."
            ) from error
        raise
    # Dream maps only AutoModel; the others have their head under AutoModelForCausalLM.
    has_causal = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {"AutoModelForCausalLM": ""})
    auto = AutoModelForCausalLM if has_causal else AutoModel
    model = auto.from_pretrained(source, torch_dtype=dtype or "auto", **where).to(device)
    tokenizer = AutoTokenizer.from_pretrained(source, **where)
    return wrap(model, tokenizer, name=source)
