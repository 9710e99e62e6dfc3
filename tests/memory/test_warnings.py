"""An edit of what the model does not say is made, and said to be one that may never act."""

import pytest

import timerome as tr


def test_an_edit_of_what_the_model_does_not_say_is_warned_of():
    model = tr.load("testbed")
    unknown = tr.Fact(id="a", prompt="The capital city of Nigeria is", subject="Nigeria", object="Quxville")
    known = tr.datasets.bundled("relations")[0]
    with pytest.warns(UserWarning, match=r"not about to say 'Quxville'.*teach\(\)"):
        made = tr.EditMemory(model).replace(
            tr.Fact(id="b", prompt="Zzz qqq xkcd", subject="xkcd", object="Quxville"), "Lagos"
        )
    assert made.says == "Lagos"
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tr.EditMemory(model).replace(known, "Lagos")
        # What it says in place of the fact's object is watched for, and that it is sure of.
        assert [w.text for w in tr.EditMemory(model).replace(unknown, "Lagos").gate.watches][-1] == "Abuja"
