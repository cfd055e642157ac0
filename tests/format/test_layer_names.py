import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparselr.format.layer_names import compact_names, expand_names

PARTS = st.one_of(st.integers(0, 12).map(str), st.sampled_from(["q_proj", "layers", "007", "{0}", "{1-2", "-1"]))
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@given(st.sets(NAMES))
def test_patterns_stand_for_exactly_the_names(names):
    sets = {name for name in names if any(part == "{0}" for part in name.split("."))}
    kept = names - sets  # a component that reads as a set is one
    assert sorted(expand_names(compact_names(kept))) == sorted(kept)


def test_blocks_and_experts_become_one_pattern_a_kind():
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(48) for j in range(64)]
    assert compact_names(names) == ["model.layers.{0-47}.mlp.experts.{0-63}.up_proj"]
    names.remove("model.layers.3.mlp.experts.5.up_proj")
    assert sorted(compact_names(names)) == [
        "model.layers.3.mlp.experts.{0-4,6-63}.up_proj",
        "model.layers.{0-2,4-47}.mlp.experts.{0-63}.up_proj",
    ]
    assert compact_names(["h.7.c_attn"]) == ["h.7.c_attn"]


@pytest.mark.parametrize("pattern", ["a.{3-1}", "a.{0-99999999999}", "a.{0-999}.{0-999}.{0-9}"])
def test_what_no_model_can_hold_is_refused(pattern):
    with pytest.raises(ValueError, match=r"layer name"):
        expand_names([pattern])


def test_a_name_that_is_no_string_is_refused():
    with pytest.raises(TypeError, match="layer name 7: expected a string"):
        expand_names([7])
