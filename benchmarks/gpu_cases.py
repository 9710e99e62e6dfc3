"""Cases of every op whose results are known: what :mod:`benchmarks.gpu_check` runs on a device.

Entries are small integers and halves, so that sums are exact in any order, also with coefficients in bfloat16: a GPU
must give the CPU's result to the last bit, ties included. Only the ridge systems are compared up to rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from timerome.ops import (
    Segments,
    pack_edit_sets,
    ridge_cholesky_reference,
    sparse_lowrank_residual,
    sparse_lowrank_residual_reference,
    sparsify_add,
    sparsify_add_,
    sparsify_add_reference,
)
from timerome.ops._gram import gram_reference

Tensors = dict[str, Tensor]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        name: says what is called with what.
        inputs: on the CPU, by name; ``call`` takes them on any device and changes none of them.
        call: calls the op.
        wanted: what it must return, by the definition on the CPU.
        flips: the dimension of each input along which the order of its rows does not matter to the others.
        flips_back: the same for what is returned; None where the order does not matter.
        tolerance: the largest relative error of a result; 0: equal to the last bit.
        ours: runs no kernel but timerome's and PyTorch's elementwise ones.
    """

    name: str
    inputs: Tensors
    call: Callable[[Tensors], tuple[Tensor, ...]]
    wanted: tuple[Tensor, ...]
    flips: dict[str, int]
    flips_back: tuple[int | None, ...]
    tolerance: float = 0.0
    ours: bool = True

    def flipped(self) -> Case:
        """The same with rows in another order: other inputs of the same shapes."""
        inputs = {name: x.flip(self.flips[name]) if name in self.flips else x for name, x in self.inputs.items()}
        pairs = zip(self.wanted, self.flips_back, strict=True)
        return dataclasses.replace(
            self, inputs=inputs, wanted=tuple(x if dim is None else x.flip(dim) for x, dim in pairs)
        )

    def on(self, device: torch.device | str) -> Tensors:
        """Copies of the inputs on a device."""
        return {name: x.to(device, copy=True) for name, x in self.inputs.items()}

    def fault(self, found: tuple[Tensor, ...]) -> str:
        """What is wrong with a result; empty if nothing is."""
        if len(found) != len(self.wanted):
            return f"{len(found)} results, expected {len(self.wanted)}"
        for i, (x, y) in enumerate(zip(found, self.wanted, strict=True)):
            x = x.cpu()
            if (x.shape, x.dtype) != (y.shape, y.dtype):
                return f"result {i}: {tuple(x.shape)}, {x.dtype}; expected {tuple(y.shape)}, {y.dtype}"
            if not torch.equal(x.isnan(), y.isnan()):
                return f"result {i}: {int((x.isnan() != y.isnan()).sum())} entries are NaN, or wrongly are not"
            x, y = x.nan_to_num(0), y.nan_to_num(0)
            if self.tolerance and y.is_floating_point():
                error = float((x - y).norm() / y.norm().clamp(min=1e-300))
                if not error <= self.tolerance:
                    return f"result {i}: relative error {error:.2g}, expected at most {self.tolerance:.2g}"
            elif not torch.equal(x, y):
                wrong = (x != y).nonzero()
                return f"result {i}: {len(wrong)} of {y.numel()} entries differ, the first at {wrong[0].tolist()}"
        return ""


def cases(ours_only: bool = False) -> Iterator[Case]:
    """All cases; ``ours_only``: those for a tool that would also find what is not ours."""
    for case in (*_sparsify_add(), *_residual(), *_edit_sets(), *_gram(), *_ridge()):
        if case.ours or not ours_only:
            yield case


def _halves(generator: torch.Generator, *shape: int, up_to: int = 6) -> Tensor:
    return torch.randint(-up_to, up_to + 1, shape, generator=generator) / 2


def _sparsify_add() -> Iterator[Case]:
    # Powers of two, odd, one, more rows than one wave of blocks, the longest row of the kernel and one longer.
    for shape in ((5, 64), (3, 1), (4, 1025), (2, 3, 1000), (3000, 96), (6, 8192), (2, 8195)):
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(0)
            r = _halves(generator, *shape, up_to=9 if shape[-1] % 2 else 100_000)
            if shape[-1] > 64:
                r[0, ..., 3], r[0, ..., 5], r[1, ..., 7] = math.nan, math.inf, -math.inf
            inputs = {
                "h": _halves(generator, *shape).to(dtype),
                "r": r,
                "mask": torch.rand(shape[:-1], generator=generator) < 0.7,
            }
            k = -(-shape[-1] // 10)

            def call(x: Tensors, k: int = k) -> tuple[Tensor, ...]:
                changed = x["h"].clone()
                sparsify_add_(changed, x["r"], k, 0.5)
                return sparsify_add(x["h"], x["r"], k, 0.5, x["mask"]), changed

            wanted = tuple(sparsify_add_reference(inputs["h"], r, k, 0.5, mask) for mask in (inputs["mask"], None))
            yield Case(
                f"sparsify_add {shape} {dtype}", inputs, call, wanted, {"h": 0, "r": 0, "mask": 0}, (0, 0),
                ours=shape[-1] <= 8192,
            )  # fmt: skip


def _system(generator: torch.Generator, n: int, m: int, d: int, dtype: torch.dtype) -> Tensors:
    """Keys and coefficients with few entries: coefficients of a row are integers that bfloat16 holds."""
    keys = torch.zeros(n, d)
    where = torch.randint(d, (n, 8), generator=generator)
    keys.scatter_(1, where, torch.randint(0, 2, (n, 8), generator=generator) * 2.0 - 1)
    coef = torch.zeros(n, m)
    for _ in range(2):
        coef.scatter_(0, torch.randint(n, (1, m), generator=generator), 1.0)
    return {"keys": keys.to(dtype), "coef": coef, "values": _halves(generator, m, d).to(dtype)}


def _threshold(inputs: Tensors) -> float:
    """A gate that about half of the rows pass, none of them so closely that rounding decides."""
    x = inputs["h"].double() - inputs["mean"].double()
    own = inputs["keys"][: len(inputs["values"])].double()
    cosine = (x @ own.mT / (x.norm(dim=-1, keepdim=True) * own.norm(dim=-1))).nan_to_num(-1).amax(-1)
    middle = cosine.flatten().sort().values[cosine.numel() // 4 : 3 * cosine.numel() // 4 + 2]
    gaps = middle.diff()
    widest = int(gaps.argmax())
    assert gaps[widest] > 1e-5
    return float(middle[widest] + middle[widest + 1]) / 2


def _residual() -> Iterator[Case]:
    # (batch, T, d), N, M: few keys and many, at the limits of the kernels, rows they do not take.
    sizes = [((2, 70, 64), 1, 1), ((1, 300, 1024), 40, 40), ((2, 33, 4096), 64, 50), ((40, 100), 100, 20)]
    sizes += [((1, 130, 1024), 400, 400), ((2, 9, 33), 5, 3), ((3, 8192), 16, 16), ((5, 8196), 8, 8)]
    many = (1200, 3616), 40, 40  # more rows than eight a multiprocessor: then blocks take sixteen
    for (shape, n, m), dtypes in [*((size, DTYPES) for size in sizes), (many, DTYPES[2:])]:
        for dtype in dtypes:
            for gated in (False, True):
                generator = torch.Generator().manual_seed(1)
                d = shape[-1]
                inputs = _system(generator, n, m, d, dtype)
                inputs["h"] = torch.randint(-2, 3, shape, generator=generator).to(dtype)
                inputs["mean"] = torch.randint(-1, 2, (d,), generator=generator).float()
                inputs["row_mask"] = torch.rand(shape[:-1], generator=generator) < 0.8
                inputs["row_mask"][..., 0] = False
                inputs["h"][..., 1, :] = inputs["mean"].to(dtype)  # of norm zero: passes no gate
                options = {"alpha": 0.5, "sparsity": 0.9, "gate_threshold": _threshold(inputs) if gated else None}

                yield _residual_case(f"{shape} N {n} M {m} {dtype}{' gated' if gated else ''}", inputs, options)


def _residual_case(name: str, inputs: Tensors, options: dict) -> Case:
    def edit(x: Tensors) -> dict:
        rest = {key: value for key, value in x.items() if key not in ("h", "offsets")}
        return rest | options | ({"segments": Segments(x["offsets"], max_keys)} if "offsets" in x else {})

    max_keys = options.pop("max_keys", 0)

    def call(x: Tensors) -> tuple[Tensor, ...]:
        return (sparse_lowrank_residual(x["h"], **edit(x)),)

    out = sparse_lowrank_residual_reference(inputs["h"], **edit(inputs))
    few = "offsets" not in inputs and inputs["keys"].shape[0] <= 64 and inputs["h"].shape[-1] % 4 == 0
    few = few and inputs["h"].shape[-1] <= 4096
    return Case(
        f"sparse_lowrank_residual {name}", inputs, call, (out,), {"h": -2, "row_mask": -1}, (-2,), ours=few,
    )  # fmt: skip


def _edit_sets() -> Iterator[Case]:
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(2)
        systems = []
        for n, m in ((5, 5), (40, 12), (0, 0), (1, 1)):
            one = _system(generator, n, m, 96, dtype) if n else {
                "keys": torch.zeros(0, 96).to(dtype), "coef": torch.zeros(0, 0), "values": torch.zeros(0, 96).to(dtype)
            }  # fmt: skip
            mean = torch.randint(-1, 2, (96,), generator=generator).float()
            systems.append((one["keys"], one["coef"], one["values"], mean))
        sets = pack_edit_sets(systems)
        inputs = {
            "h": torch.randint(-2, 3, (7, 20, 96), generator=generator).to(dtype),
            "keys": sets.keys, "coef": sets.coef, "values": sets.values, "mean": sets.mean,
            "edit_set": torch.tensor([1, 0, -1, 3, 1, 2, 0]), "offsets": sets.segments.offsets,
            "row_mask": torch.rand(7, 20, generator=generator) < 0.8,
        }  # fmt: skip
        options = {"alpha": 0.5, "sparsity": 0.5, "max_keys": sets.segments.max_keys}
        yield _residual_case(f"edit sets {dtype}", inputs, options)


def _gram() -> Iterator[Case]:
    # One block an entry, and columns shared out to several, with a last step that is not whole.
    for batch, n, d in ((3, 5, 4), (300, 40, 256), (2, 16, 4100), (3, 64, 1024)):
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(4)
            keys = _halves(generator, batch, n, d).to(dtype)
            lengths = torch.randint(0, n + 1, (batch,), generator=generator)
            lengths[0] = n
            keys[1, lengths[1] :] = math.nan  # padding may hold anything

            def call(x: Tensors) -> tuple[Tensor, ...]:
                return (torch.ops.timerome.gram(x["keys"], x["lengths"]),)

            inputs, wanted = {"keys": keys, "lengths": lengths}, (gram_reference(keys, lengths),)
            flips, shared_out = {"keys": 0, "lengths": 0}, batch < 300 and d > 1000  # then PyTorch sums the parts
            name = f"gram {batch} of {n} keys {dtype}"
            yield Case(name, inputs, call, wanted, flips, (0,), ours=not shared_out)


def _ridge() -> Iterator[Case]:
    # The op itself, on Gram matrices: small ones by the batch, and such as the kernel leaves to torch.linalg.
    for batch, n, ours in ((64, 1, True), (64, 16, True), (33, 40, True), (3, 300, False)):
        generator = torch.Generator().manual_seed(3)
        keys = torch.randn(batch, n, 64, generator=generator).double()
        gram = keys @ keys.mT
        gram[1], gram[2, 0, 0] = -10 * gram[1], math.nan
        ridge = torch.tensor([1e-2, 1.0]).double()[:, None] * torch.ones(batch).double() * 64
        lengths = torch.randint(0, n + 1, (batch,), generator=generator)
        lengths[1:3] = n
        inputs = {"gram": gram, "ridge": ridge, "lengths": lengths}

        def call(x: Tensors) -> tuple[Tensor, ...]:
            return torch.ops.timerome.ridge_cholesky(x["gram"], x["ridge"], x["lengths"])

        wanted = ridge_cholesky_reference(gram, ridge, lengths)
        flips = {"gram": 0, "ridge": 1, "lengths": 0}
        yield Case(f"ridge_cholesky {batch} of order {n}", inputs, call, wanted, flips, (1, 1, 1), 1e-9, ours)
