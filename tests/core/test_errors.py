"""Words for what is wrong: an unknown word is answered by the known ones, and pydantic's findings by their place."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from smartlab.core.errors import UseError, misfit, one_of, problems_of

TASKS = ("probe", "knn")


def test_an_unknown_word_is_answered_by_the_known_ones_and_the_nearest():
    more = {"also": ", or a path", "path": "plan.yaml", "fix": "ask somebody"}
    said = r"^plan.yaml: no task 'porbe' here \(expected one of probe, knn, or a path\)\. Did you mean 'probe'\?$"
    with pytest.raises(UseError, match=said):
        one_of("no task", "porbe", TASKS, " here", **more)
    with pytest.raises(UseError, match=r"no task \['x'\] .*Ask somebody\.$"):
        one_of("no task", ["x"], iter(TASKS), **more)
    one_of("no task", "knn", iter(TASKS))


class Given(BaseModel):
    model_config = ConfigDict(extra="forbid")

    steps: list[int] = []


def test_what_pydantic_finds_is_told_with_its_place():
    with pytest.raises(ValidationError) as caught:
        Given.model_validate({"steps": [1, "many"], "lr": 1})
    first, second = problems_of(caught.value)
    assert (first.place, first.value, second.where) == ("steps.1", "many", ("lr",))
    assert str(first).startswith("steps.1: Input should be a valid integer")
    assert second.kind == "extra_forbidden"
    assert str(misfit("setting ", caught.value)).startswith(
        "setting steps.1: Input should be a valid integer"
    )
    assert str(misfit("", caught.value, fix="see there")).endswith("(found 'many'). See there.")
