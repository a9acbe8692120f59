"""Puts into the pages what their commands print and draw: `python docs/shown.py`, or `… docs/tutorial.md` for one page.

A fenced `text` block behind a fenced `bash` block is what the last command of that block prints. The picture
`images/OUT/NAME.png` is the figure NAME that a command of the page has drawn into its folder OUT (`--out OUT`).
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parent
ROOT = DOCS.parent

OUT = re.compile(r"--out (?P<out>\S+)")
SHOWN = re.compile(r"(?<!-->\n)```bash\n(?P<commands>.*?)```(?:\n\n```text\n(?P<printed>.*?)```)?", re.DOTALL)
PICTURE = re.compile(r"!\[[^\]]*\]\((?:\.\./)*images/(?P<out>[\w-]+)/(?P<name>[\w.-]+\.png)\)")

WIDTH = 80
"""Columns of the terminal in which the commands run."""


def pages() -> list[Path]:
    """Those of the pages that show what a command printed or drew."""
    return [page for page in sorted(DOCS.rglob("*.md")) if _shows(page.read_text(encoding="utf-8"))]


def _shows(text: str) -> bool:
    return bool(_pictures(text)) or any(found["printed"] is not None for found in SHOWN.finditer(text))


def _pictures(text: str) -> list[tuple[str, str]]:
    """Folder and name of the figures that a page shows of those that it draws itself."""
    drawn = {out for found in SHOWN.finditer(text) for out in OUT.findall(found["commands"])}
    return [(found["out"], found["name"]) for found in PICTURE.finditer(text) if found["out"] in drawn]


def shown(page: Path, folder: Path) -> tuple[str, dict[str, Path]]:
    """Run a page's commands in an empty folder.

    Returns
    -------
    text : str
        The page with what the commands print.
    pictures : dict of str to Path
        The figures that it shows, by their places below `images/`.
    """
    (folder / "sample_checkpoints").symlink_to(ROOT / "sample_checkpoints")

    def with_output(found: re.Match[str]) -> str:
        printed = [run(command, folder) for command in found["commands"].splitlines()]
        if found["printed"] is None:
            return found[0]
        return f"```bash\n{found['commands']}```\n\n```text\n{printed[-1]}```"

    text = SHOWN.sub(with_output, page.read_text(encoding="utf-8"))
    return text, {f"{out}/{name}": folder / out / "figures" / name for out, name in _pictures(text)}


def run(command: str, folder: Path) -> str:
    """Return what a command prints on the standard output of a terminal, without colours."""
    program, *arguments = shlex.split(command, comments=True)
    assert program == "wd-analyze", command
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    ours, terminal = pty.openpty()
    with tempfile.TemporaryFile() as complaints, open(ours, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            [sys.executable, "-m", "wdanalysis.cli", *arguments],
            cwd=folder, env={**os.environ, **settings}, stdout=terminal, stderr=complaints,
        )  # fmt: skip
        os.close(terminal)
        printed = b"".join(_read(screen)).decode()
        if process.wait():
            complaints.seek(0)
            raise SystemExit(f"{command}\n{complaints.read().decode()}")
    return "\n".join(line.rstrip() for line in printed.strip().splitlines()) + "\n"


def _read(screen: io.FileIO) -> Iterator[bytes]:
    """What comes until the terminal is closed, which Linux tells by an error."""
    with contextlib.suppress(OSError):
        while part := screen.read(65536):
            yield part


def small(picture: Path) -> bytes:
    """Return a figure's PNG with 256 colours: a third of the bytes, and the same to the eye."""
    file = io.BytesIO()
    Image.open(picture).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        file, "png", optimize=True
    )
    return file.getvalue()


def main(chosen: list[str]) -> None:
    """Rewrite pages and their pictures."""
    images = DOCS / "images"
    for page in map(Path, chosen) if chosen else pages():
        with tempfile.TemporaryDirectory() as folder:
            text, pictures = shown(page, Path(folder))
            page.write_text(text, encoding="utf-8")
            for out in {Path(place).parent for place in pictures}:
                shutil.rmtree(images / out, ignore_errors=True)
            for place, picture in pictures.items():
                (images / place).parent.mkdir(parents=True, exist_ok=True)
                (images / place).write_bytes(small(picture))
                print(images.name, place, (images / place).stat().st_size, sep="\t")


if __name__ == "__main__":
    main(sys.argv[1:])
