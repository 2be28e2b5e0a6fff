"""The listed packages are the ones on disk, extras stay extras, and every file has its test."""

import configparser
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = {
    "pyro_vi_ext": "pyro_vi_ext",
    "pyro_vi_ext.guides": "guides",
    "pyro_vi_ext.models": "models",
}


def config():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def on_disk():
    found = set()
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *parts)))
    return found


def test_listed_packages_are_the_packages_on_disk():
    assert set(config()["options"]["packages"].split()) == on_disk()


def test_package_map():
    lines = config()["options"]["package_dir"].strip().splitlines()
    assert dict(line.split(" = ") for line in lines) == FOLDERS


def test_import_loads_no_extra():
    code = (
        "import sys, pyro_vi_ext, pyro_vi_ext.guides, pyro_vi_ext.models;"
        "print(sorted({'jax', 'numpyro', 'arviz', 'arviz_base', 'matplotlib'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_tests_package():
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_a_test_file_that_cannot_be_imported_is_an_error(tmp_path):
    (tmp_path / "tests").mkdir()
    for name in ("setup.cfg", "tests/conftest.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "tests" / "test_broken.py").write_text("import nowhere\n\ndef test(): pass\n")
    command = [sys.executable, "-m", "pytest", "tests"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 2 and "No module named 'nowhere'" in out.stdout


def library_files():
    for folder in FOLDERS.values():
        yield from (ROOT / folder).rglob("*.py")


@pytest.mark.parametrize("path", list(library_files()), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    """models, guides -> pyro_vi_ext, never back up; and never a bare `guides` or `models`."""
    imports = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.M)
    assert not {"guides", "models", "examples", "benchmarks"} & {i.split(".")[0] for i in imports}
    if path.is_relative_to(ROOT / "pyro_vi_ext"):
        assert not [
            i for i in imports if i.startswith(("pyro_vi_ext.guides", "pyro_vi_ext.models"))
        ]


@pytest.mark.parametrize("path", list(library_files()), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_source_file_has_a_test_file(path):
    if path.name == "__init__.py":
        return
    prefix = "guides_" if path.parent.name == "guides" and _twice(path) else ""
    assert (ROOT / "tests" / f"test_{prefix}{path.stem}.py").exists()


def _twice(path):
    return sum(other.name == path.name for other in library_files()) > 1


def test_every_example_is_run_by_a_test():
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_examples*.py"))
    for example in (ROOT / "examples").glob("*.py"):
        assert example.stem in tests, f"{example.name} is in no test"


def test_project_files_name_no_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".cfg", ".toml", ".txt") and path.exists():
            assert not re.search(r"(^|[\s\"'`(])/(work|root|home|tmp)/", path.read_text()), name
