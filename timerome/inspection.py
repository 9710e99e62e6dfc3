"""What a model was recognised as, whether the library's assumptions hold on it, and what is supported therefore."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .backbones import Backbone
from .backbones.probes import honours_padding, looks_ahead, noise_floor, probe_ids
from .coordinates import Site
from .hooks import Hooks, capture


@dataclass(frozen=True)
class Check:
    """One assumption, tried on the model.

    Attributes:
        name: what must hold.
        passed: whether it does.
        found: what was measured.
    """

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Inspection:
    """What is known of a backbone.

    Attributes:
        recognised: names and sizes, in words.
        checks: the assumptions tried.
        supported: what works, and what does not and why.
    """

    recognised: dict[str, str]
    checks: tuple[Check, ...]
    supported: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "checks": [asdict(check) for check in self.checks], "passed": self.passed}


def inspect_backbone(backbone: Backbone, progress: Callable[[str], None] | None = None) -> Inspection:
    """Say what a backbone is, try on a few tokens what tracing and editing take for granted, and say what works.

    A dozen forwards of eight tokens; nothing is changed.

    Args:
        backbone: the model.
        progress: told the name of each check before it runs.

    Example:
        >>> import timerome as tr
        >>> from timerome.inspection import inspect_backbone
        >>> found = inspect_backbone(tr.load("testbed"))
        >>> found.passed, found.recognised["architecture"]
        (True, 'testbed')
    """
    checks = []
    for name, check in CHECKS.items():
        if progress is not None:
            progress(name)
        try:
            with torch.no_grad():
                passed, found = check(backbone)
        except Exception as error:  # a check that cannot run has failed, and the others still say something
            passed, found = False, f"{type(error).__name__}: {error}"
        checks.append(Check(name, passed, found))
    return Inspection(_recognised(backbone), tuple(checks), _supported(backbone, {c.name: c.passed for c in checks}))


def _recognised(backbone: Backbone) -> dict[str, str]:
    record, model = backbone.architecture, backbone.model
    entries = -1 if backbone.tokenizer is None else max(backbone.tokenizer.get_vocab().values(), default=-1) + 1
    end = "no end-of-text token" if backbone.eos_id is None else f"end of text {backbone.eos_id}"
    return {
        "architecture": record.name,
        "class": f"{type(model).__name__} ({type(model).__module__})",
        "layers, d": f"{backbone.n_layers}, {backbone.hidden_size}",
        "dtype, device": f"{str(backbone.dtype).removeprefix('torch.')}, {backbone.device}",
        "vocabulary": f"{backbone.vocab_size} rows, " + (f"{entries} tokens" if entries >= 0 else "no tokenizer"),
        "tokens": f"mask {backbone.mask_id} (from {backbone.mask_source}), {end}",
        "context": "not said" if backbone.max_length >= 1 << 30 else f"{backbone.max_length} tokens",
        "position i is predicted by": "the logits at i"
        if not backbone.shift
        else f"the logits at i - {backbone.shift}",
        "sites": f"{record.blocks}.i, its {record.attn} and {record.mlp}"
        + (f", each times a gate from {record.gates.module}" if record.gates else ""),
        "attention masks": {"none": "none", "padding": "padding", "any": "padding and any pattern"}[record.masks]
        if backbone.padding
        else "none",
        "mended": "; ".join(backbone.mended) or "nothing",
    }


# Checks --------------------------------------------------------------------------------------------------------------


def _finite(backbone: Backbone) -> tuple[bool, str]:
    logits = backbone.forward(probe_ids(backbone, 2))
    bad = int((~torch.isfinite(logits)).sum())
    return bad == 0, f"{bad} of {logits.numel()} are not; largest {float(logits.abs().max()):.3g}"


def _ahead(backbone: Backbone) -> tuple[bool, str]:
    passed = looks_ahead(backbone)
    return passed, "the first position's logits " + ("change" if passed else "stay") + " when every later token changes"


def _residual(backbone: Backbone) -> tuple[bool, str]:
    """Largest violation over layers of in + attention + MLP = out, relative to out's largest entry."""
    worst, where = 0.0, 0
    with _block_input(backbone) as start, capture(backbone, backbone.sites()) as found:
        backbone.forward(probe_ids(backbone, 2))
    for layer in range(backbone.n_layers):
        before = start[0] if layer == 0 else found[Site(layer - 1)]
        out = found[Site(layer)].float()
        total = before.to(out) + found[Site(layer, "attn")].to(out) + found[Site(layer, "mlp")].to(out)
        error = float((total - out).abs().max() / out.abs().max())
        if not error <= worst:
            worst, where = error, layer
    eps = torch.finfo(found[Site(0)].dtype).eps
    return worst <= 8 * eps, f"largest relative error {worst:.1e}, at layer {where} (eps is {eps:.1e})"


@contextmanager
def _block_input(backbone: Backbone) -> Iterator[list[Tensor]]:
    """Collect what the first block is given, during the forwards inside."""
    found: list[Tensor] = []

    def read(module: Any, args: Any, kwargs: Any) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() == 3]
        found.append(tensors[0].detach())

    handle = backbone.module(Site(0)).register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _reach(backbone: Backbone) -> tuple[bool, str]:
    """Every site fires once a forward, and a change there reaches the logits."""
    ids = probe_ids(backbone, 1)
    calls = dict.fromkeys(backbone.sites(), 0)

    def counted(site: Site) -> Callable[[Tensor], None]:
        def count(h: Tensor) -> None:
            calls[site] += 1

        return count

    with Hooks(backbone, {site: counted(site) for site in calls}):
        before = backbone.forward(ids)
    wrong = [f"{site} fires {n} times" for site, n in calls.items() if n != 1]
    for site in (s for s in calls if s.layer in (0, backbone.n_layers - 1)):
        with Hooks(backbone, {site: lambda h: h + 0.5 * h.roll(1, -1)}):
            if float((backbone.forward(ids) - before).abs().max()) <= noise_floor(before):
                wrong.append(f"a change at {site} does not reach the logits")
    return not wrong, "; ".join(wrong[:4]) or f"{len(calls)} sites, each once a forward; changes reach the logits"


def _embedding(backbone: Backbone) -> tuple[bool, str]:
    ids, seen = probe_ids(backbone, 1), []
    with Hooks(backbone, embedding=lambda given, h: seen.append(given)):
        backbone.forward(ids)
    passed = len(seen) == 1 and torch.equal(seen[0], ids)
    return passed, f"called {len(seen)} times a forward" + ("" if passed else ", not once with the forward's ids")


def _unembedding(backbone: Backbone) -> tuple[bool, str]:
    ids, last = probe_ids(backbone, 1), Site(backbone.n_layers - 1)
    with capture(backbone, [last]) as found:
        logits = backbone.forward(ids)
    error = float((backbone.unembed(found[last]) - logits.float()).abs().max())
    return error <= 4 * noise_floor(logits), f"differs by {error:.1e} from the model's logits"


def _batched(backbone: Backbone) -> tuple[bool, str]:
    ids = probe_ids(backbone, 3)
    together = backbone.forward(ids)
    alone = torch.cat([backbone.forward(row[None]) for row in ids])
    error = float((together - alone).abs().max())
    return error <= 4 * noise_floor(together), f"differs by {error:.1e}"


def _padded(backbone: Backbone) -> tuple[bool, str]:
    """Right and left padding give what no padding gives; where padding is not supported, it is refused."""
    if not backbone.padding:
        return True, "padding masks are not honoured by this model, and refused: batches are made of one length"
    ids = probe_ids(backbone, 2, length=5)
    length = ids.shape[1]
    plain, fill = backbone.forward(ids), ids.new_full((2, 3), backbone.eos_id or 0)
    keep = torch.cat([torch.ones_like(ids), torch.zeros_like(fill)], 1).bool()
    right = backbone.forward(torch.cat([ids, fill], 1), attention_mask=keep)[:, :length]
    left = backbone.forward(torch.cat([fill, ids], 1), attention_mask=keep.flip(1))[:, 3:]
    error = float(torch.stack([right - plain, left - plain]).abs().max())
    return honours_padding(backbone) and error <= 8 * noise_floor(plain), f"left and right differ by {error:.1e}"


CHECKS: dict[str, Callable[[Backbone], tuple[bool, str]]] = {
    "logits are finite": _finite,
    "attends in both directions": _ahead,
    "in + attention + MLP = out": _residual,
    "hooks reach every site": _reach,
    "ids can be read from the embedding": _embedding,
    "unembedding the last block gives the logits": _unembedding,
    "batched = single": _batched,
    "padded = unpadded": _padded,
}


def _supported(backbone: Backbone, passed: dict[str, bool]) -> dict[str, str]:
    record = backbone.architecture
    text = "yes" if backbone.tokenizer is not None else "by token ids only: there is no tokenizer"
    sites = passed["hooks reach every site"] and passed["in + attention + MLP = out"]
    seen = passed["ids can be read from the embedding"]
    broken = "no: see the checks that failed"
    lens = passed["unembedding the last block gives the logits"] and record.lens
    return {
        "trace": text if sites and seen else broken,
        "edit": text if sites and seen else broken,
        "lens targets": "yes" if lens else "no: the unembedding is not linear after the final norm",
        "the model's own generate": "yes" if sites and seen else broken,
        "this library's samplers, likelihoods": text if passed["logits are finite"] else broken,
        "padded batches": "yes" if backbone.padding else "no: batches are made of one length",
    }
