"""What is installed elsewhere: the wheel holds the recipes and the pages, and nothing of the workshop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    pytest.importorskip("hatchling", reason="building the wheel here needs hatchling: pip install hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, check=True, timeout=120, capture_output=True)
    [path] = folder.glob("*.whl")
    return ZipFile(path)


def test_everything_of_the_package_is_in_it(wheel):
    here = {name for name in files(ROOT / "hkft") if "__pycache__" not in name}
    assert any(name.endswith(".html.j2") for name in here)
    assert here <= set(wheel.namelist())


def test_the_recipes_are_in_it(wheel):
    packed = {name for name in wheel.namelist() if name.startswith("hkft/recipes/")}
    assert {"hkft/recipes/quickstart.yaml", "hkft/recipes/paper/table1-rte.yaml"} <= packed
    assert packed == {f"hkft/{name}" for name in files(ROOT / "recipes")}
    assert wheel.read("hkft/recipes/quickstart.yaml") == (ROOT / "recipes" / "quickstart.yaml").read_bytes()


def test_nothing_else_is(wheel):
    assert {name.partition("/")[0] for name in wheel.namelist()} == {"hkft", f"{_name(wheel)}.dist-info"}
    assert not [name for name in wheel.namelist() if "test" in name or "__pycache__" in name]


def test_it_installs_the_command(wheel):
    assert "hkft = hkft.cli.main:main" in wheel.read(f"{_name(wheel)}.dist-info/entry_points.txt").decode()
    assert f"{_name(wheel)}.dist-info/licenses/LICENSE" in wheel.namelist()


def _name(wheel: ZipFile) -> str:
    """`hkft-0.1.0`."""
    return "-".join(Path(str(wheel.filename)).name.split("-")[:2])
