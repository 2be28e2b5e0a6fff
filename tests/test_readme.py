"""The snippets of README and CONTRIBUTING run as they stand, and their links lead somewhere."""

import pathlib
import re

import pyro
import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")),
]


def snippets(page):
    text = (ROOT / page).read_text()
    return [
        re.sub(r"(?m)^   ", "", s) if s.startswith("   ") else s
        for s in re.findall(r"```python\n(.*?)```", text, re.S)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_python_snippets_run(page):
    pyro.clear_param_store()
    torch.manual_seed(0)
    namespace = {}
    for snippet in snippets(page):
        exec(compile(snippet, page, "exec"), namespace)
    pyro.clear_param_store()


def test_there_are_snippets_to_run():
    assert snippets("README.md") and snippets("CONTRIBUTING.md")


@pytest.mark.parametrize("page", PAGES)
def test_local_links_exist(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


def test_commands_are_make_targets():
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    for page in PAGES:
        used = set(re.findall(r"(?m)^ {4}make ([a-z-]+)", (ROOT / page).read_text()))
        assert used <= targets


def test_method_table_lists_every_public_name():
    import pyro_vi_ext
    import pyro_vi_ext.guides

    text = (ROOT / "README.md").read_text()
    for name in pyro_vi_ext.__all__:
        value = getattr(pyro_vi_ext, name)
        if not isinstance(value, str):
            assert f"`{name}`" in text, name
    assert "`guides.AutoSemiImplicit`" in text
