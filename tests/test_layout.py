"""Who may import whom."""

import ast
import subprocess
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
    handed_over = {"scripts"} if path.stem == "train" else set()  # for --plan
    assert found - MAY_IMPORT.keys() - sys.stdlib_module_names <= RUNTIME | handed_over


@pytest.mark.parametrize("name", ["data", "teacher"])
def test_no_torch_where_none_is_needed(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
