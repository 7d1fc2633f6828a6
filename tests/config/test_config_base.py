"""What every config object can do: frozen, strict, dead knobs, round trips."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from pydantic import ValidationError

from graft.config.base import SET, Config, FrozenDict, Problem, knob
from graft.config.experiment import Experiment
from graft.config.load import load_experiment_from_dict


class Inner(Config):
    size: int = knob(1, "a size", ge=1)
    other: int = knob(1, "another size", ge=1)

    def problems(self) -> Iterator[Problem]:
        if self.size == self.other == 7:
            yield Problem(("size",), f"size {self.size} equals other {self.other}", "change one")


class Outer(Config):
    mode: str = knob("plain", "a mode")
    rate: float | None = knob(None, "a rate")
    only_in_fancy: int = knob(3, "acts in fancy mode", only_if={"mode": ("fancy", "fancier")})
    only_with_rate: int = knob(3, "acts with a rate", only_if={"rate": SET})
    inner: Inner = knob(doc="inside", factory=Inner)
    tables: Mapping[str, tuple[Inner, ...]] = knob(doc="more inside", factory=dict)
    free: Mapping[str, Any] = knob(doc="anything", factory=dict)

    def problems(self) -> Iterator[Problem]:
        if self.mode == "broken":
            yield Problem(("mode",), "the mode is broken")


def messages(data: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    return [p.message for e in caught.value.errors() for p in e.get("ctx", {}).get("problems", [])]


def test_a_knob_that_does_nothing_is_an_error() -> None:
    assert messages({"only_in_fancy": 4}) == [
        "only_in_fancy does nothing here: it acts only if mode is 'fancy' or 'fancier' (it is 'plain')"
    ]
    assert messages({"only_with_rate": 4, "mode": "broken"}) == [
        "only_with_rate does nothing here: it acts only if rate is set (it is None)",
        "the mode is broken",
    ]
    assert Outer.model_validate({"only_in_fancy": 4, "mode": "fancier"}).only_in_fancy == 4
    assert Outer.model_validate({"only_with_rate": 4, "rate": 0.0}).only_with_rate == 4


def test_an_inert_knob_at_its_default_is_no_error() -> None:
    written_out = Outer.model_validate({"only_in_fancy": 3})
    assert Outer.model_validate(written_out.to_dict()) == Outer()


@pytest.mark.parametrize(
    "data",
    [
        {"mode": 3},
        {"rate": "1"},
        {"inner": {"size": 1.0}},
        {"inner": {"size": True}},
        {"rate": float("nan")},
        {"rate": float("inf")},
        {"extra": 1},
        {"inner": None},
    ],
)
def test_values_are_taken_strictly(data: Any) -> None:
    with pytest.raises(ValidationError):
        Outer.model_validate(data)


def test_all_problems_have_paths_from_the_top() -> None:
    bad = {"size": 7, "other": 7}
    data = {"mode": "broken", "inner": bad, "tables": {"a": [{}, bad]}}
    config = Outer.model_validate(data, context={"defer_problems": True})
    assert [p.path for p in config.all_problems()] == [("inner", "size"), ("tables", "a", 1, "size"), ("mode",)]
    assert Outer().all_problems() == []


def test_nothing_in_a_config_can_be_changed() -> None:
    config = Outer.model_validate({"tables": {"a": [{}]}, "free": {"x": {"y": [1, {"z": 2}]}}})
    with pytest.raises(ValidationError):
        config.mode = "fancy"  # pyright: ignore[reportAttributeAccessIssue]
    for table in (config.tables, config.free, config.free["x"], config.free["x"]["y"][1]):
        assert isinstance(table, FrozenDict)
        for change in (
            lambda t: t.update(b=1),
            lambda t: t.__setitem__("b", 1),
            lambda t: t.__delitem__(next(iter(t))),
            lambda t: t.pop(next(iter(t))),
            lambda t: t.popitem(),
            lambda t: t.setdefault("b", 1),
            lambda t: t.clear(),
            lambda t: t.__ior__({"b": 1}),
        ):
            with pytest.raises(TypeError, match="frozen"):
                change(table)
    assert isinstance(config.free["x"]["y"], tuple)


def test_the_data_a_config_was_made_of_is_not_part_of_it() -> None:
    data: dict[str, Any] = {"free": {"x": [1]}}
    config = Outer.model_validate(data)
    data["free"]["x"].append(2)
    assert config.free["x"] == (1,)


def test_equal_configs_hash_equal_and_survive_copies() -> None:
    a = Outer.model_validate({"tables": {"a": [{}], "b": []}})
    b = Outer.model_validate({"tables": {"b": [], "a": [{"size": 1}]}})
    assert a == b
    assert hash(a) == hash(b)
    for again in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert again == a
        assert isinstance(again.tables, FrozenDict)


def test_replace_validates(small: dict[str, Any]) -> None:
    experiment = load_experiment_from_dict(small)
    assert experiment.replace(seed=3).seed == 3
    assert experiment.replace(seed=3).model == experiment.model
    with pytest.raises(ValidationError):
        experiment.replace(seed="3")
    with pytest.raises(ValidationError):
        experiment.replace(nonsense=3)
    with pytest.raises(ValidationError):
        experiment.replace(training=experiment.training.replace(max_steps=1))  # shorter than the warm-up


def test_type_comes_first_in_plain_data(small: dict[str, Any]) -> None:
    data = load_experiment_from_dict(small).to_dict()
    assert next(iter(data["model"]["blocks"]["b"][0])) == "type"
    assert Experiment.model_validate(data).to_dict() == data
