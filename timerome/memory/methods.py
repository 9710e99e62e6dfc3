"""Methods: how what an edit adds is computed. Each is a value with its own parameters and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backbones import Backbone
from ..coordinates import Coordinate, Role, Site
from ..errors import TimeromeError
from ..facts import Fact, FactError, FactSet
from ..functional.lens import shared_lens_targets
from ..functional.selection import pivoted_cholesky
from .edits import Keyed, Part, Placed
from .reading import Wish, read
from .states import BankConfig, activations, positions_of, states_of
from .targets import EstimatorName, check_lens, estimator_of

At = Any  # None, a layer, a Site, a Coordinate, several, a mapping by fact id or group, or a function of the fact


class Asked(NamedTuple):
    """A fact's own question with its whole canvas masked, and what the model makes of it.

    Attributes:
        ids: the state, ``(L,)``.
        canvas: boolean ``(L,)``.
        hidden: the last block's output where the canvas is predicted, ``(C, d)`` float32, on the model's device.
    """

    ids: Tensor
    canvas: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class ByPlace:
    """Put an activation that decodes the wanted token in place of the last block's output, place by place.

    The smallest change of what the model has there that makes the token lead by ``margin`` through the final norm and
    the unembedding, in closed form; see :func:`timerome.functional.lens.shared_lens_targets`. Since nothing after the
    last block mixes positions, what is said then depends on no state, no wording and no canvas.

    Attributes:
        margin: by how many logits the wanted token leads.

    Raises:
        TimeromeError: the margin is not positive.

    Source: ours.
    """

    margin: float = 12.0

    def __post_init__(self) -> None:
        if not self.margin > 0:
            raise TimeromeError(f"ByPlace: expected margin > 0, got {self.margin}.")

    def place(self, backbone: Backbone, fact: Fact, says: str, asked: Asked, at: At = None) -> Placed:
        """Return the change that makes the model say a text.

        Args:
            backbone: the model.
            fact: what is edited.
            says: the text.
            asked: the fact's own question, as read.
            at: None or the last block; there is no other place for it.

        Raises:
            TimeromeError: another place is asked for, or the unembedding is not linear after the final norm.
            FactError: the text has no tokens, or holds the mask.
        """
        last = Coordinate(backbone.n_layers - 1)
        if coordinates_of(at, fact, last) != (last,):
            raise TimeromeError(
                f"ByPlace acts at the last block ({last.site}) alone, got at={at!r}; leave `at` out, or use "
                "method=Ridge(targets='lens')."
            )
        check_lens(backbone, last)
        ends = backbone.eos_id is not None
        told = spelt(backbone, says)
        if backbone.mask_id in {t for tokens in told for t in tokens}:
            raise FactError(f"EditMemory: the answer {says!r} of fact {fact.id!r} holds the mask token; leave it out.")
        distinct = dict.fromkeys(t for tokens in told for t in tokens)
        if ends:
            eos = int(backbone.eos_id or 0)
            distinct.pop(eos, None)
            distinct[eos] = None  # the last one
        tokens = torch.tensor(list(distinct), device=backbone.device)
        hidden = asked.hidden[torch.arange(len(tokens)) % len(asked.hidden)]
        places = torch.arange(len(tokens), device=backbone.device)
        with torch.no_grad():
            change = shared_lens_targets(
                hidden, places, tokens, backbone.unembed, backbone.final_norm, backbone.head.get_parameter("weight"),
                margin=self.margin,
            )  # fmt: skip
            targets = hidden + change
            said = backbone.predictions(targets).argmax(-1)
        refuse_nonfinite(targets, fact, last.site)
        if not torch.equal(said, tokens):
            wrong = backbone.decode(tokens[said != tokens][:1])
            raise TimeromeError(f"ByPlace: no activation of {backbone.name} decodes {wrong!r} of fact {fact.id!r}.")
        row = {token: i for i, token in enumerate(distinct)}
        numbers = tuple(tuple(row[t] for t in one) for one in told)
        return Placed(numbers, targets.float().cpu(), last.layer, ends)


@dataclass(frozen=True)
class Ridge:
    """A ridge-regularised, low-rank, sparsified memory of key activations: the paper's change, behind a gate or not.

    Attributes:
        targets: what each key is changed towards: ``"null"`` (what the model says unasked) or ``"corrupt"`` to forget,
            ``"donor"`` (the new fact stated in context) or ``"lens"`` to replace.
        rank: most keys a fact may have, at each coordinate, chosen by pivoted Cholesky.
        ridge: λ > 0, relative to the mean squared norm of the keys.
        sparsity: q, share of each row's entries that are dropped, 0 <= q < 1.
        alpha: strength α, shared out where there are several coordinates.
        protect: facts whose activations get target zero; None protects nothing.
        beta: β >= 0, weight of the protected keys.
        states: the states over which keys are read.

    Raises:
        TimeromeError: a value is out of range.

    Source: TimeROME-DLM (Yao et al. 2026, arXiv 2606.12841); protection after AlphaEdit (arXiv 2410.02355).
    """

    targets: EstimatorName = "null"
    rank: int = 64
    ridge: float = 0.01
    sparsity: float = 0.5
    alpha: float = 1.0
    protect: FactSet | None = None
    beta: float = 1.0
    states: BankConfig = field(default_factory=BankConfig)

    def __post_init__(self) -> None:
        estimator_of(self.targets)
        for name, fits, wanted in (
            ("rank", self.rank >= 1, ">= 1"),
            ("ridge", self.ridge > 0, "> 0"),
            ("sparsity", 0 <= self.sparsity < 1, "in [0, 1)"),
            ("alpha", abs(self.alpha) < 1e6, "of less than a million"),
            ("beta", self.beta >= 0, ">= 0"),
        ):
            if not fits:
                raise TimeromeError(f"Ridge: expected {name} {wanted}, got {getattr(self, name)}.")

    def usual(self, backbone: Backbone) -> Coordinate:
        """Where it works best: the last block for ``lens``, a third of the depth before it for the others."""
        last = backbone.n_layers - 1
        return Coordinate(last if self.targets == "lens" else max(0, last - backbone.n_layers // 3))

    def system(
        self, backbone: Backbone, facts: Sequence[Fact], at: At = None, *, together: bool = False
    ) -> list[Keyed]:
        """Return the changes of some facts, read from the model as it is without any memory.

        Args:
            backbone: the model.
            facts: the facts, each with its wanted answer as ``new_object``.
            at: where.
            together: solved as one system.

        Raises:
            FactError: a fact does not fit, or has no ``new_object`` although the targets replace answers.
            ValueError: a coordinate does not exist.
            FloatingPointError: activations are not finite.
        """
        if self.targets in ("lens", "donor"):
            if without := [fact.id for fact in facts if fact.new_object is None]:
                raise FactError(
                    f"Ridge: targets={self.targets!r} say something new, but {without[:5]} have no new_object; give "
                    "them one, or use 'null' to forget."
                )
        own = [coordinates_of(at, fact, self.usual(backbone)) for fact in facts]
        frames = {c: self._frame(backbone, c) for c in dict.fromkeys(c for cs in own for c in cs)}
        found = []
        for fact, coordinates in zip(facts, own, strict=True):
            states = states_of(backbone, fact, self.states)
            parts = []
            for coordinate in coordinates:
                keys = keys_of(backbone, states, coordinate.site, coordinate.role)
                refuse_nonfinite(torch.cat(keys), fact, coordinate.site)
                targets = estimator_of(self.targets)(backbone, [fact] * len(states), states, keys, coordinate)
                mean, protect = frames[coordinate]
                chosen = self._select(torch.cat(keys), torch.cat(targets), mean)
                refuse_nonfinite(chosen[1], fact, coordinate.site)
                parts.append(Part(coordinate, *chosen, mean, protect))
            found.append(Keyed(tuple(parts), self.alpha, self.ridge, self.sparsity, self.beta, together))
        return found

    def _frame(self, backbone: Backbone, coordinate: Coordinate) -> tuple[Tensor | None, Tensor | None]:
        """Return the mean of the protected keys and those keys; None without any."""
        if self.protect is None:
            return None, None
        found = []
        for fact in self.protect:
            states = states_of(backbone, fact, self.states)
            found += keys_of(backbone, states, coordinate.site, coordinate.role)
            refuse_nonfinite(torch.cat(found[-len(states) :]), fact, coordinate.site)
        protect = torch.cat(found)
        return protect.mean(0), protect

    def _select(self, keys: Tensor, targets: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keep at most ``rank`` keys, those that span the others best about ``mean``, with their targets."""
        if len(keys) <= self.rank:
            return keys, targets
        centred = keys.double() if mean is None else keys.double() - mean.double()
        chosen = pivoted_cholesky(centred @ centred.T, self.rank)
        return keys[chosen], targets[chosen]


Method = ByPlace | Ridge


def spelt(backbone: Backbone, text: str) -> tuple[tuple[int, ...], ...]:
    """Return a text's tokens as they follow a blank and as they begin a line, in this order; each way once."""
    text = text.strip()
    return tuple(dict.fromkeys(tuple(backbone.encode(t)) for t in (" " + text, text)))


def ask(backbone: Backbone, prompt: str, canvas: int) -> Asked:
    """Read a prompt with a fully masked canvas, which is cut to what the context holds.

    Raises:
        FactError: the context holds no canvas beside the prompt.
        FloatingPointError: activations are not finite.
    """
    tokens = backbone.encode(prompt)
    room = min(canvas, backbone.max_length - len(tokens))
    if not tokens or room < 1:
        raise FactError(
            f"EditMemory: the prompt {prompt[:60]!r} has {len(tokens)} tokens; {backbone.name} holds "
            f"{backbone.max_length} with the answer, and needs at least one of each."
        )
    ids = torch.tensor(tokens + [backbone.mask_id] * room)
    where = torch.arange(len(ids)) >= len(tokens)
    site = Site(backbone.n_layers - 1)
    ((_, found),) = read(backbone, [Wish(ids, {site: backbone.reads_from(where)})])
    hidden = found[site].float()
    if not torch.isfinite(hidden).all():
        raise FloatingPointError(f"EditMemory: activations at {site} are not finite; check the weights and the dtype.")
    return Asked(ids, where, hidden)


def keys_of(backbone: Backbone, states: Sequence[Any], site: Site, role: Role) -> list[Tensor]:
    """Return a site's output at the positions of a role, ``(n_i, d)`` float32 on the CPU for each state."""
    where = [positions_of(backbone, state, role) for state in states]
    return activations(backbone, [state.ids for state in states], site, where)


def coordinates_of(at: At, fact: Fact, usual: Coordinate) -> tuple[Coordinate, ...]:
    """Return where a fact is edited.

    Args:
        at: None (the usual place), a layer, a site, a coordinate, several of them, a mapping of any of these by fact id
            or group, or a function of the fact.
        fact: the fact.
        usual: the method's own place, whose role goes with a layer or a site.

    Raises:
        TimeromeError: it is none of these, names no place for the fact, or names one site twice.
    """
    found: Any = usual if at is None else at
    if isinstance(found, Mapping):
        key = fact.id if fact.id in found else fact.group
        if key not in found:
            raise TimeromeError(
                f"EditMemory: no place for fact {fact.id!r}, nor for its group {fact.group!r}; `at` has "
                f"{list(found)[:5]}."
            )
        found = found[key]
    elif isinstance(found, Callable):  # type: ignore[arg-type]
        found = found(fact)
    several = found if isinstance(found, Iterable) and not isinstance(found, (Site, str)) else [found]
    places = tuple(_coordinate(one, usual) for one in several)
    sites = [place.site for place in places]
    if not places or len(set(sites)) < len(sites):
        raise TimeromeError(f"EditMemory: expected `at` to name distinct sites, got {list(map(str, sites))}.")
    return places


def _coordinate(one: Any, usual: Coordinate) -> Coordinate:
    if isinstance(one, Coordinate):
        return one
    if isinstance(one, Site):
        return Coordinate(one.layer, one.module, 0, usual.role)
    if isinstance(one, int) and not isinstance(one, bool):
        return Coordinate(one, usual.module, 0, usual.role)
    raise TimeromeError(
        f"EditMemory: expected `at` to be a layer, a Site, a Coordinate, several of them, or a mapping by fact id or "
        f"group, got {one!r:.60}."
    )


def refuse_nonfinite(values: Tensor, fact: Fact, site: Site) -> None:
    """Refuse activations that are not finite.

    Raises:
        FloatingPointError: it is so.
    """
    if not torch.isfinite(values).all():
        raise FloatingPointError(
            f"EditMemory: activations of fact {fact.id!r} at {site} are not finite; check the model's weights and "
            "dtype."
        )
