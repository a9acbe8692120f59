"""A run and its JSON: what was written is read back, whoever wrote it."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from wdanalysis.measure.plan import Skipped
from wdanalysis.results.provenance import (
    Input,
    InputFile,
    Live,
    Matrices,
    Options,
    Run,
    Seconds,
    now,
)

RUN = Run(
    versions={"wdanalysis": "0.1.0"},
    command=("wd-analyze", "compare", "base", "ft"),
    options=Options(axis="in", modules=["q"], layers=[0, 1], diagnostics=True, spectra=False),
    complete=False,
    matrices=Matrices(measured=4, in_table=2),
    inputs={"BASE": (Input("base", "safetensors", None, (InputFile("base", 8, "ab"),)),)},
    skipped=(Skipped("ft", 10, "head", "is not in BASE"),),
    warnings=("a name differs",),
    seconds=Seconds(open=0.1, measure=0.2),
    bytes_read=8,
    outputs=("metrics.csv", "run.json"),
)


def test_a_run_comes_back_from_its_json() -> None:
    live = Run(options=Options(axis="out"), live=Live(every=50, base_copy_bytes=0))
    for run in (RUN, live, Run()):
        assert Run.from_json(json.loads(json.dumps(run.to_json()))) == run


def test_a_file_is_known_by_its_size_its_header_and_its_time(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"weights")
    os.utime(path, (0, 1_769_860_800.9))
    described = InputFile.of(path)
    assert described == InputFile(
        str(path), 7, hashlib.sha256(b"weights").hexdigest(), modified="2026-01-31T12:00:00Z"
    )
    run = Run(inputs={"BASE": (Input("base", "torch", None, (described,)),)}, date=now())
    assert Run.from_json(json.loads(json.dumps(run.to_json()))) == run
    assert run.date is not None
    assert abs(datetime.fromisoformat(run.date) - datetime.now(UTC)) < timedelta(minutes=5)
    assert "modified" not in RUN.to_json()["inputs"]["BASE"][0]["files"][0]


def test_the_json_says_null_where_nothing_was_chosen_and_nothing_of_what_was_not_done() -> None:
    saved = RUN.to_json()
    assert saved["options"]["steps"] is None
    assert saved["seconds"] == {"open": 0.1, "measure": 0.2}
    assert "live" not in saved
    assert list(saved["inputs"]["BASE"][0]) == ["path", "format", "step", "files"]


def test_a_run_of_an_earlier_or_later_version_is_read_as_far_as_it_is_known() -> None:
    earlier = {"options": {"axis": "out"}, "seconds": {"open": 1.0, "measure": 2.0}, "outputs": ["run.json"]}
    later = {**earlier, "card": "H200", "options": {"axis": "out", "null": "permuted"}}
    expected = Run(options=Options(axis="out"), seconds=Seconds(1.0, 2.0), outputs=("run.json",))
    assert Run.from_json(earlier) == Run.from_json(later) == expected


def test_a_name_that_utf_8_cannot_hold_is_written_as_its_escape() -> None:
    name = b"bad\xff".decode("utf-8", "surrogateescape")
    saved = Run(inputs={name: (Input(name, "safetensors", None),)}).to_json()
    assert saved["inputs"][r"bad\udcff"][0]["path"] == r"bad\udcff"
