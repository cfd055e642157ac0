"""The report's file: valid JSON, without paths, and never a reason not to load or save."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from helpers import tiny

import hf_sparselr
from hf_sparselr.compression.report import FILE_NAME, Report, plot
from hf_sparselr.entrypoints.compress import compress
from hf_sparselr.utils.public_names import hub_id, public_source

ROW = {
    "name": "up",
    "shape": [4, 4],
    "pattern": "2:4",
    "rank": 1,
    "sparsity": 0.5,
    "relative_error": 0.1,
    "seconds": 1,
}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_numbers_that_are_not_finite_become_null(tmp_path):
    values = [math.nan, math.inf, -math.inf, np.float32(2.5), torch.tensor(3), np.nan, (1, 2), 10**30]
    Report({"method": "x"}, layers=[{**ROW, "values": values}], seconds=math.nan).save(tmp_path)
    stored = json.loads((tmp_path / FILE_NAME).read_text(), parse_constant=refuse)
    assert stored["layers"][0]["values"] == [None, None, None, 2.5, 3, None, [1, 2], 10**30]
    assert stored["seconds"] is None
    assert "x" in str(Report.load(tmp_path).settings)


def test_a_report_comes_back(tmp_path):
    report = Report({"sparsity": "2:4"}, [ROW], [{"name": "b"}], sizes={"dense": 2, "packed": 1}, seconds=3.5)
    report.save(tmp_path)
    loaded = Report.load(tmp_path)
    assert loaded.from_file and not report.from_file
    assert {**vars(loaded), "from_file": False} == vars(report)
    assert Report.load(tmp_path / "nothing") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "\x00", "[" * 100_000, "NaN", '{"layers": ' + "9" * 9999])
def test_what_is_no_report_is_none_with_a_warning(tmp_path, caplog, text):
    (tmp_path / FILE_NAME).write_text(text)
    assert Report.load(tmp_path) is None
    assert str(tmp_path / FILE_NAME) in caplog.text


def test_bytes_that_are_no_text_are_none_with_a_warning(tmp_path, caplog):
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    assert Report.load(tmp_path) is None and FILE_NAME in caplog.text


def test_fields_that_cannot_be_read_are_left_out_and_named(tmp_path, caplog):
    stored = {
        "settings": {"method": "3basil"},
        "layers": [1],
        "blocks": {},
        "sizes": {"dense": "big"},
        "seconds": "long",
        "peak_memory": True,
        "perplexity": {"dense": 3.5},
        "later": 1,
    }
    (tmp_path / FILE_NAME).write_text(json.dumps(stored))
    loaded = Report.load(tmp_path)
    assert (loaded.settings, loaded.perplexity) == ({"method": "3basil"}, {"dense": 3.5})
    assert (loaded.layers, loaded.blocks, loaded.sizes, loaded.seconds, loaded.peak_memory) == (
        [],
        [],
        {},
        0.0,
        None,
    )
    assert "blocks, later, layers, peak_memory, seconds, sizes" in caplog.text


def test_rows_of_any_content_print(tmp_path):
    rows = [{}, {"shape": 3, "rank": [], "sparsity": "x", "seconds": None}, ROW]
    report = Report({}, rows, allocation={"parameters": 3})
    assert "4x4" in str(report) and str(report).count("-") > 8


@pytest.mark.parametrize("on_hub", [True, False])
def test_only_a_base_from_the_hub_is_written(tmp_path, on_hub):
    Report({}, base_model="me/base", base_on_hub=on_hub).save(tmp_path)
    assert json.loads((tmp_path / FILE_NAME).read_text())["base_model"] == ("me/base" if on_hub else None)
    Report({}, base_model=str(tmp_path), base_on_hub=True).save(tmp_path)
    assert json.loads((tmp_path / FILE_NAME).read_text())["base_model"] is None


@pytest.mark.parametrize(
    ("source", "public"),
    [
        ("self", "self"),
        ("custom", "custom"),
        ("allenai/c4", "allenai/c4"),
        ("org/data:config-1", "org/data:config-1"),
        ("file:/home/me/*.txt", "custom"),
        ("file:*.txt", "custom"),
        ("/home/me/data", "custom"),
        ("~/data", "custom"),
        ("a/b/c", "custom"),
        ("../data", "custom"),
        ("C:\\Users\\me", "custom"),
        ("C:/Users/me", "custom"),
        ("org/data:/home/me", "custom"),
        (["my words"], "custom"),
        (None, "custom"),
    ],
)
def test_paths_of_calibration_data_are_not_written(tmp_path, source, public):
    assert public_source(source) == public
    Report({"calibration": source}).save(tmp_path)
    assert json.loads((tmp_path / FILE_NAME).read_text())["settings"]["calibration"] == public


def test_folders_that_look_like_hub_ids_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/data") == public_source("org/data") == "org/data"
    (tmp_path / "org" / "data").mkdir(parents=True)
    assert hub_id("org/data") is None and public_source("org/data") == "custom"


def test_every_field_of_a_report_is_in_its_file(tmp_path):
    report = Report({"method": "3basil"}, coverage={"packed": 1, "total": 2, "dense": {"a": 1}}, dense={"a": "why"})
    report.save(tmp_path)
    again = Report.load(tmp_path)
    assert (again.coverage, again.dense) == (report.coverage, report.dense)
    runtime = {"base_on_hub", "from_file"}
    assert set(report.public()) == {field.name for field in dataclasses.fields(Report)} - runtime


def test_the_plot_has_errors_by_layer_and_seconds_by_phase(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    subplots = figure.Figure.subplots
    monkeypatch.setattr(
        figure.Figure, "subplots", lambda *args, **kwargs: drawn.extend(axes := subplots(*args, **kwargs)) or axes
    )
    model = hf_sparselr.compress(tiny.build("llama"), tiny.settings())
    assert plot(model.sparselr_report, tmp_path).stat().st_size > 10_000
    errors, seconds = drawn
    assert {line.get_label() for line in errors.get_lines()} >= {"self_attn.q_proj", "mlp.down_proj"}
    assert all(len(line.get_xdata()) == 2 for line in errors.get_lines())
    labels = [text.get_text() for text in seconds.get_legend().get_texts()]
    assert labels == ["capture and Gram", "solve", "propagation"]
    total = sum(bar.get_height() for bar in seconds.patches)
    blocks = model.sparselr_report.blocks
    assert 0 < total <= sum(block["seconds"] for block in blocks)


def test_refinement_says_by_which_windows_it_was_judged() -> None:
    tm = {"loss_before": 2.0, "loss_after": 1.0, "train_loss": [0.8, 0.4], "kept_back_loss": [0.9, 0.5], "best_pass": 2}
    left = {**tm, "loss_after": 2.0, "best_pass": 0}
    distill = {"losses": [0.3, 0.2], "loss_before": 0.5, "loss_after": 0.4, "best_pass": 1}
    kept_back = {"calibration": [0.4, 0.25, 0.26], "self-written": [0.6, 0.55, 0.5]}
    report = Report({}, blocks=[{"tm": tm}, {"tm": left}], distill={**distill, "kept_back": kept_back})
    matching, distillation = report.refinement_lines()
    assert "windows that were kept back is 0.75 of that before (0.50 to 1.00), on trained windows 0.40" in matching
    assert "1 of 2 blocks got no better" in matching
    assert "0.4000 to 0.2500 on calibration text and 0.6000 to 0.5500 on self-written text, on windows" in distillation
    assert "of pass 1 of 2 (training loss 0.3000)" in distillation
    assert str(report).splitlines()[-2:] == [matching, distillation]
    few = Report(
        {}, blocks=[{"tm": {**tm, "kept_back_loss": []}}], distill={**distill, "kept_back": {}, "best_pass": 0}
    )
    assert all("too few" in line for line in few.refinement_lines())
    assert "no pass made it better" in few.refinement_lines()[1]


@pytest.mark.parametrize("tm", [None, {}, {"loss_before": "x"}, {"loss_before": 1.0}, 3])
@pytest.mark.parametrize("distill", [None, {}, {"losses": 1}, {"losses": [], "best_pass": 4, "kept_back": {"a": []}}])
def test_refinement_of_any_content_prints(tm, distill) -> None:
    assert Report({}, blocks=[{"tm": tm}, {}], distill=distill).refinement_lines() == []


def test_a_run_reports_training_and_kept_back_losses() -> None:
    windows = tiny.IDS.repeat(3, 1)[:, :16]
    own = {"passes": 2, "self_samples": 8, "self_len": 12}
    config = tiny.settings(calibration=windows, num_samples=12, seq_len=16, refine="tm+distill", distill=own)
    report = compress(tiny.build("llama"), config).sparselr_report
    for row in report.blocks:
        assert len(row["tm"]["train_loss"]) == len(row["tm"]["kept_back_loss"]) == row["tm"]["passes"]
    assert set(report.distill["kept_back"]) == {"calibration", "self-written"}
    first = [losses[0] for losses in report.distill["kept_back"].values()]
    assert report.distill["loss_before"] == pytest.approx(sum(first) / 2)
    assert len(report.refinement_lines()) == 3
