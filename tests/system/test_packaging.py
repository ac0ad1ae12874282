"""What is built for users holds the package and nothing else, and works where nothing else is."""

from __future__ import annotations

import builtins
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import spoolipc

ROOT = Path(__file__).parents[2]
SETUPTOOLS = importlib.metadata.version("setuptools")
NEEDED = 77
"""The release of setuptools that pyproject.toml asks for."""
DEPENDENCIES = ("filelock", "numpy", "tqdm", "watchdog")
BARE = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a program says, which must succeed."""
    ran = subprocess.run(
        command, cwd=cwd, env=BARE | environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def build(kind: str, tree: Path, into: Path) -> Path:
    """Build the sdist or the wheel of a tree."""
    code = f"from setuptools.build_meta import build_{kind} as build; print(build({str(into)!r}))"
    return into / run(sys.executable, "-c", code, cwd=tree).splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree as git would keep it, so that the build leaves nothing in the tree itself."""
    command = ("git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "-co", "--exclude-standard")
    copy = tmp_path_factory.mktemp("tree")
    for name in filter(None, run(*command, cwd=ROOT).split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if int(SETUPTOOLS.split(".")[0]) < NEEDED:
        pytest.skip(
            f"setuptools {SETUPTOOLS} cannot build this: {NEEDED} is needed, `make install` brings it"
        )
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which so proves that it holds what a build needs."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (top,) = unpacked.iterdir()
    return build("wheel", top, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a new environment with the wheel, and with the packages it needs from this one."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    (packages,) = place.glob("lib/python*/site-packages")
    # Editable installs of this environment are not followed: only the .pth files of a site directory itself are read.
    homes = {str(Path(str(importlib.metadata.distribution(name).locate_file("")))) for name in DEPENDENCIES}
    (packages / "needed.pth").write_text("\n".join(sorted(homes)) + "\n")
    pip = ["-m", "pip", "--python", str(place / "bin" / "python"), "--disable-pip-version-check"]
    run(sys.executable, *pip, "install", "--no-index", "--no-deps", "--quiet", str(wheel), cwd=place)
    return place / "bin"


def modules(tree: Path) -> set[str]:
    """The files of the package."""
    found = {str(path.relative_to(tree)) for path in (tree / "spoolipc").rglob("*.py")}
    assert len(found) > 20
    return found | {"spoolipc/py.typed"}


def test_the_wheel_holds_the_package_its_licence_and_metadata(tree: Path, wheel: Path) -> None:
    assert wheel.name == f"spoolipc-{spoolipc.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = f"spoolipc-{spoolipc.__version__}.dist-info"
    told = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    assert names - {f"{about}/top_level.txt"} == modules(tree) | {f"{about}/{name}" for name in told}


def test_the_sdist_holds_the_package_its_readme_and_licence(tree: Path, sdist: Path) -> None:
    top = f"spoolipc-{spoolipc.__version__}"
    assert sdist.name == f"{top}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {member.name.removeprefix(f"{top}/") for member in archive if member.isfile()}
    written = {name for name in names if not name.startswith("spoolipc.egg-info/")} - {
        "PKG-INFO",
        "setup.cfg",
    }
    assert written == modules(tree) | {"LICENSE", "README.md", "pyproject.toml"}


def test_what_the_readme_shows_first_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    producer, consumer, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    program = tmp_path / "use.py"
    program.write_text(
        (producer + consumer).replace("/dev/shm/frames", str(tmp_path / "frames"))
        + "\nimport spoolipc, sys\nprint(spoolipc.__file__.startswith(sys.prefix))\n"
    )
    said = run(installed / "python", "-I", "-W", "error", program, cwd=tmp_path).split()
    assert said == [*(f"{number:.1f}" for number in range(10)), "True"]


def test_the_wheel_brings_the_command(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "spoolipc", "--version", cwd=tmp_path) == f"spoolipc {spoolipc.__version__}\n"


def test_it_runs_where_it_was_never_installed(tmp_path: Path) -> None:
    """On the packages it needs, with no metadata of any package to read."""
    for name in DEPENDENCIES:
        found = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in found.files or ()}:
            if top.isidentifier() or top.endswith(".libs"):
                (tmp_path / top).symlink_to(str(found.locate_file(top)))
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    said = run(sys.executable, "-S", "-m", "spoolipc", "--version", cwd=tmp_path, PYTHONPATH=path)
    assert said == f"spoolipc {spoolipc.__version__}\n"


def test_the_package_shows_its_public_names_and_no_other() -> None:
    assert dir(spoolipc) == sorted([*spoolipc.__all__, "__version__", "gc", "stat"])


def test_import_of_all_names_shadows_no_module_and_no_builtin() -> None:
    taken = sys.stdlib_module_names | set(dir(builtins))
    assert taken.intersection(spoolipc.__all__) == set()
