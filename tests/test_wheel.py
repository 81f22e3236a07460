"""The wheel: what it holds, and that it works in another environment, away from the checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from toy_sweep import write_toy

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another environment with the wheel in it; the dependencies are this one's, the checkout is out of its sight."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=folder)
    return folder


def test_the_wheel_holds_the_three_packages_and_the_experiments(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packages = {"varscale", "sweeps", "analysis"}
    experiments = {str(Path("varscale") / path.relative_to(ROOT)) for path in (ROOT / "experiments").rglob("*.yaml")}
    sources = {
        str(path.relative_to(ROOT))
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    assert {name for name in names if ".dist-info/" not in name} == sources | experiments
    assert {f"{package}/py.typed" for package in packages} <= sources
    assert not [name for name in names if "__pycache__" in name or Path(name).name.startswith("test_")]
    assert len(names) == len(set(names))


def test_the_wheel_installs_elsewhere(environment: Path, tmp_path: Path) -> None:
    code = "import varscale, sweeps, analysis; print(varscale.__file__, sweeps.__file__, analysis.__file__, sep='\\n')"
    for line in run(environment / "bin" / "python", "-c", code, cwd=tmp_path).splitlines():
        assert Path(line).resolve().is_relative_to(environment.resolve())


def test_its_experiments_are_found_from_an_empty_folder(environment: Path, tmp_path: Path) -> None:
    code = "from varscale.config.yaml import shipped_experiments as s; print(*s()); print(s()['rings'])"
    names, path = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).splitlines()
    assert {"rings", "cifar10", "imagenet256", "imagenet512"} <= set(names.split())
    assert Path(path).resolve().is_relative_to(environment.resolve())


@pytest.mark.parametrize("command", [["bin/varscale"], ["bin/python", "-m", "varscale.cli"]])
def test_its_command_plans_from_an_empty_folder(environment: Path, tmp_path: Path, command: list[str]) -> None:
    program, *arguments = command
    assert "rings" in run(environment / program, *arguments, "plan", "rings", cwd=tmp_path)


def test_its_command_sweeps_from_an_empty_folder(environment: Path, tmp_path: Path) -> None:
    path = write_toy(tmp_path)
    output = run(environment / "bin" / "varscale", "sweep", path, cwd=tmp_path)
    report = tmp_path / "runs" / "studies" / "toy" / "laws" / "report.html"
    assert output.splitlines()[-1] == str(report.relative_to(tmp_path))
    assert report.read_text(encoding="utf-8").startswith("<!doctype html>")
