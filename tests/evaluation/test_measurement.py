"""Measurements: what may be put together, and what may not."""

import json
import math

import numpy as np
import pytest

from timerome.evaluation import Absent, Measurement, UnlikeMeasurementsError, paired

VALUES = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.5}


def measured(values=VALUES, metric="em", protocol="l2r", **more):
    return Measurement.over(metric, values, protocol=protocol, seed=0, **more)


def test_a_mean_carries_its_standard_error_interval_and_sample_size():
    found = measured()
    assert (found.value, found.n, found.seed, found.protocol) == (0.625, 4, 0, "l2r")
    # Deviations 0.375, -0.625, 0.375, -0.125: variance 0.6875 / 3, over 4 records.
    assert found.standard_error == pytest.approx(math.sqrt(0.6875 / 3 / 4))
    assert found.low < found.value < found.high


def test_what_cannot_be_computed_is_absent_with_its_reason_and_never_a_number():
    gone = measured({}, note="no record has a paraphrase")
    assert gone == Absent("em", "no record has a paraphrase")
    assert not hasattr(gone, "value")
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="Absent"):
            Measurement("em", value, "share", "l2r", 0, 3)
    with pytest.raises(ValueError, match="finite"):
        measured({"a": 1.0, "b": math.nan})


@pytest.mark.parametrize(
    ("change", "what"),
    [({"metric": "ps"}, "metric"), ({"protocol": "onestep"}, "protocol"), ({"unit": "nats"}, "unit")],
)
def test_unlike_metrics_cannot_be_compared(change, what):
    with pytest.raises(UnlikeMeasurementsError, match=what):
        paired(measured(), measured(**change))


def test_paired_conditions_have_difference_interval_p_value_and_effect_size():
    before = measured({str(i): 0.1 * i for i in range(8)})
    after = measured({str(i): 0.1 * i + 0.2 + 0.01 * (i % 3) for i in reversed(range(8))})
    found = paired(before, after)
    gains = np.array([0.2 + 0.01 * (i % 3) for i in range(8)])
    assert found.difference == pytest.approx(gains.mean())
    assert found.low <= found.difference <= found.high
    assert (found.p_value, found.exact, found.n) == (2 / 256, True, 8)
    assert found.effect_size == pytest.approx(gains.mean() / gains.std(ddof=1))


def test_pairing_wants_the_same_records():
    with pytest.raises(UnlikeMeasurementsError, match="3 are shared"):
        paired(measured(), measured({"a": 1.0, "b": 0.0, "c": 1.0}))
    total = Measurement("em", 1.0, "share", "l2r", 0, 4)
    with pytest.raises(UnlikeMeasurementsError):
        paired(total, total)


def test_everything_survives_json():
    for result in (measured(), measured({"a": 1.0})):
        again = Measurement.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
        assert again.to_dict() == result.to_dict()
