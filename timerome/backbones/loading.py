"""Load backbones: the bundled testbed, a folder, or a Hub id."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from .architectures import Architecture
from .backbone import Backbone
from .compatibility import mend_class, published_code
from .registry import wrap

# Published checkpoints whose class does not tell them from a causal model's.
_KNOWN = {"diffusionfamily/diffullama": "diffullama-plain"}
# In the order of preference: a diffusion head, and not a bare trunk, is what is wanted.
_HEADS = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel")


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    architecture: str | Architecture | None = None,
    mask_token_id: int | None = None,
) -> Backbone:
    """Load a backbone: the bundled ``"testbed"``, a local folder, or a Hub id.

    Args:
        source: ``"testbed"``, a folder written by ``save_pretrained``, or a Hub id.
        dtype: of the weights; float32 by default for the testbed, otherwise what the checkpoint says.
        device: where to put the model, unless ``device_map`` spreads it.
        device_map: ``"auto"``, or which module goes to which device (needs the accelerate package).
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run modelling code that comes with the checkpoint. Off unless asked for; the error says which
            files that is.
        architecture: name of a record, where class and structure do not say what a checkpoint is: DiffuLLaMA's is a
            plain Llama, ``architecture="diffullama-plain"``.
        mask_token_id: overrides what config, tokenizer or architecture say.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        ValueError: the checkpoint brings its own code and ``trust_remote_code`` is not set; or transformers knows no
            class for it; or see :func:`timerome.wrap`.
        UnknownArchitectureError: the model is of no known architecture.

    Example:
        >>> import timerome as tr
        >>> tr.load("testbed")
        Backbone(testbed: testbed, 6 layers, d = 192)
    """
    if str(source) == "testbed":
        with as_file(files("timerome") / "assets" / "testbed") as folder:
            return _load_testbed(folder, dtype or torch.float32, device, "testbed", architecture)
    folder = Path(source)
    if folder.is_dir():
        config = folder / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"load: expected a model folder with config.json, found none in {folder}.")
        if '"timerome_testbed"' in config.read_text():
            return _load_testbed(folder, dtype or torch.float32, device, folder.name, architecture)
    with published_code():
        model, tokenizer = _load_pretrained(str(source), dtype, device_map, revision, trust_remote_code)
    if device_map is None:
        model = model.to(device)
    architecture = architecture or _KNOWN.get(str(source))
    return wrap(model, tokenizer, architecture=architecture, mask_token_id=mask_token_id, name=str(source))


def _load_testbed(
    folder: Path,
    dtype: torch.dtype,
    device: str | torch.device,
    name: str,
    architecture: str | Architecture | None,
) -> Backbone:
    from transformers import PreTrainedTokenizerFast

    from .testbed import TestbedModel

    model = TestbedModel.from_pretrained(folder).to(device=torch.device(device), dtype=dtype)
    return wrap(model, PreTrainedTokenizerFast.from_pretrained(folder), architecture=architecture, name=name)


def _load_pretrained(
    source: str,
    dtype: torch.dtype | None,
    device_map: str | dict[str, Any] | None,
    revision: str | None,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    import transformers
    from transformers import AutoConfig, PretrainedConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    raw, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    code: dict[str, Any] = raw.get("auto_map") or {}
    if code and not trust_remote_code:
        raise ValueError(
            f"load: {source} brings its own modelling code, which is not run unless asked for. It would run "
            f"{', '.join(code_files(code, source))}; read it, then pass trust_remote_code=True."
        )
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **where)
    except ValueError as error:
        if "model type" in str(error) or "model_type" in str(error):
            raise ValueError(
                f"load: transformers {transformers.__version__} knows no model type {raw.get('model_type')!r}, and "
                f"{source} brings no code for it; build the model with its authors' class (importing their package may "
                "register it), and pass it to timerome.wrap(model, tokenizer)."
            ) from error
        raise
    more: dict[str, Any] = {"torch_dtype": dtype or "auto", "config": config}
    if device_map is not None:
        more["device_map"] = device_map
    head = next((name for name in _HEADS if name in code), None)
    if head is not None:
        if not hasattr(config, "use_cache"):
            config.use_cache = False  # transformers 5 takes it from configs; published files read it
        cls = get_class_from_dynamic_module(code[head], source, revision=revision)
        mend_class(cls)
        model = cls.from_pretrained(source, revision=revision, **more)
    else:
        auto = getattr(transformers, _head_of(raw.get("architectures") or [""]))
        model = auto.from_pretrained(source, **where, **more)
    return model, _tokenizer(source, where)


def _head_of(classes: list[str]) -> str:
    return "AutoModelForMaskedLM" if classes[0].endswith("ForMaskedLM") else "AutoModelForCausalLM"


def _tokenizer(source: str, where: dict[str, Any]) -> Any:
    """Return the checkpoint's tokenizer; None where there is none: token-level functions work without."""
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("token*")) and not any(folder.glob("vocab*")):
        return None
    return AutoTokenizer.from_pretrained(source, **where)


def code_files(auto_map: dict[str, Any], source: str) -> list[str]:
    """Name the files that an ``auto_map`` would run, each with the repository it comes from.

    Example:
        >>> code_files({"AutoConfig": "configuration_x.XConfig", "AutoModel": "some/where--modeling_x.X"}, "me/x")
        ['configuration_x.py of me/x', 'modeling_x.py of some/where']
    """
    found: dict[str, None] = {}
    for value in auto_map.values():
        for reference in value if isinstance(value, list | tuple) else [value]:
            if reference:
                repository, _, name = str(reference).rpartition("--")
                found[f"{name.rpartition('.')[0]}.py of {repository or source}"] = None
    return list(found)
