"""TOFU's forget quality: truth ratios compared with those of a model that was never taught the forget set."""

from __future__ import annotations

import json
from pathlib import Path

from ..._files import write_text
from ...facts import FactError
from ..measurement import Absent, Measurement, Result
from ..metrics import tofu as metric


def write_reference(path: str | Path, measurement: Measurement) -> None:
    """Write a retain-only model's truth ratios, for :func:`read_reference`."""
    write_text(Path(path), json.dumps(measurement.to_dict(), indent=1) + "\n")


def read_reference(path: str | Path) -> Measurement:
    """Read what :func:`write_reference` wrote.

    Raises:
        FactError: the file holds no measurement of truth ratios.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_reference: there is no file {path}.")
    try:
        found = Measurement.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise FactError(f"{path}: expected a measurement that write_reference made, got {error!r}.") from None
    if not found.metric.endswith(".log_truth_ratio"):
        raise FactError(f"{path}, field 'metric': expected …log_truth_ratio, got {found.metric!r}.")
    return found


def forget_quality(ratios: Result, reference: Measurement | None) -> Result:
    """Compare truth ratios with a retain-only model's by a two-sample Kolmogorov-Smirnov test; log10 of its p-value.

    Args:
        ratios: what :func:`~timerome.evaluation.suites.tofu.truth_ratios` found for the edited model.
        reference: the same of a model that was never taught the records.

    Returns:
        The measurement; Absent if there is no reference, or it is of other records or another protocol.
    """
    name = "tofu.forget_quality"
    if isinstance(ratios, Absent):
        return Absent(name, f"truth ratios are absent: {ratios.reason}")
    if reference is None:
        return Absent(name, "needs the truth ratios of a retain-only model; give its file as the reference")
    for what in ("metric", "protocol", "seed"):
        if getattr(ratios, what) != getattr(reference, what):
            return Absent(
                name, f"the reference has another {what}: {getattr(reference, what)!r} where "
                f"{getattr(ratios, what)!r} was measured",
            )  # fmt: skip
    shared = [k for k in ratios.per_record if k in reference.per_record]
    if len(shared) < len(ratios.per_record):
        return Absent(name, f"the reference lacks {len(ratios.per_record) - len(shared)} of the records")
    found = metric.forget_quality([ratios.per_record[k] for k in shared], [reference.per_record[k] for k in shared])
    note = f"p = {found.p_value:.3g}, largest distance of distribution functions {found.statistic:.3f}"
    return Measurement(
        name, found.log10_p, "log10 p", f"two-sample KS test of truth ratios; {ratios.protocol}", ratios.seed,
        len(shared), note=note,
    )  # fmt: skip
