"""The line on the terminal. What the file holds is tested with whole runs (test_streaming.py)."""

import json

from hf_sparselr.compression.progress import Progress

ROW = {"name": "a", "seconds": 3.0, "phases": {}, "peaks": {"solve": 2_500_000_000}, "tm": {"loss_after": 0.00123}}


def test_the_line_tells_of_time_memory_and_loss():
    progress = Progress()
    progress.start(1201, 0)
    progress.block(ROW, [{"relative_error": 0.01}, {"relative_error": 0.02}], restored=False)
    assert progress.line.startswith("3.0 s/block, 1:00:00 left, GPU 2.5 GB, host ")
    assert progress.line.endswith(" GB, error 0.0150, loss 1.23e-03")


def test_values_that_json_lacks_become_null(tmp_path):
    progress = Progress(tmp_path / "run.jsonl")
    progress.start(1, 0)
    progress.block({**ROW, "tm": {"loss_after": float("nan")}, "peaks": {}}, [], restored=True)
    line = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[1])
    assert line["loss"] is line["error"] is line["gpu_memory"] is line["remaining"] is None


def test_another_run_starts_the_file_anew(tmp_path):
    for goes_on, lines in ((False, 1), (True, 2), (False, 1)):
        Progress(tmp_path / "run.jsonl", goes_on).end(1.0)
        assert len((tmp_path / "run.jsonl").read_text().splitlines()) == lines


def test_passes_of_distillation_are_counted(tmp_path):
    progress = Progress(tmp_path / "run.jsonl")
    progress.distill(0.5)
    progress.distill(0.25)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [(line["passes"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.25)]
