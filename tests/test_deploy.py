"""README's ways to use a student without this code, as typed, give this code's predictions."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import eval as evaluation
from data import load_dataset

DEPLOY = (ROOT / "README.md").read_text().split("## Deploy")[1].split("\n## ")[0]
COMMANDS, LINES = (
    re.search(rf"```{k}\n(.*?)```", DEPLOY, re.DOTALL)[1] for k in ("bash", "python")
)


def test_transformers_and_ctranslate2_predict_the_same(whole, small_task, tmp_path):
    for name in ("transformers", "ctranslate2"):
        pytest.importorskip(name, reason=f"not installed: {name}")
    student = evaluation.load_student(whole / "best", torch.device("cpu"), "fp32")
    examples = load_dataset(str(small_task), "test") + load_dataset(str(small_task), "train")
    expected = [row["prediction"] for row in evaluation.predict(student, examples)]
    (tmp_path / "runs").mkdir()
    os.symlink(whole, tmp_path / "runs" / "NAME")
    for line in COMMANDS.splitlines():
        if not line.startswith("pip"):
            words = shlex.split(line.replace("--quantization int8", "").partition("#")[0])
            subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "texts.json").write_text(json.dumps([e.input for e in examples]))
    script = tmp_path / "deploy.py"
    script.write_text(
        f"import json\ntexts = json.load(open('texts.json'))\n{LINES}\n"
        "json.dump([labels, same_labels], open('made.json', 'w'))"
    )
    # A process of its own: with ctranslate2 loaded, torch here would round differently afterwards.
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True)
    labels, same_labels = json.loads((tmp_path / "made.json").read_text())
    assert labels == same_labels == expected
