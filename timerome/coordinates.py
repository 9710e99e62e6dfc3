"""Where an edit acts: sites, roles and coordinates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

Module = Literal["block", "attn", "mlp"]
Role = Literal["subject_last", "subject", "object", "prompt"]
MODULES: tuple[Module, ...] = get_args(Module)
ROLES: tuple[Role, ...] = get_args(Role)


class Site(NamedTuple):
    """A place in the model whose output can be read and changed.

    Attributes:
        layer: index of the block, from 0.
        module: ``"block"`` (the residual stream after the block), ``"attn"`` or ``"mlp"`` (what that part adds to it).
    """

    layer: int
    module: Module = "block"

    def __str__(self) -> str:
        return f"{self.module}.{self.layer}"


@dataclass(frozen=True)
class Coordinate:
    """A site, a denoising step and the positions that are read there (design section 2).

    Attributes:
        layer: index of the block, from 0.
        module: ``"block"``, ``"attn"`` or ``"mlp"``.
        step: index of the denoising step; 0 is the state in which the whole answer is masked.
        role: ``"subject_last"``, ``"subject"``, ``"object"`` (answer positions still masked) or ``"prompt"``.

    Raises:
        ValueError: a field is outside its range.

    Example:
        >>> str(Coordinate(3, "block", 0, "object"))
        'block.3 @ step 0, object'
    """

    layer: int
    module: Module = "block"
    step: int = 0
    role: Role = "object"

    def __post_init__(self) -> None:
        if self.module not in MODULES:
            raise ValueError(f"Coordinate: expected module in {MODULES}, got {self.module!r}.")
        if self.role not in ROLES:
            raise ValueError(f"Coordinate: expected role in {ROLES}, got {self.role!r}.")
        if self.layer < 0 or self.step < 0:
            raise ValueError(f"Coordinate: layer and step count from 0, got layer {self.layer}, step {self.step}.")

    @property
    def site(self) -> Site:
        """The layer and module."""
        return Site(self.layer, self.module)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.site} @ step {self.step}, {self.role}"
