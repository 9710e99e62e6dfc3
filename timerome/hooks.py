"""The one place that registers forward hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .backbones import Backbone
from .coordinates import Site

OutputHook = Callable[[Tensor], Tensor | None]
EmbeddingHook = Callable[[Tensor, Tensor], Tensor | None]
BeginHook = Callable[[Tensor, Mapping[str, Any]], None]


class HookNeverFiredError(RuntimeError):
    """A hooked module did not run: silence would look like a null result."""


class _AllReadError(BaseException):
    """Leaves a forward that has nothing more to tell; no model should take it for a failure of its own."""


class Hooks:
    """Hooks on sites and on the embedding of a backbone, attached and removed together.

    Every module is resolved before the first hook is registered, so a wrong site leaves nothing behind. Usable as a
    context manager; :meth:`remove` may be called twice. A copy of a hooked model has the hooks' shells, which do
    nothing there.

    Args:
        backbone: the model to hook.
        outputs: site -> function of that site's output ``(B, L, d)``; what it returns replaces the output, None keeps
            it. Modules that return tuples are handled: the first item is read and replaced. Where the model multiplies
            the output by a gate, the function sees and replaces the product, which is what joins the residual stream;
            a change in a dimension whose gate is zero has no way in and is dropped.
        embedding: function of the ids ``(B, L)`` and the embeddings ``(B, L, d)``, called once at the start of each
            forward; what it returns replaces the embeddings, None keeps them.
        begin: function of the ids ``(B, L)`` that were embedded and of the keyword arguments of the first block,
            called exactly once a forward, before that block: some loops embed more often than they run the model.
        everywhere: see the forwards of all threads; otherwise those of the thread alone that attaches them.

    Raises:
        ValueError: a site does not exist.
    """

    def __init__(
        self,
        backbone: Backbone,
        outputs: Mapping[Site, OutputHook] | None = None,
        embedding: EmbeddingHook | None = None,
        begin: BeginHook | None = None,
        everywhere: bool = False,
    ) -> None:
        self._backbone, self._everywhere = backbone, everywhere
        self._outputs = [(backbone.module(site), hook, backbone.gate(site)) for site, hook in (outputs or {}).items()]
        self._embedding, self._begin = embedding, begin
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the hooks are registered."""
        return bool(self._handles)

    def attach(self) -> Hooks:
        """Register the hooks.

        Raises:
            RuntimeError: they are registered already.
        """
        if self._handles:
            raise RuntimeError("Hooks.attach: these hooks are attached already; remove() them first.")
        embedding, thread = self._backbone.embedding, None if self._everywhere else threading.get_ident()

        def on(module: nn.Module, hook: Callable[..., Any], **more: bool) -> None:
            self._handles.append(module.register_forward_hook(_guarded(hook, module, thread), **more))

        try:
            if self._embedding is not None:
                on(embedding, _on_embedding(self._embedding), with_kwargs=True)
            if self._begin is not None:
                keep, run = _on_begin(self._begin)
                first = self._backbone.module(Site(0))
                on(embedding, keep, with_kwargs=True)
                self._handles.append(first.register_forward_pre_hook(_guarded(run, first, thread), with_kwargs=True))
            for module, hook, gate in self._outputs:
                if gate is not None:
                    hook, read = _through_gate(hook, *gate[1:])
                    on(gate[0], read)
                on(module, _on_output(hook))
        except BaseException:
            self.remove()
            raise
        return self

    def remove(self) -> None:
        """Unregister the hooks; nothing happens if they are not registered."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Hooks:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _guarded(hook: Callable[..., Any], module: nn.Module, thread: int | None) -> Callable[..., Any]:
    """Let a hook run for its own module alone, not for copies of it, and in its own thread if one is given."""

    def run(called: nn.Module, *rest: Any) -> Any:
        # What nn.DataParallel makes of a module for a forward stands for it.
        if called is not module and not getattr(called, "_is_replica", False):
            return None
        if thread is not None and threading.get_ident() != thread:
            return None
        return hook(called, *rest)

    return run


def _on_output(hook: OutputHook) -> Callable[[nn.Module, Any, Any], Any]:
    def run(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return hook(output)
        changed = hook(output[0])
        if changed is None:
            return None
        rest = (changed, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)

    return run


def _through_gate(hook: OutputHook, chunks: int, part: int) -> tuple[OutputHook, Callable[[nn.Module, Any, Any], None]]:
    """Let ``hook`` see an output times its gate; return it so wrapped, and a hook that reads the gate beforehand."""
    seen = threading.local()

    def read(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.gate = output.chunk(chunks, dim=-1)[part].unsqueeze(-2)

    def run(output: Tensor) -> Tensor | None:
        gate = seen.gate
        product = gate * output
        changed = hook(product)
        if changed is None:
            return None
        # Only the change is divided: where there is none, the output stays as it is to the bit.
        shut = gate == 0
        return output + ((changed - product) / gate.masked_fill(shut, 1)).masked_fill(shut, 0)

    return run, read


def _on_embedding(hook: EmbeddingHook) -> Callable[[nn.Module, Any, Any, Any], Any]:
    def run(module: nn.Module, inputs: Any, named: Any, output: Any) -> Any:
        return hook(inputs[0] if inputs else next(iter(named.values())), output)

    return run


def _on_begin(hook: BeginHook) -> tuple[Callable[..., None], Callable[..., None]]:
    """Let ``hook`` see ids and the first block's call; return a hook of the embedding, and one of that block."""
    # What ``hook`` does may run the model, so there may be several forwards under way, the innermost last. Some loops
    # embed without running the model; what they leave behind is too old to be of use. Each thread has its own.
    own = threading.local()

    def keep(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        own.kept = [*getattr(own, "kept", ())[-7:], inputs[0] if inputs else next(iter(named.values()))]

    def run(module: nn.Module, inputs: Any, named: Any) -> None:
        kept = getattr(own, "kept", [])
        hidden = inputs[0] if inputs else named.get("hidden_states")
        if not kept or (isinstance(hidden, Tensor) and kept[-1].shape != hidden.shape[:2]):
            raise RuntimeError(
                "Hooks: the model was given embeddings, not ids, so its tokens are not known; give it ids."
            )
        hook(kept.pop(), named)

    return keep, run


def can_stop(backbone: Backbone) -> bool:
    """Whether a forward of this model may be left in the middle.

    Not where something is to be undone after it, as with weights that are gathered or moved for the time of a module's
    call (FSDP, accelerate's offloading).
    """
    sharded = any(hasattr(parameter, "full_tensor") for parameter in backbone.model.parameters())
    return not sharded and not any(
        hasattr(module, "_hf_hook") or type(module).__name__ == "FullyShardedDataParallel"
        for module in backbone.model.modules()
    )


@contextmanager
def capture(backbone: Backbone, sites: Sequence[Site], *, stop: bool = False) -> Iterator[dict[Site, Tensor]]:
    """Record the outputs of ``sites`` during the forwards inside; each forward overwrites the one before.

    Args:
        backbone: the model.
        sites: what to record.
        stop: leave the forward, and the block of this context manager, once all of them are there: what comes after
            them in the model is not computed. Only for models that :func:`can_stop`.

    Yields:
        A dict that holds, after a forward, each site's output of shape ``(B, L, d)``, detached.

    Raises:
        ValueError: a site does not exist.
        HookNeverFiredError: no forward reached one of the sites.

    Example:
        >>> import torch
        >>> import timerome as tr
        >>> from timerome.hooks import capture
        >>> backbone = tr.load("testbed")
        >>> with capture(backbone, [tr.Site(3)], stop=True) as found:
        ...     _ = backbone.logits(torch.tensor([[2, 3, 4]]))
        >>> found[tr.Site(3)].shape
        torch.Size([1, 3, 192])
    """
    found: dict[Site, Tensor] = {}
    done = _AllReadError()

    def keep(site: Site) -> OutputHook:
        def read(output: Tensor) -> None:
            found[site] = output.detach()
            if stop and len(found) == len(sites):
                raise done

        return read

    try:
        with Hooks(backbone, {site: keep(site) for site in sites}):
            yield found
    except _AllReadError as reached:
        if reached is not done:
            raise
    silent = [str(site) for site in sites if site not in found]
    if silent:
        raise HookNeverFiredError(f"capture: no forward reached {', '.join(silent)}; run the model inside the block.")
