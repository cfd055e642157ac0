"""Results that a benchmark writes into a page."""

import pytest

from hf_sparselr.bench.record import recorded, with_section


class Arguments:
    def __init__(self, record: str | None) -> None:
        self.record = record


def test_a_second_run_replaces_the_section_of_its_command_alone():
    page = with_section("# Results\n", "hf-sparselr bench host --rows 1", "first")
    page = with_section(page, "hf-sparselr bench host --rows 8", "other")
    page = with_section(page, "hf-sparselr bench host --rows 1", r"second \1")
    assert page.startswith("# Results\n") and page.count("```sh") == 2
    assert "first" not in page and r"second \1" in page and "other" in page


def test_what_is_printed_is_shown_and_written(tmp_path, capsys):
    page = tmp_path / "page.md"
    command = ["bench", "host", "--record", str(page), "--rows", "1"]
    assert recorded(lambda args: print("a table") or 5, Arguments(str(page)), command) == 5
    assert capsys.readouterr().out == "a table\n"
    text = page.read_text()
    assert "hf-sparselr bench host --rows 1\n" in text and "a table" in text and "--record" not in text


def test_a_run_that_fails_writes_nothing(tmp_path):
    page = tmp_path / "page.md"
    with pytest.raises(ZeroDivisionError):
        recorded(lambda args: 1 / 0, Arguments(str(page)), ["bench", "host"])
    assert not page.exists()


def test_without_a_page_the_command_just_runs():
    assert recorded(lambda args: 3, Arguments(None), []) == 3
