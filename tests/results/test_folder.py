"""The folder: what is in it that cannot be read is one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from report_page import make_comparison

import wdanalysis as wd
from wdanalysis.errors import OutputError
from wdanalysis.results import folder
from wdanalysis.results.provenance import Unfinished


@pytest.mark.parametrize("text", ["[]", "{", '{"options": 3}', '{"skipped": [1]}'])
def test_provenance_that_nobody_here_wrote_is_one_sentence(tmp_path: Path, text: str) -> None:
    make_comparison().save(tmp_path, figures=[], report=False)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(OutputError, match="cannot be read"):
        wd.Comparison.load(tmp_path)


def test_what_is_lacking_is_noted_first_and_until_all_is_written(tmp_path: Path) -> None:
    comparison = make_comparison()
    comparison.save(tmp_path, figures=[], report=False)
    (tmp_path / "old.html").write_text("")
    folder.add(tmp_path, wd.Comparison.load(tmp_path).run, [tmp_path / "old.html"])
    to_do = Unfinished(figures=("scatter",), look={"format": "svg"}, report=True)

    def others() -> list[Path]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.save(tmp_path, comparison._findings, comparison.run, others=others, to_do=to_do)
    run = folder.load(tmp_path).run
    assert run.complete is False
    assert run.unfinished is not None
    assert (run.unfinished.tables, run.unfinished.measured) == (False, True)
    assert (list(run.unfinished.figures), run.unfinished.look) == (["scatter"], {"format": "svg"})
    assert "old.html" in run.unfinished.replaced
    assert folder.state(tmp_path) == f"the tables in {tmp_path} are whole: {run.unfinished.how}"
    (tmp_path / "new.html").write_text("")
    folder.add(tmp_path, run, [tmp_path / "new.html"], finishes=True)
    finished = folder.load(tmp_path).run
    assert (finished.complete, finished.unfinished) == (True, None)
    assert "new.html" in finished.outputs
    assert not (tmp_path / "old.html").exists()


def test_results_of_a_measurement_that_was_cut_short_stay_incomplete(tmp_path: Path) -> None:
    comparison = make_comparison()
    partial = replace(comparison.run, complete=False)
    folder.save(tmp_path, comparison._findings, partial)
    run = folder.load(tmp_path).run
    assert (run.complete, run.unfinished) == (False, None)


def test_a_folder_is_named_so_that_a_shell_reads_it_as_one() -> None:
    assert folder.finishing(Path("my results")) == "wd-analyze plot 'my results'"


def test_tables_are_whole_before_others_write(tmp_path: Path) -> None:
    comparison = make_comparison()

    def others() -> list[Path]:
        loaded = folder.load(tmp_path)
        assert len(loaded.metrics) == len(comparison.metrics)
        assert "page.html" not in loaded.run.outputs
        (tmp_path / "page.html").write_text("")
        return [tmp_path / "page.html"]

    written = folder.save(tmp_path, comparison._findings, comparison.run, others=others)
    assert written[-2:] == [tmp_path / "page.html", tmp_path / "run.json"]
    assert "page.html" in folder.load(tmp_path).run.outputs
    folder.save(tmp_path, comparison._findings, comparison.run)
    assert not (tmp_path / "page.html").exists()
