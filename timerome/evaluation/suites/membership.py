"""Membership inference on two sets of texts: which of them is in the training data?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..comparison import composite
from ..measurement import Sheet
from ..metrics import membership as metric
from ..respondent import Pair, Respondent
from ..tokens import TokenScores

HOW = "folds of one eighth hidden, a token"

ATTACKS: dict[str, Callable[[TokenScores, str], float]] = {
    "LOSS": lambda scores, text: metric.loss_score(scores.log_prob),
    "zlib": lambda scores, text: metric.zlib_score(scores.log_prob, text),
    "min_20": lambda scores, text: metric.min_k(scores.log_prob, 20),
    "min_40": lambda scores, text: metric.min_k(scores.log_prob, 40),
    "min_20_plus_plus": lambda scores, text: metric.min_k_plus_plus(scores.log_prob, scores.mean, scores.std, 20),
    "min_40_plus_plus": lambda scores, text: metric.min_k_plus_plus(scores.log_prob, scores.mean, scores.std, 40),
}


def add_scores(
    sheet: Sheet, respondent: Respondent, side: str, pairs: Mapping[str, Pair], *, how: str, note: str = ""
) -> None:
    """Add the mean score of a set of texts by every attack, as ``mia.<side>.<attack>``; higher is more like a member.

    Args:
        sheet: to add to.
        respondent: the model.
        side: what the set is called.
        pairs: prompt, which may be empty, and text, by record.
        how: what is said of it beside the states.
        note: why there may be none.
    """
    fit = {k: pair for k, pair in pairs.items() if respondent.fits(*pair)}
    scores = respondent.tokens(list(fit.values()), states="folds", moments=True, label=f"membership, {side}")
    found = dict(zip(fit, scores, strict=True))
    for name, score in ATTACKS.items():
        values = {k: score(found[k], fit[k][1]) for k in fit}
        unit = "nats" if name in ("LOSS", "min_20", "min_40") else "score"
        sheet.add(f"mia.{side}.{name}", values, f"{HOW}, {how}", of=len(pairs), better="neither", unit=unit, note=note)


def add_comparison(sheet: Sheet, members: str, others: str, *, privleak: bool = False) -> None:
    """Compare two sides that have scores, as ``mia.AUC.<attack>``, ½ where they are not told apart.

    Args:
        sheet: to add to.
        members: the side that was in the training data.
        others: the side that was not.
        privleak: also add ``mia.PrivLeak.<attack>``: 0 is ideal, below 0 still known.
    """
    for name in ATTACKS:
        terms = {side: sheet[f"mia.{side}.{name}"] for side in (members, others)}
        how = f"AUC, {members} as members and {others} as others"
        sheet.put(composite(f"{sheet.prefix}.mia.AUC.{name}", terms, "AUC", definition=how, better="neither"))
        if privleak:
            how = f"PrivLeak of {members} against {others}, the retain-only model's AUC taken as 0.5"
            full = f"{sheet.prefix}.mia.PrivLeak.{name}"
            sheet.put(composite(full, terms, "PrivLeak", definition=how, unit="percent", better="closer to 0"))
