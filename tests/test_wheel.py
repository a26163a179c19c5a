"""The package as pip installs it: a wheel, in an environment of its own, used from an empty folder."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from test_frames import make_clip

from narvid.search.store import Store

pytest.importorskip("pip")  # a uv environment has none

ROOT = Path(__file__).resolve().parent.parent
# Extras that requirements.txt leaves out; their tests skip without them.
UNTRIED = ("tensorboard", "faster-whisper", "mteb")


def test_setup_cfg_has_the_ranges_of_requirements_txt():
    ranges = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, versions = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(>=.+)", line).groups()
            ranges[name] = versions
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    declared = [re.fullmatch(r"([\w-]+)(.*)", line).groups() for text in lists for line in text.split()]
    assert len(declared) > 20
    assert {(name, versions) for name, versions in declared if name not in UNTRIED} <= ranges.items()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the package alone, since building leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "narvid", source / "narvid", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, out], cwd=source, check=True, capture_output=True, text=True)
    [path] = out.glob("narvid-*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(wheel):
    files = [path for path in (ROOT / "narvid").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    kinds = {path.suffix for path in files}
    assert {".py", ".html", ".yaml"} <= kinds
    held = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {path.relative_to(ROOT).as_posix() for path in files}  # and nothing beside it, as a script would be


@pytest.mark.slow
def test_two_clips_are_indexed_by_the_installed_command(wheel, weights, tmp_path):
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}  # torch and the others, not once more
    python = home / "bin" / "python"
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    beside = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    (beside / "beside.pth").write_text("".join(f"{folder}\n" for folder in packages))
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)

    empty = tmp_path / "empty"
    empty.mkdir()
    stored = torch.load(weights, weights_only=True)
    stored["args"] |= {"max_frames": 6, "max_words": 24, "precision": "fp32", "filter_p": 0.9}
    torch.save(stored, tmp_path / "best.pt")
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("first", "second"):
        make_clip(clips / f"{name}.mp4", [i / 10 for i in range(25)])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        command = [home / "bin" / command[0], *command[1:]]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(run("python", "-c", "import narvid; print(narvid.__file__)").strip()).is_relative_to(home)
    assert "usage: narvid-search" in run("narvid-search", "--help")
    run("narvid-search", "index", clips, "--out", tmp_path / "index", "--checkpoint", tmp_path / "best.pt")
    store = Store(tmp_path / "index", read_only=True)
    assert [file.path for file in store.files()] == ["first.mp4", "second.mp4"] and store.count() == 2
    assert list(empty.iterdir()) == []
