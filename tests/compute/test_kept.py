"""Models are kept by what was loaded, few of them; programs by what was compiled in."""

import gc
import weakref

import pytest

from common.compute.kept import Kept


class Model:
    pass


def test_a_model_is_loaded_once_until_its_place_is_needed() -> None:
    kept, loads = Kept(most_models=2), []

    def get(key: str) -> Model:
        def load() -> Model:
            loads.append(key)
            return Model()

        return kept.model(key, load)

    first, second = get("a"), get("b")
    assert get("a") is first and get("b") is second and get("a") is first
    get("c")  # takes the place of b, which was not used for the longest time
    assert get("a") is first
    assert get("b") is not second
    assert loads == ["a", "b", "c", "b"]


def test_a_model_goes_before_its_successor_is_loaded() -> None:
    kept = Kept(most_models=1)
    before = weakref.ref(kept.model("a", Model))

    def load() -> Model:
        gc.collect()
        assert before() is None
        return Model()

    kept.model("b", load)


def test_a_variant_gets_what_all_of_its_base_share() -> None:
    kept, got = Kept(most_models=2), []

    def get(base: str, added: str) -> str:
        def load(shared: str) -> str:
            got.append(shared)
            return f"{base}+{added}"

        return kept.variant(base, added, "|".join, load)

    assert get("a", "x") == "a+x" and get("b", "x") == "b+x" and get("a", "y") == "a+y"
    assert get("a", "x") == "a+x"  # which went when a+y came
    assert get("a", "x") == "a+x" and get("b", "x") == "b+x"
    assert get("b", "y") == "b+y" and get("b", "z") == "b+z"
    assert got == ["", "", "a+x", "a+y", "", "b+x", "b+x|b+y"]


def test_a_variant_needs_no_more_memory_than_its_own() -> None:
    kept = Kept(most_models=1)
    before = weakref.ref(kept.variant("a", "x", len, lambda _: Model()))

    def load(shared: int) -> Model:
        gc.collect()
        assert before() is None and shared == 1
        return Model()

    kept.variant("a", "y", len, load)


def test_a_model_that_could_not_be_loaded_is_tried_again() -> None:
    kept = Kept()

    def fail() -> Model:
        raise OSError("no such file")

    with pytest.raises(OSError):
        kept.model("a", fail)
    assert isinstance(kept.model("a", Model), Model)


def test_programs_outlive_models() -> None:
    kept = Kept(most_models=1)
    kept.programs("architecture")["shape"] = "compiled"
    for key in "abc":
        kept.model(key, Model)
    assert kept.programs("architecture") == {"shape": "compiled"}
    assert kept.programs("another") == {}
    kept.clear()
    assert kept.programs("architecture") == {}
