"""Who may import whom."""

import ast
import sys

import pytest
from conftest import ROOT

MAY_IMPORT = {  # DESIGN: train -> eval -> dsbs -> data and t5; teacher -> data
    "t5": set(),
    "data": set(),
    "teacher": {"data"},
    "dsbs": {"data", "t5"},
    "eval": {"dsbs", "data", "t5"},
    "train": {"eval", "dsbs", "data", "t5"},
}
RUNTIME = {"torch", "sentencepiece", "numpy", "safetensors", "tqdm"}
FILES = sorted(ROOT.glob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_imports_run_one_way(path):
    """Of the six files, and no more of them."""
    found = set(imports(path))
    assert found & MAY_IMPORT.keys() <= MAY_IMPORT[path.stem]
    allowed = RUNTIME | ({"scripts"} if path.stem == "train" else set())  # for --plan
    if path.stem in ("data", "teacher"):
        allowed = allowed - {"torch"}  # a teacher needs none
    assert found - MAY_IMPORT.keys() - sys.stdlib_module_names <= allowed
