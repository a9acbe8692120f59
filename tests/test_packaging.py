"""The package as it is handed out: sdist and wheel are complete, and the wheel runs where it alone is installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "with_repository", "without"),
    [
        ("[a b](docs/x.md#y)", "[a b](https://h.org/o/blob/main/docs/x.md#y)", "a b"),
        ("![a](docs/x.png)", "![a](https://h.org/o/raw/main/docs/x.png)", ""),
        ("[![CI](../x.svg)](../y)", "[![CI](https://h.org/o/raw/main/../x.svg)](https://h.org/o/blob/main/../y)", ""),
        ("[p](https://arxiv.org/abs/1)", "[p](https://arxiv.org/abs/1)", "[p](https://arxiv.org/abs/1)"),
        ("[![L](https://s.io/l)](LICENSE)", "[![L](https://s.io/l)](https://h.org/o/blob/main/LICENSE)", "![L](https://s.io/l)"),
        ("[below](#here)", "[below](#here)", "[below](#here)"),
        ('`".[train]"`, [−0.1, 0.2] (x)', '`".[train]"`, [−0.1, 0.2] (x)', '`".[train]"`, [−0.1, 0.2] (x)'),
    ],
)  # fmt: skip
def test_links_become_absolute_or_plain_words(
    hook: ModuleType, text: str, with_repository: str, without: str
) -> None:
    assert hook.with_absolute_links(text, "https://h.org/o/") == with_repository
    assert hook.with_absolute_links(text, None) == without


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of a copy of the tree's own files, and the wheel that is built from the unpacked sdist."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(
        ".git", "__pycache__", ".venv", "venv", "wd-*", "dist", "build", ".*cache*"
    )
    shutil.copytree(ROOT, tree, ignore=ignored)
    shutil.copy(ROOT / ".gitignore", tree)
    _build("sdist", tree, folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    _build("wheel", unpacked, folder)
    (wheel,) = folder.glob("*.whl")
    return unpacked, wheel


def _build(target: str, tree: Path, folder: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_sdist_is_complete(built: tuple[Path, Path]) -> None:
    unpacked, _ = built
    for name in (
        "hatch_build.py",
        "conftest.py",
        "constraints.txt",
        ".ci/run",
        ".github/workflows/ci.yml",
        "LICENSE",
    ):
        assert (unpacked / name).is_file(), name
    for folder in ("wdanalysis", "tests", "docs", "notebooks", "sample_checkpoints", "benchmarks"):
        there = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        wanted = {
            path for path in there if not any(part.startswith(("__pycache__", ".")) for part in path.parts)
        }
        assert not [path for path in wanted if not (unpacked / path).is_file()]


@pytest.mark.slow
def test_the_packages_page_has_no_link_that_leads_nowhere(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(wheel.read(name).decode())
    page = str(metadata.get_payload())
    assert page.startswith("# wdanalysis")
    targets = [part.split(")")[0] for part in page.split("](")[1:]]
    assert targets
    assert all(target.startswith(("https://", "#")) for target in targets)
    needed = {
        requirement.split(">")[0].split("<")[0] for requirement in metadata.get_all("Requires-Dist", [])
    }
    assert {"bokeh", "jinja2"} <= needed


@pytest.mark.slow
def test_the_demo_runs_where_the_wheel_alone_is_installed(built: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment of its own that sees the packages of this one, from an empty folder."""
    venv.create(tmp_path / "own", with_pip=True)
    scripts = tmp_path / "own" / ("Scripts" if os.name == "nt" else "bin")
    empty = tmp_path / "empty"
    empty.mkdir()
    cleared = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program: str, *arguments: str) -> str:
        command = [str(scripts / program), *arguments]
        done = subprocess.run(command, cwd=empty, env=cleared, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    packages = Path(run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    others = "\n".join(path for path in sys.path if path.endswith("-packages"))
    (packages / "others.pth").write_text(others, encoding="utf-8")
    run("python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--force-reinstall", str(built[1]))
    assert Path(run("python", "-c", "import wdanalysis; print(wdanalysis.__file__)")).is_relative_to(packages)

    printed = run("wd-analyze", "demo")
    assert "wd-analyze compare wd-demo/checkpoints/base wd-demo/checkpoints/FT" in printed
    written = {path.name for path in (empty / "wd-demo").iterdir()}
    assert {"report.html", "metrics.csv", "figures", "checkpoints"} <= written
    assert list((empty / "wd-demo" / "figures").glob("*.png"))
