"""`low_rank` and `hierarchy`: what they resolve to, and what is refused."""

import sys

import pytest
from helpers import tiny

from hf_sparselr import SparseLRConfig, compress
from hf_sparselr.format.hierarchy import HierarchyShape


def config(**fields) -> SparseLRConfig:
    return SparseLRConfig(calibration="self", **{"low_rank": "hss", **fields})


@pytest.mark.parametrize(
    ("hierarchy", "ranks"),
    [
        (None, (24, 12, 6)),
        ({"reduction": 4}, (24, 6, 1)),
        ({"reduction": 1, "depth": 2}, (24, 24)),
        ({"smallest_leaf": 64}, (24, 12)),
        ({"smallest_leaf": 300}, None),
        ({"depth": 0}, None),
    ],
)
def test_ranks_by_level(hierarchy: dict | None, ranks: tuple[int, ...] | None) -> None:
    expected = ranks and HierarchyShape(512, 256, ranks)
    assert config(rank=24, hierarchy=hierarchy).layer_hierarchy((512, 256), 24) == expected


def test_ranks_given_level_by_level_set_the_first_rank() -> None:
    given = config(hierarchy={"ranks": [9, 5]})
    assert given.rank == 9 and given.hierarchy.depth == 2
    assert given.layer_hierarchy((64, 64), 9).ranks == (9, 5)
    assert given.layer_hierarchy((32, 64), 9).ranks == (9,)  # leaves of 16, not of 8


def test_the_published_method_is_hierarchical_and_others_are_flat() -> None:
    assert config(method="shss", low_rank=None).low_rank == "hss"
    assert config(low_rank=None).low_rank == "flat" and config(low_rank=None).hierarchy is None


@pytest.mark.parametrize("fields", [{}, {"hierarchy": {"ranks": [8, 2]}}, {"method": "shss", "low_rank": None}])
def test_json_round_trip(fields: dict) -> None:
    stored = config(**fields).to_dict()
    assert SparseLRConfig.from_dict(stored).to_dict() == stored


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"low_rank": "tree"}, "low_rank='tree'"),
        ({"low_rank": "flat", "hierarchy": {}}, "without low_rank='hss'"),
        ({"low_rank": "flat", "method": "shss"}, "expected 'hss'"),
        ({"method": "oats"}, "method='oats' makes flat factors only, expected 3basil, svd, shss"),
        ({"rank": 0}, "rank=0"),
        ({"overrides": {"q_proj": {"rank": 0}}}, r"overrides\['q_proj'\]\['rank'\]=0"),
        ({"compression": 0.5}, "compression=0.5"),
        ({"allocation": "global"}, "allocation='global'"),
        ({"effort": "published"}, "form='textbook'"),
        ({"hierarchy": {"ranks": [8, 4], "depth": 3}}, "depth=3 contradicts"),
        ({"hierarchy": {"ranks": [8, 4], "reduction": 2}}, "reduction=2 contradicts"),
        ({"hierarchy": {"ranks": [8, 4]}, "rank": 16}, "rank=16 contradicts"),
        ({"hierarchy": {"ranks": [8, 0]}}, "hierarchy.ranks=0"),
        ({"hierarchy": {"depth": -1}}, "hierarchy.depth=-1"),
        ({"hierarchy": {"reduction": 0.5}}, "hierarchy.reduction=0.5"),
        ({"hierarchy": {"permutation": "random"}}, "hierarchy.permutation='random'"),
    ],
)
def test_errors_name_the_field(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_a_permutation_without_scipy_is_an_error_before_work(monkeypatch) -> None:
    settings = tiny.settings(low_rank="hss", hierarchy={"permutation": "rcm"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"hf_sparselr\[hss\]"):
        compress(tiny.build("llama"), settings)
