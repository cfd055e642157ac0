"""SparseLRConfig: JSON round trips, runtime objects, and what it refuses."""

import copy
import inspect
import json
import re
import sys
import threading
from dataclasses import asdict, fields

import pytest
import torch

from hf_sparselr.config.fields import FIELDS
from hf_sparselr.config.options import ALLOCATION_OPTIONS, DistillOptions, TMOptions
from hf_sparselr.config.presets import NOISY_WINDOWS, PRESETS
from hf_sparselr.config.reference import README, attributes, written
from hf_sparselr.config.sparselr_config import FORMAT_VERSION, SparseLRConfig
from hf_sparselr.data.calibration import CUSTOM
from hf_sparselr.format.patterns import NM, Unstructured
from hf_sparselr.solvers.registry import METHODS, PRECOMPUTED
from hf_sparselr.solvers.threebasil.method import Options
from hf_sparselr.utils.validation import covers, matches

FULL = {
    "sparsity": 0.6,
    "rank": 16,
    "refine": None,
    "calibration": "me/texts:part",
    "num_samples": 32,
    "seq_len": 512,
    "noisy_windows": 0.25,
    "batch_size": 2,
    "seed": 7,
    "targets": ["q_proj", r"mlp\..*"],
    "ignore": ["layers.0.mlp.up_proj"],
    "overrides": {"down_proj": {"sparsity": "4:8", "rank": 0}, "k_proj": {"skip": True}},
    "on_incompatible": "skip",
    "allocation": "global",
    "method_options": {"rho": 0.2, "growth": [1.2, 1.1, 1.0]},
    "tm": {"passes": 3, "lr": 1e-4},
    "distill": {"passes": 3, "train": "factors"},
    "effort": "high",
    "damping": (0.01, 0),
}


class Unserialisable:
    """Neither JSON nor copy.deepcopy can take it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def texts():
    yield "a generator can be read once"


# JSON


@pytest.mark.parametrize("fields", [{}, FULL, {"method_options": Options(rho=0.3), "tm": TMOptions(passes=2)}])
def test_json_round_trip(fields: dict) -> None:
    config = SparseLRConfig(**fields)
    for back in (
        SparseLRConfig.from_dict(json.loads(config.to_json_string())),
        SparseLRConfig.from_dict(config.to_dict()),
        SparseLRConfig.from_dict(dict(config)),
        config.stored(),
    ):
        assert back == config and back.to_dict() == config.to_dict()
        assert (back.method_options, back.tm, back.damping) == (
            config.method_options,
            config.tm,
            config.damping,
        )
        assert (back.distill, back.effort) == (config.distill, config.effort)
        for name in ("layers.1.mlp.down_proj", "layers.1.k_proj"):
            assert back.layer_settings(name, (8, 16)) == config.layer_settings(name, (8, 16))


@pytest.mark.parametrize("field", FULL)
def test_every_field_is_stored(field: str) -> None:
    config = SparseLRConfig(**{field: FULL[field]})
    assert config != SparseLRConfig()
    assert config.to_dict()[field] != SparseLRConfig().to_dict()[field]
    assert config.stored() == config


def test_stores_resolved_options_and_identity() -> None:
    stored = SparseLRConfig(**FULL).to_dict()
    assert stored["quant_method"] == "sparselr" and stored["format_version"] == FORMAT_VERSION
    assert stored["method_options"]["rho"] == 0.2 and stored["method_options"]["cg_steps"] == Options().cg_steps
    assert stored["tm"]["passes"] == 3 and stored["tm"]["batch_size"] == PRESETS["high"]["tm"]["batch_size"]
    assert json.loads(json.dumps(stored)) == stored


def test_to_dict_shares_nothing_with_the_config() -> None:
    config = SparseLRConfig(**FULL)
    config.to_dict()["overrides"]["down_proj"]["rank"] = 99
    config.to_dict()["targets"].append("x")
    assert config == SparseLRConfig(**FULL)


# Effort


@pytest.mark.parametrize("effort", PRESETS)
def test_effort_fills_what_is_left_open(effort: str) -> None:
    preset, config = PRESETS[effort], SparseLRConfig(effort=effort)
    assert config.method_options == Options(**preset["3basil"])
    assert config.tm == TMOptions(**preset["tm"])
    assert config.distill == DistillOptions(**preset["distill"])
    assert config.noisy_windows == NOISY_WINDOWS[effort] == SparseLRConfig.from_dict(config.to_dict()).noisy_windows
    assert SparseLRConfig(effort=effort, noisy_windows=0.25).noisy_windows == 0.25
    own = {"method_options": {"rho": 0.3, "refit_rounds": 7}, "tm": {"passes": 3}, "distill": {"passes": 5}}
    config = SparseLRConfig(effort=effort, **own)
    assert config.method_options == Options(**{**preset["3basil"], **own["method_options"]})
    assert config.tm == TMOptions(**{**preset["tm"], **own["tm"]})
    assert config.distill == DistillOptions(**{**preset["distill"], **own["distill"]})


def test_options_given_as_a_whole_beat_effort() -> None:
    own = {"method_options": Options(), "tm": TMOptions(), "distill": DistillOptions()}
    config = SparseLRConfig(effort="high", **own)
    assert (config.method_options, config.tm, config.distill) == tuple(own.values())


def test_effort_of_the_solver_is_that_of_3basil() -> None:
    for effort in PRESETS:
        config = SparseLRConfig("alps", rank=0, effort=effort)
        assert config.method_options == METHODS["alps"].options()
        assert config.tm == SparseLRConfig(effort=effort).tm


def test_more_effort_takes_longer() -> None:
    fast, default, high = (SparseLRConfig(effort=name) for name in ("fast", "default", "high"))
    assert default == SparseLRConfig()
    assert fast.tm.passes < default.tm.passes < high.tm.passes
    assert high.method_options.growth < default.method_options.growth < fast.method_options.growth
    assert high.method_options.tolerance < default.method_options.tolerance


@pytest.mark.parametrize("effort", PRESETS)
def test_effort_is_stored_with_the_options_it_stands_for(effort: str) -> None:
    config = SparseLRConfig(effort=effort, tm={"lr": 1e-3})
    stored = json.loads(config.to_json_string())
    assert stored["effort"] == effort and stored["tm"] == asdict(config.tm)
    assert stored["distill"] == asdict(config.distill)
    assert SparseLRConfig.from_dict(stored) == config
    stored["effort"] = "default"  # what another version stored is not filled up again
    assert SparseLRConfig.from_dict(stored).tm == config.tm


def test_refine_steps_in_order() -> None:
    steps = {refine: SparseLRConfig(refine=refine).refine_steps for refine in ("tm", "distill", "tm+distill", None)}
    assert list(steps.values()) == [("tm",), ("distill",), ("tm", "distill"), ()]


# Runtime objects


@pytest.mark.parametrize(
    "data",
    [texts, lambda: ["one", "two"], lambda: torch.ones(2, 8, dtype=torch.int64)],
    ids="generator list tensor".split(),
)
def test_runtime_objects_are_neither_stored_nor_copied(data) -> None:
    calibration, tokenizer, device = data(), Unserialisable(), torch.device("cpu")
    config = SparseLRConfig(calibration=calibration, tokenizer=tokenizer, device=device)
    stored = json.loads(config.to_json_string())
    assert stored["calibration"] == CUSTOM
    assert not {"tokenizer", "device"} & stored.keys()
    clone = copy.deepcopy(config)
    assert clone.calibration is calibration and clone.tokenizer is tokenizer and clone.device is device
    assert clone == config
    back = SparseLRConfig.from_dict(stored)
    assert back.calibration == CUSTOM and back.tokenizer is None and back.device is None
    repr(config)


@pytest.mark.parametrize("source", ["file:/home/me/texts/*.txt", "file:texts/*.txt", "file:~/a b.txt"])
def test_paths_are_not_stored(source: str) -> None:
    config = SparseLRConfig(calibration=source)
    assert config.to_dict()["calibration"] == CUSTOM and config.calibration == source
    assert config.differences(config.stored()) == {}


def test_a_generator_is_not_consumed() -> None:
    source = texts()
    config = SparseLRConfig(calibration=source)
    config.to_json_string()
    copy.deepcopy(config)
    assert next(source) == "a generator can be read once"


def test_deepcopy_is_independent() -> None:
    config = SparseLRConfig(overrides={"q_proj": {"rank": 1}})
    clone = copy.deepcopy(config)
    clone.rank = 3
    clone.overrides["q_proj"]["rank"] = 2
    assert config.rank == 64 and config.overrides == {"q_proj": {"rank": 1}}


# Errors


INVALID = [
    ("method", "2basil", ValueError, "'3basil'"),
    ("method", None, ValueError, "'3basil'"),
    ("sparsity", "4:2", ValueError, "0 < n < m"),
    ("sparsity", "half", ValueError, "0 < n < m"),
    ("sparsity", 1.0, ValueError, "[0, 1)"),
    ("sparsity", -0.1, ValueError, "[0, 1)"),
    ("sparsity", None, TypeError, "[0, 1)"),
    ("rank", -1, ValueError, "an integer in 0..1048576"),
    ("rank", 1.5, TypeError, "an integer in 0..1048576"),
    ("rank", True, TypeError, "an integer in 0..1048576"),
    ("rank", "64", TypeError, "an integer in 0..1048576"),
    ("effort", "maximal", ValueError, "'fast', 'default', 'high', 'published'"),
    ("effort", None, ValueError, "'fast', 'default', 'high', 'published'"),
    ("refine", "TM", ValueError, "'tm', 'distill', 'tm+distill', None"),
    ("refine", False, ValueError, "'tm', 'distill', 'tm+distill', None"),
    ("num_samples", 0, ValueError, ">= 1"),
    ("num_samples", 2.0, TypeError, ">= 1"),
    ("seq_len", 1, ValueError, "an integer in 2..2147483647"),
    ("batch_size", 0, ValueError, ">= 1"),
    ("seed", -1, ValueError, "an integer in 0..4294967295"),
    ("seed", 2**32, ValueError, "an integer in 0..4294967295"),
    ("seed", None, TypeError, "an integer in 0..4294967295"),
    ("targets", [], TypeError, "list of regular expressions"),
    ("targets", {"q_proj"}, TypeError, "list of regular expressions"),
    ("ignore", 3, TypeError, "list of regular expressions"),
    ("overrides", [], TypeError, "{regex: {sparsity, rank, skip}}"),
    ("overrides", "q_proj", TypeError, "{regex: {sparsity, rank, skip}}"),
    ("on_incompatible", "warn", ValueError, "'error', 'skip'"),
    ("activations", "tape", ValueError, "'device', 'host', 'disk'"),
    ("method_options", "fast", TypeError, "a dict or hf_sparselr.solvers.threebasil.method.Options"),
    ("method_options", TMOptions(), TypeError, "a dict or hf_sparselr.solvers.threebasil.method.Options"),
    ("tm", 20, TypeError, "a dict or hf_sparselr.config.options.TMOptions"),
    ("distill", 8, TypeError, "a dict or hf_sparselr.config.options.DistillOptions"),
    ("damping", 0.01, TypeError, "2 numbers >= 0"),
    ("damping", (0.01,), TypeError, "2 numbers >= 0"),
]


@pytest.mark.parametrize(("field", "value", "kind", "allowed"), INVALID)
def test_errors_name_field_value_and_allowed(field: str, value, kind: type[Exception], allowed: str) -> None:
    with pytest.raises(kind) as caught:
        SparseLRConfig(**{field: value})
    assert str(caught.value).startswith(f"{field}={value!r}") and allowed in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "kind", "allowed"),
    [
        ("format_version", 0, ValueError, ">= 1"),
        ("format_version", "1", TypeError, ">= 1"),
        ("format_version", FORMAT_VERSION + 1, ValueError, f"up to version {FORMAT_VERSION}"),
        ("quant_method", "gptq", ValueError, "'sparselr'"),
    ],
)
def test_stored_configs_of_another_format(field: str, value, kind: type[Exception], allowed: str) -> None:
    with pytest.raises(kind) as caught:
        SparseLRConfig.from_dict({**SparseLRConfig().to_dict(), field: value})
    assert str(caught.value).startswith(f"{field}={value!r}") and allowed in str(caught.value)


def test_an_argument_passed_twice_or_too_many() -> None:
    with pytest.raises(TypeError, match="multiple values for argument 'method'"):
        SparseLRConfig("3basil", method="alps")
    with pytest.raises(TypeError, match="too many positional arguments"):
        SparseLRConfig(*FIELDS.values(), None)


NESTED = [
    ({"method_options": {"rho": 0}}, ValueError, "method_options.rho=0: expected a finite number > 0"),
    (
        {"method_options": {"cg_steps": 1.5}},
        TypeError,
        "method_options.cg_steps=1.5: expected an integer >= 1",
    ),
    (
        {"method_options": {"max_iterations": 50}},
        ValueError,
        "method_options.max_iterations=50: expected at least",
    ),
    ({"tm": {"passes": 0}}, ValueError, "tm.passes=0: expected an integer >= 1"),
    (
        {"tm": {"precision": "fp16"}},
        ValueError,
        "tm.precision='fp16': expected one of 'auto', 'fp32', 'tf32', 'bf16'",
    ),
    ({"damping": (-1, 0)}, ValueError, "damping=-1: expected a finite number >= 0"),
    ({"damping": (0, float("nan"))}, ValueError, "damping=nan: expected a finite number >= 0"),
    ({"damping": ("a", 0)}, TypeError, "damping='a': expected a finite number >= 0"),
    ({"targets": ["q_proj", "("]}, ValueError, "targets='(': not a regular expression"),
    ({"ignore": "*"}, ValueError, "ignore='*': not a regular expression"),
    ({"ignore": [None]}, TypeError, "ignore=None: expected a regular expression"),
    ({"overrides": {"[": {"rank": 1}}}, ValueError, "overrides='[': not a regular expression"),
    ({"overrides": {1: {"rank": 1}}}, TypeError, "overrides=1: expected a regular expression"),
    (
        {"overrides": {"q": {}}},
        TypeError,
        "overrides['q']={}: expected a dict with some of sparsity, rank, skip",
    ),
    ({"overrides": {"q": 4}}, TypeError, "overrides['q']=4: expected a dict"),
    ({"overrides": {"q": {"rank": -1}}}, ValueError, "overrides['q']['rank']=-1: expected an integer >= 0"),
    ({"overrides": {"q": {"sparsity": 2}}}, ValueError, "overrides['q']['sparsity']=2: expected"),
    (
        {"overrides": {"q": {"rank": 4}}, "method": "wanda", "rank": 0},
        ValueError,
        "overrides['q']={'rank': 4}: method='wanda' only prunes, expected rank 0",
    ),
    (
        {"overrides": {"q": {"sparsity": 0.5}}, "method": "svd", "sparsity": None},
        ValueError,
        "overrides['q']={'sparsity': 0.5}: method='svd' has no sparse part",
    ),
    (
        {"overrides": {"q": {"rank": 0}}, "method": "svd", "sparsity": None},
        ValueError,
        "overrides['q']['rank']=0: expected an integer >= 1",
    ),
    ({"overrides": {"q": {"skip": 1}}}, TypeError, "overrides['q']['skip']=1: expected True or False"),
    ({"overrides": {"q": {"skip": True, "rank": 1}}}, ValueError, "skip=True contradicts sparsity and rank"),
    ({"calibration": ""}, ValueError, "calibration='' names no source"),
    ({"tokenizer": "a/b"}, TypeError, "tokenizer='a/b': expected a tokenizer or processor, as AutoTokenizer"),
    ({"calibration": 5}, TypeError, "calibration=<int> is not calibration data"),
    ({"calibration": []}, ValueError, "calibration=<list> is empty"),
]


@pytest.mark.parametrize(("fields", "kind", "message"), NESTED)
def test_errors_inside_groups(fields: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        SparseLRConfig(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparcity": "2:4"}, "SparseLRConfig has no field 'sparcity'; did you mean 'sparsity'?"),
        ({"bits": 4}, "SparseLRConfig has no field 'bits' (it has method, sparsity, rank"),
        ({"method_options": {"rhoo": 1}}, "method_options has no field 'rhoo'; did you mean 'rho'?"),
        ({"method_options": {1: 1}}, "method_options has no field 1 (it has form"),
        ({"distill": {"pases": 1}}, "distill has no field 'pases'; did you mean 'passes'?"),
        ({"tm": {"epochs": 1}}, "tm has no field 'epochs' (it has passes"),
        ({"overrides": {"q": {"ranks": 1}}}, "overrides['q'] has no field 'ranks'; did you mean 'rank'?"),
    ],
)
def test_unknown_fields(fields: dict, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        SparseLRConfig(**fields)
    assert message in str(caught.value)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="earlier versions accept global flags anywhere")
@pytest.mark.parametrize("fields", [{"targets": ["(?i)q_proj"]}, {"overrides": {"(?i)q": {"rank": 1}}}])
def test_refuses_a_regex_that_would_fail_later(fields: dict) -> None:
    with pytest.raises(ValueError, match="not a regular expression"):
        SparseLRConfig(**fields)
    assert matches("(?i:q_proj)", "layers.0.Q_proj")


# Meaning


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("proj", "layers.0.q_proj", False),
        ("q_proj", "layers.0.q_proj.lora", False),
        ("layers.0", "model.layers.0.q_proj", False),
        (r"layers\.0\..*", "model.layers.0.q_proj", True),
        (r"layers\.1\..*", "model.layers.11.q_proj", False),
        ("q_proj|k_proj", "layers.3.k_proj", True),
        ("q_proj|k_proj", "layers.3.xk_proj", False),
        (r"model\.layers\.\d+\.mlp\.up", "model.layers.12.mlp.up", True),
        (".*", "anything.at.all", True),
    ],
)
def test_matches_whole_names_at_the_end(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("mlp", "model.layers.0.mlp.up_proj", True),
        ("mlp$", "model.layers.0.mlp.up_proj", True),
        (r"layers\.0", "model.layers.0.mlp.up_proj", True),
        (r"layers\.1", "model.layers.11.mlp.up_proj", False),
        ("ml", "model.layers.0.mlp.up_proj", False),
        ("lp", "model.layers.0.mlp.up_proj", False),
        (r"model\.vision", "model.vision.layers.0.q_proj", True),
        (r"model\.vision", "model.language.layers.0.q_proj", False),
    ],
)
def test_covers_what_lies_below_a_match(pattern: str, name: str, expected: bool) -> None:
    assert covers(pattern, name) is expected


BUDGET = [
    ({"compression": 0.5}, Unstructured(0.625), 2, 0.25),
    ({"compression": 0.5, "rank_ratio": 0.5}, Unstructured(0.75), 5, 0.5),
    ({"compression": 0.5, "rank_ratio": 0}, Unstructured(0.5), 0, 0),
    ({"compression": 0.25, "sparsity": None, "rank": None}, Unstructured(0.4375), 4, 0.25),
    ({"compression": 0.5, "method": "sparsegpt"}, Unstructured(0.5), 0, 0.0),
]


@pytest.mark.parametrize(("fields", "pattern", "rank", "ratio"), BUDGET)
def test_a_budget_stands_for_sparsity_and_rank(fields: dict, pattern, rank: int, ratio: float) -> None:
    config = SparseLRConfig(**fields)
    assert (config.sparsity, config.rank, config.rank_ratio) == (None, None, ratio)
    back = SparseLRConfig.from_dict(json.loads(config.to_json_string()))
    assert back == config == config.stored() == copy.deepcopy(config)
    for one in (config, back):
        assert one.layer_settings("m.q_proj", (32, 64)) == (pattern, rank)
        assert one.has_factors is (rank > 0)
    assert SparseLRConfig(rank=64).differences(back) == {"rank": (64, None)}
    assert SparseLRConfig(compression=fields["compression"]).differences(back) == {}


def test_an_override_beats_a_budget() -> None:
    overrides = {"q_proj": {"rank": 7}, "k_proj": {"sparsity": "2:4"}, "v_proj": {"skip": True}}
    config = SparseLRConfig(compression=0.5, overrides=overrides)
    assert config.layer_settings("m.q_proj", (32, 32)) == (Unstructured(0.625), 7)
    assert config.layer_settings("m.k_proj", (32, 32)) == (NM(2, 4), 2)
    assert config.layer_settings("m.v_proj", (32, 32)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compression": 0.5, "sparsity": 0.5}, "compression=0.5 contradicts sparsity=0.5"),
        ({"compression": 0.5, "sparsity": "2:4"}, "compression=0.5 contradicts sparsity='2:4'"),
        ({"compression": 0.5, "rank": 64}, "compression=0.5 contradicts rank=64"),
        ({"compression": 1.0}, "compression=1.0: expected a number in (0, 1)"),
        ({"compression": 0}, "compression=0: expected a number in (0, 1)"),
        ({"compression": 0.5, "rank_ratio": 1.0}, "rank_ratio=1.0: expected a number in [0, 1)"),
        ({"compression": 0.5, "rank_ratio": -0.1}, "rank_ratio=-0.1: expected a number in [0, 1]"),
        (
            {"compression": 0.5, "rank_ratio": 0.25, "method": "wanda"},
            "rank_ratio=0.25: expected 0 with method='wanda'",
        ),
        ({"rank_ratio": 0.25}, "rank_ratio=0.25 without compression"),
    ],
)
def test_contradictory_budgets(fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        SparseLRConfig(**fields)
    assert message in str(caught.value)


def test_first_matching_override_wins() -> None:
    config = SparseLRConfig(
        sparsity="2:4",
        rank=8,
        overrides={
            r"layers\.0\.q_proj": {"rank": 2},
            "q_proj": {"sparsity": 0.5},
            "k_proj": {"skip": True},
            "[kv]_proj": {"sparsity": "1:4", "rank": 0, "skip": False},
        },
    )
    assert config.layer_settings("m.layers.0.q_proj", (8, 16)) == (NM(2, 4), 2)
    assert config.layer_settings("m.layers.1.q_proj", (8, 16)) == (Unstructured(0.5), 8)
    assert config.layer_settings("m.layers.1.k_proj", (8, 16)) is None
    assert config.layer_settings("m.layers.1.v_proj", (8, 16)) == (NM(1, 4), 0)
    assert config.layer_settings("m.layers.1.o_proj", (8, 16)) == (NM(2, 4), 8)


def test_an_override_of_a_module_covers_its_layers() -> None:
    config = SparseLRConfig(rank=8, overrides={"mlp": {"rank": 2}, r"layers\.0": {"skip": True}})
    assert config.layer_settings("m.layers.1.mlp.up_proj", (8, 16)) == (NM(2, 4), 2)
    assert config.layer_settings("m.layers.0.mlp.up_proj", (8, 16)) == (NM(2, 4), 2)
    assert config.layer_settings("m.layers.0.attn.q_proj", (8, 16)) is None
    assert config.layer_settings("m.layers.1.attn.q_proj", (8, 16)) == (NM(2, 4), 8)


def test_one_pattern_may_stand_for_a_list() -> None:
    assert SparseLRConfig(targets="q_proj") == SparseLRConfig(targets=("q_proj",))


def test_differences_are_what_was_asked_for_and_is_not_so() -> None:
    stored = SparseLRConfig(sparsity="4:8", rank=8, method_options={"rho": 0.2})
    assert SparseLRConfig().differences(stored) == {}
    assert SparseLRConfig(sparsity="4:8", rank=8).differences(stored) == {}
    assert SparseLRConfig(rank=16, seed=3).differences(stored) == {"rank": (16, 8), "seed": (3, 0)}
    assert SparseLRConfig(rank=64).differences(stored) == {"rank": (64, 8)}  # the default, but asked for
    assert SparseLRConfig("3basil", "2:4").differences(stored) == {"sparsity": ("2:4", "4:8")}
    assert copy.deepcopy(SparseLRConfig(rank=64)).differences(stored) == {"rank": (64, 8)}
    assert SparseLRConfig(tokenizer=object(), device="cpu").differences(stored) == {}
    asked = SparseLRConfig(method_options={"rho": 0.3}).differences(stored)
    assert asked.keys() == {"method_options"} and [side["rho"] for side in asked["method_options"]] == [
        0.3,
        0.2,
    ]


def test_behaves_like_the_dict_transformers_takes_it_for() -> None:
    config = SparseLRConfig(rank=3)
    assert config.get("rank") == 3 and config.get("load_in_8bit", False) is False
    assert dict(config) == config.to_dict()
    assert config != config.to_dict()


# Stored by another release


def test_unknown_fields_of_a_stored_config_warn_once(caplog) -> None:
    stored = SparseLRConfig(**FULL).to_dict()
    later = json.loads(json.dumps({**stored, "note_of_later": 1}))
    later["tm"]["also_later"] = 2
    pattern = next(iter(later["overrides"]))
    later["overrides"][pattern]["third_later"] = 3
    assert SparseLRConfig.from_dict(later).to_dict() == stored
    for name in ("note_of_later", "tm.also_later", f"overrides[{pattern!r}].third_later"):
        assert name in caplog.text
    caplog.clear()
    SparseLRConfig.from_dict(later)
    assert caplog.text == ""


def test_unknown_fields_of_a_dict_that_a_user_wrote_are_errors() -> None:
    with pytest.raises(TypeError, match="has no field 'note_of_later'"):
        SparseLRConfig.from_dict({"quant_method": "sparselr", "note_of_later": 1})


def test_method_options_of_later_releases_survive_a_round_trip(caplog) -> None:
    stored = SparseLRConfig().to_dict()
    stored["method_options"]["later_option"] = 3
    config = SparseLRConfig.from_dict(stored)
    assert config.to_dict() == stored and caplog.text == ""
    assert config.method_options == SparseLRConfig().method_options
    assert "method_options.later_option" in caplog.text


# One declaration


def test_the_signature_and_the_docstring_come_from_the_declaration() -> None:
    parameters = inspect.signature(SparseLRConfig).parameters
    assert {name: p.default for name, p in parameters.items()} == {n: f.default for n, f in FIELDS.items()}
    entries = re.findall(r"^        (\w+): ", SparseLRConfig.__doc__, re.MULTILINE)
    assert entries[: len(FIELDS)] == list(FIELDS)


def test_the_reference_page_is_current() -> None:
    page = README.read_text(encoding="utf-8")
    assert written(page) == page, "run: python -m hf_sparselr.config.reference"


def test_the_reference_page_explains_every_option() -> None:
    classes = [TMOptions, DistillOptions, *ALLOCATION_OPTIONS.values()]
    classes += [method.options for name, method in METHODS.items() if name != PRECOMPUTED]
    for cls in classes:
        assert {option.name for option in fields(cls)} <= attributes(cls).keys(), cls


def test_the_id_of_a_save_is_kept_and_is_no_setting() -> None:
    stored = {**SparseLRConfig().to_dict(), "save_id": "abc"}
    config = SparseLRConfig.from_dict(stored)
    assert config.save_id == "abc" and config.to_dict() == stored and config.stored().save_id == "abc"
    assert config == SparseLRConfig() and SparseLRConfig().save_id is None
    with pytest.raises(TypeError, match="has no field 'save_id'"):
        SparseLRConfig(save_id="abc")


def test_stored_config_from_before_noisy_windows_had_none():
    stored = SparseLRConfig().to_dict()
    assert SparseLRConfig.from_dict(stored).noisy_windows == NOISY_WINDOWS["default"]
    del stored["noisy_windows"]
    assert SparseLRConfig.from_dict(stored).noisy_windows == 0
