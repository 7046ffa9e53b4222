"""The wheel, installed somewhere else: the command, the recipes, the template."""

import configparser
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import unirefiner_hf
from unirefiner_hf.resources import PACKAGE, recipe_names, resource_folder

ROOT = PACKAGE.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout to build from"
)


def run(*command, **options):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("LICENSE", "pyproject.toml", "setup.cfg"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("unirefiner_hf", "recipes", "model_cards"):
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    run(*build, "--outdir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Scripts folder of a fresh environment that holds the wheel.

    The libraries are those of the environment the tests run in.
    """
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    libraries = sysconfig.get_paths()["purelib"]
    (site / "libraries.pth").write_text(libraries)
    return folder / "bin"


def test_every_package_is_listed_and_ships():
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'^    "(unirefiner_hf[\w.]*)",$', text, re.MULTILINE))
    present = {
        ".".join(path.relative_to(ROOT).parts)
        for path in (PACKAGE, *PACKAGE.rglob("*"))
        if path.is_dir() and path.name != "__pycache__"
    }
    assert listed == present | {"unirefiner_hf.recipes", "unirefiner_hf.model_cards"}


def test_the_wheel_holds_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for path in PACKAGE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names
    for folder in ("recipes", "model_cards"):
        for path in (ROOT / folder).rglob("*.*"):
            assert f"unirefiner_hf/{path.relative_to(ROOT).as_posix()}" in names
    assert not [name for name in names if name.startswith("tests")]


def test_the_package_needs_nothing_else_of_the_checkout():
    elsewhere = re.compile(
        r"^\s*(?:from|import) (?:benchmarks|docs|examples|tests)\b", re.MULTILINE
    )
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    assert [path for path in files if elsewhere.search(path.read_text())] == []


def test_one_version():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{unirefiner_hf.__version__}"\n' in text


def test_the_tools_are_configured_in_one_place():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert {"flake8", "mypy", "tool:pytest"} <= set(config.sections())
    assert "[tool.pytest" not in (ROOT / "pyproject.toml").read_text()


def test_installed_elsewhere(installed, tmp_path):
    command = installed / "unirefiner"
    assert run(command, "--version", cwd=tmp_path).strip() == unirefiner_hf.__version__
    listed = run(command, "recipes", cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in listed] == recipe_names()
    run(command, "recipes", "copy", "accelerate/ddp", "mine.yaml", cwd=tmp_path)
    shipped = resource_folder("recipes") / "accelerate" / "ddp.yaml"
    assert (tmp_path / "mine.yaml").read_text() == shipped.read_text()
    for verb in ("refine", "merge", "demo", "recipes"):
        assert f"unirefiner {verb}" in run(command, verb, "--help", cwd=tmp_path)
    assert "refine" in run(
        installed / "python", "-m", "unirefiner_hf", "-h", cwd=tmp_path
    )


def test_installed_data_is_found(installed, tmp_path):
    code = (
        "import json, sys, unirefiner_hf\n"
        "from pathlib import Path\n"
        "from unirefiner_hf.resources import PACKAGE, resource_folder\n"
        "print(json.dumps([str(PACKAGE), (PACKAGE / 'py.typed').is_file(),\n"
        "    (resource_folder('model_cards') / 'card.md.jinja').is_file(),\n"
        "    str(resource_folder('recipes'))]))\n"
    )
    out = json.loads(run(installed / "python", "-c", code, cwd=tmp_path))
    package, typed, template, recipes = out
    assert Path(package).is_relative_to(installed.parent)
    assert Path(recipes).parent == Path(package)
    assert typed and template


def test_installed_help_loads_no_torch(installed, tmp_path):
    code = (
        "import sys\nfrom unirefiner_hf.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    assert run(installed / "python", "-c", code, cwd=tmp_path).endswith("[]\n")
