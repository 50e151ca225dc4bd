"""The house keeps its order: who may import whom, and what a public function owes its reader."""

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
    found = set(imports(path))
    assert found & MAY_IMPORT.keys() <= MAY_IMPORT[path.stem]
    handed_over = {"scripts"} if path.stem == "train" else set()  # for --plan
    assert found - MAY_IMPORT.keys() - sys.stdlib_module_names <= RUNTIME | handed_over


@pytest.mark.parametrize("name", ["data", "teacher"])
def test_no_torch_where_none_is_needed(name):
    if not (ROOT / f"{name}.py").exists():
        assert name == "teacher"
        return
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_top_level_holds_the_six_files_and_no_more():
    assert {p.stem for p in FILES} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_public_functions_are_documented_and_safe(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a file's first lines say what it owns"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or node.name in ("main", "run", "parse_args"), node.name
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), "a bare except"
        called = getattr(getattr(node, "func", None), "id", None)
        assert called not in ("eval", "exec"), f"{called}() in {path.name}"
