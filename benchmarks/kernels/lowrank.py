"""``sparse_lowrank_residual`` and its epilogue ``sparsify_add`` against PyTorch, compiled PyTorch and Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from timerome.ops import kept_count, sparse_lowrank_residual, sparsify_add, sparsify_add_, sparsify_add_reference

from .cases import Benchmark, Case, Rival, Setup
from .compiled import compiled

ALPHA = 0.5
TAU = 0.5
T = (64, 128, 512, 2048, 8192)
D = (1024, 2048, 4096, 8192)
N = (1, 16, 40, 64, 400, 1000)
Q = (0.0, 0.5, 0.9, 0.99)
SHARES = (0.0, 0.01, 1.0)
CHECKED = 32  # rows that are compared with float64


def sizes(setup: Setup, grid: str) -> Iterator[tuple[Any, ...]]:
    """(T, d, N, q, gated share): all T, d and N at q = 0.9 ungated, and all q and shares at N = 40."""
    if grid == "quick" and setup.device.type == "cuda":
        yield from [(2048, 4096, 40, 0.9, share) for share in ("none", *SHARES)]
        yield from [(t, 4096, 40, 0.9, share) for t in (512, 8192) for share in ("none", 0.0)]
        yield 2048, 4096, 400, 0.9, "none"
        return
    if grid == "quick":
        yield from [(64, 1024, 40, 0.9, "none"), (512, 4096, 40, 0.9, "none"), (512, 4096, 40, 0.9, 0.01)]
        return
    for t in T:
        for d in D:
            for n in N:
                for q in Q:
                    for share in ("none", *SHARES):
                        if (
                            grid == "full"
                            or (q == 0.9 and share == "none")
                            or (n == 40 and (q == 0.9 or share == "none"))
                        ):
                            yield t, d, n, q, share


def make(setup: Setup, t: int, d: int, n: int, q: float, share: float | str) -> Case:
    """Random keys and values of unit rows, a random symmetric A; ``share`` of the rows lie near a key."""
    generator = setup.generator()
    noise, near = setup.randn(generator, t, d), 0
    keys = torch.nn.functional.normalize(setup.randn(generator, n, d))
    if share != "none":
        near = -(-int(share * t * 100) // 100) if share == 1.0 else (max(1, int(share * t)) if share else 0)
        rows = torch.randperm(t, generator=generator, device=setup.device)[:near]
        noise[rows] += 4 * d**0.5 * keys[torch.arange(near, device=setup.device) % n]
    h = noise.to(setup.dtype)
    mix = setup.randn(generator, n, n)
    coef = (mix + mix.mT) / (2 * n) ** 0.5
    values = setup.randn(generator, n, d)
    keys, values = keys.to(setup.dtype), values.to(setup.dtype)
    tau = None if share == "none" else TAU
    k = kept_count(d, q)
    options: dict[str, Any] = {"alpha": ALPHA, "sparsity": q, "gate_threshold": tau}
    some = torch.linspace(0, t - 1, min(t, CHECKED), device=setup.device).long()
    if near:
        some = torch.cat([some, rows[:CHECKED]])
    truth = _float64(h[some], keys, coef, values, k, tau)
    scale = float((truth - h[some].double()).abs().max()) or 1.0
    tolerance = 1e-4 if setup.dtype == torch.float32 else 3e-2

    def error(out: Tensor) -> float:
        """Share of entries that differ: two orders of summation may swap a few at the selection's threshold."""
        wrong = (out[some].double() - truth).abs() > tolerance * scale
        return float(wrong.double().mean())

    rivals = {"timerome": Rival(lambda: sparse_lowrank_residual(h, keys, coef, values, **options), torch=False)}
    if setup.device.type == "cuda":  # what one pass takes at this size, at which no copy reaches the device's ceiling
        rivals["copy of h"] = Rival(lambda: torch.empty_like(h).copy_(h), torch=False, allowed=1.0)
    for name, function in _eager(k == d, tau is not None).items():
        rivals[name] = Rival(partial(function, h, keys, coef, values, k, tau))
    if k < d and tau is None:
        rivals["torch.compile"] = Rival(lambda: compiled(dense_kthvalue)(h, keys, coef, values, k, tau))
        if setup.device.type == "cuda":
            from .triton_epilogue import sparsify_add_triton

            rivals["products + Triton"] = Rival(
                lambda: sparsify_add_triton(h, _residual(h, keys, coef, values)[0], k, ALPHA), torch=False
            )
    size = setup.dtype.itemsize
    return Case(rivals, error, 2e-3, size * (2 * t * d + 2 * n * d) + 4 * n * n, 2.0 * t * n * (2 * d + n))


def _first(first: Callable[[], Any], then: Callable[[], Any]) -> Callable[[], Any]:
    """Call one function once, and another ever after."""
    left = [first]
    return lambda: (left.pop() if left else then)()


def _float64(h: Tensor, keys: Tensor, coef: Tensor, values: Tensor, k: int, tau: float | None) -> Tensor:
    x, keys = h.double(), keys.double()
    scores = x @ keys.mT
    r = scores @ coef.double() @ values.double()
    kept = torch.zeros_like(r).scatter(-1, r.abs().topk(k, dim=-1).indices, 1.0)
    out = x + ALPHA * r * kept
    if tau is not None:
        cosine = scores / (x.norm(dim=-1, keepdim=True) * keys.norm(dim=-1))
        out = torch.where((cosine.amax(-1) >= tau)[:, None], out, x)
    return out


# --- What one would write in PyTorch. Scores are float32, as an edit needs them, so all do the same.


def _residual(h: Tensor, keys: Tensor, coef: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = h.float()
    scores = x @ keys.float().mT
    return (scores @ coef) @ values.float(), scores, x


def _passes(scores: Tensor, x: Tensor, keys: Tensor, tau: float) -> Tensor:
    return (scores / (x.norm(dim=-1, keepdim=True) * keys.float().norm(dim=-1))).amax(-1) >= tau


def kept_by_kthvalue(r: Tensor, k: int) -> Tensor:
    """Which entries reach the k-th largest magnitude of their row."""
    size = r.abs()
    return size >= size.kthvalue(r.shape[-1] - k + 1, dim=-1, keepdim=True).values


def kept_by_topk(r: Tensor, k: int) -> Tensor:
    """The same by the smallest of the top k."""
    size = r.abs()
    return size >= size.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)


def add_kept(h: Tensor, r: Tensor, keep: Tensor) -> Tensor:
    """Add the entries that are kept."""
    return (h.float() + torch.where(keep, ALPHA * r, 0.0)).to(h.dtype)


def add_topk(h: Tensor, r: Tensor, k: int) -> Tensor:
    """Add the top k at their indices."""
    index = r.abs().topk(k, dim=-1, sorted=False).indices
    return h.float().scatter_add(-1, index, ALPHA * r.gather(-1, index)).to(h.dtype)


def dense_kthvalue(h: Tensor, keys: Tensor, coef: Tensor, values: Tensor, k: int, tau: float | None) -> Tensor:
    """Select by the k-th value, for every row."""
    r, scores, x = _residual(h, keys, coef, values)
    keep = kept_by_kthvalue(r, k)
    return add_kept(h, r, keep if tau is None else keep & _passes(scores, x, keys, tau)[:, None])


def dense_topk(h: Tensor, keys: Tensor, coef: Tensor, values: Tensor, k: int, tau: float | None) -> Tensor:
    """Select by the smallest of the top k, for every row; not gated."""
    r = _residual(h, keys, coef, values)[0]
    return add_kept(h, r, kept_by_topk(r, k))


def topk_scatter(h: Tensor, keys: Tensor, coef: Tensor, values: Tensor, k: int, tau: float | None) -> Tensor:
    """Add the top k at their indices, for every row; not gated."""
    return add_topk(h, _residual(h, keys, coef, values)[0], k)


def addmm(h: Tensor, keys: Tensor, coef: Tensor, values: Tensor, k: int, tau: float | None) -> Tensor:
    """Nothing to select: the last product adds to h."""
    x = h.float()
    return torch.addmm(x, (x @ keys.float().mT) @ coef, values.float(), alpha=ALPHA).to(h.dtype)


def gated_rows(h: Tensor, keys: Tensor, coef: Tensor, values: Tensor, k: int, tau: float | None) -> Tensor:
    """Work on the rows that the gate lets through only; their number is known when the device says so."""
    assert tau is not None
    x = h.float()
    scores = x @ keys.float().mT
    index = _passes(scores, x, keys, tau).nonzero().flatten()
    out = h.clone()
    r = scores[index] @ coef @ values.float()
    if k < h.shape[-1]:
        r = torch.where(kept_by_kthvalue(r, k), r, 0.0)
    return out.index_copy_(0, index, (x[index] + ALPHA * r).to(h.dtype))


def _eager(dense: bool, gated: bool) -> dict[str, Callable[..., Tensor]]:
    if gated:
        masked = {} if dense else {"eager, kthvalue": dense_kthvalue}
        return {"eager, gated rows": gated_rows, **masked}
    if dense:
        return {"eager, addmm": addmm}
    return {"eager, kthvalue": dense_kthvalue, "eager, topk": dense_topk, "eager, topk + scatter": topk_scatter}


LOWRANK = Benchmark("sparse_lowrank_residual", ("T", "d", "N", "q", "gated"), sizes, make, axis="T", lines="d")


# --- The epilogue alone.


def epilogue_sizes(setup: Setup, grid: str) -> Iterator[tuple[Any, ...]]:
    """(T, d, q)."""
    for t in (512,) if grid == "quick" else T:
        for d in (4096,) if grid == "quick" else D:
            for q in (0.9,) if grid == "quick" else Q[1:]:
                yield t, d, q


def make_epilogue(setup: Setup, t: int, d: int, q: float) -> Case:
    """A random residual."""
    generator = setup.generator()
    h, r, k = setup.randn(generator, t, d).to(setup.dtype), setup.randn(generator, t, d), kept_count(d, q)
    truth, scratch = sparsify_add_reference(h, r, k, ALPHA), h.clone()

    def error(out: Tensor) -> float:
        return float((out != truth).double().mean())

    def in_place_checked() -> Tensor:
        return sparsify_add_(scratch.copy_(h), r, k, ALPHA)

    rivals = {
        "timerome": Rival(lambda: sparsify_add(h, r, k, ALPHA), torch=False),
        "timerome, in place": Rival(_first(in_place_checked, lambda: sparsify_add_(scratch, r, k, 1e-30)), torch=False),
        "eager, kthvalue": Rival(lambda: add_kept(h, r, kept_by_kthvalue(r, k))),
        "eager, topk": Rival(lambda: add_kept(h, r, kept_by_topk(r, k))),
        "eager, topk + scatter": Rival(lambda: add_topk(h, r, k)),
    }
    if setup.device.type == "cuda":
        from .triton_epilogue import sparsify_add_triton

        rivals["Triton"] = Rival(lambda: sparsify_add_triton(h, r, k, ALPHA), torch=False)
    # Two sums that round differently differ in the last bit; a wrong selection differs in whole entries.
    return Case(
        rivals, error, 1e-3 if setup.dtype == torch.float32 else 1e-2, t * d * (2 * setup.dtype.itemsize + 4), 0
    )


EPILOGUE = Benchmark("sparsify_add", ("T", "d", "q"), epilogue_sizes, make_epilogue, axis="T", lines="d")
