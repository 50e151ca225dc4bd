"""What a user may type wrong: one line with the value, what is allowed and the remedy, exit status
2, nothing written, nothing lost."""

import ast
import json
import shutil

import pytest
import torch
from conftest import ROOT, run, write_jsonl

import eval as evaluation
import train
from data import Tokenizer
from t5 import T5, T5Config

PROGRAMS = ["train.py", "eval.py", "teacher.py", "scripts/reproduce.py", "demo/make_demo.py"]


@pytest.fixture
def refuse(call, tmp_path, monkeypatch):
    """Runs train.py's command line in an empty folder; gives the one line that it refuses with."""
    monkeypatch.chdir(tmp_path)

    def refuse(*words):
        before = sorted(tmp_path.rglob("*"))
        error = call(train.main, *words, check=2).err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
        return error

    return refuse


@pytest.mark.parametrize("words, parts", [
    ("--size huge", ["'huge'", "tiny, small, base, large, xl, xxl"]),
    ("--method magic", ["'magic'", "standard, step-by-step, single-task, rationale-input"]),
    ("--labels robot", ["'robot'", "human, teacher"]),
    ("--dataset imdb", ["'imdb'", "svamp", "folder holding train.jsonl"]),
    ("--dataset asdiv", ["asdiv", "augment"]),
    ("--device tpu9", ["'tpu9'", "allowed: cpu"]),
    ("--precision fp16", ["'fp16'", "fp32, bf16"]),
    ("--parallel magic", ["'magic'", "ddp"]),
    ("--fraction 0", ["--fraction 0", "above 0 and at most 1"]),
    ("--lr nan", ["--lr nan", "a positive number"]),
    ("--lam -0.5", ["-0.5"]),
    ("--dropout 1", ["--dropout 1", "below 1"]),
    ("--steps 0", ["--steps 0", "at least 1"]),
    ("--batch-size -4", ["--batch-size -4"]),
    ("--save-every 0", ["--save-every 0"]),
    ("--size base --dataset demo", ["weights/t5-v1_1-base", "hf download google/t5-v1_1-base"]),
    ("--weights nowhere", ["nowhere", "hf download"]),
    ("--dataset svamp", ["svamp_train.json", "github.com/google-research/distilling-step-by-step"]),
    ("--rationales human", ["'human'", "demo", "files"]),
    ("--rationales nowhere.jsonl", ["nowhere.jsonl"]),
    ("--dataset svamp --augment cqa", ["allowed: asdiv"]),
    ("--augment asdiv", ["allowed: svamp"]),
    ("--dataset svamp --augment asdiv", ["teacher.py --dataset asdiv"]),
    ("--dataset svamp --rationales palm x.jsonl", ["both together"]),
    ("--augment-fraction 0", ["--augment-fraction 0"]),
    ("--gpus 2", ["--plan"]),
    ("--plan --gpus 0", ["--gpus 0"]),
    ("--plan --gpus 2 --parallel none", ["ddp, fsdp"]),
    ("--size xxl", ["t5-v1_1-xxl", "hf download", "esnli_train.json", "train_CoT_0.json",
                    "git clone"]),
])  # fmt: skip
def test_flags(refuse, words, parts):
    error = refuse(*words.split())
    assert all(part in error for part in parts), error


def row(i, **more):
    return {"id": f"r{i}", "input": f"x {i}", "label": "yes", "rationale": "because", **more}


def test_empty_splits_and_missing_labels(refuse, tmp_path):
    write_jsonl(tmp_path / "none" / "train.jsonl", [])
    assert "empty" in refuse("--dataset", "none")
    write_jsonl(tmp_path / "bare" / "train.jsonl", [row(i, rationale=None) for i in range(12)])
    assert "needs rationales" in refuse("--dataset", "bare")
    words = "--dataset bare --method standard --labels teacher".split()
    assert "teacher label" in refuse(*words)
    write_jsonl(tmp_path / "blind" / "train.jsonl", [row(i) for i in range(12)])
    for split in ("test", "valid"):  # known before training, not after it
        write_jsonl(tmp_path / "blind" / f"{split}.jsonl", [row(99, label=None)])
        assert f"no example of {split} has a label" in refuse("--dataset", "blind")


def test_weights_folders(refuse, tmp_path):
    shape = dict(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5(T5Config(vocab_size=64, **shape)).save_pretrained(tmp_path / "w")
    assert "spiece.model" in refuse("--weights", "w")
    shutil.copy(train.DEMO_VOCABULARY, tmp_path / "w" / "spiece.model")
    assert "vocab_size 64 is smaller" in refuse("--weights", "w")
    shape["vocab_size"] = 640
    for key, id in (("eos_token_id", 3), ("pad_token_id", 1), ("decoder_start_token_id", 639)):
        T5(T5Config(**shape, **{key: id})).save_pretrained(tmp_path / "w")
        error = refuse("--weights", "w")
        assert key in error and f" {id} " in error
    T5(T5Config(**shape)).save_pretrained(tmp_path / "w")
    error = refuse("--weights", "w", "--size", "small", "--dataset", "demo")
    assert "--size small" in error and "76,9" not in error, "with this vocabulary"
    top = Tokenizer(train.DEMO_VOCABULARY).vocab_size - 1
    new = {"added_tokens": [{"id": 7, "content": "<nl>"}]}
    old = {"<extra_id_0>": top, "<nl>": top + 1}
    for name, content in (("added_tokens.json", old), ("tokenizer.json", new)):
        (tmp_path / "w" / name).write_text(json.dumps(content))
        assert "'<nl>'" in refuse("--weights", "w") and "extra_id" not in refuse("--weights", "w")
        (tmp_path / "w" / name).write_text(json.dumps({"added_tokens": []} if "z" in name else {}))
    for name in ("model.safetensors", "config.json", "spiece.model"):
        path, kept = tmp_path / "w" / name, (tmp_path / "w" / name).read_bytes()
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        error = refuse("--weights", "w")
        assert name in error and "git lfs pull" in error
        path.unlink()
        path.symlink_to("../blobs/0")
        error = refuse("--weights", "w")
        assert name in error and "link to nothing" in error and "cp -rL" in error
        path.unlink()
        if name == "spiece.model":
            assert "copy spiece.model" in refuse("--weights", "w"), "tokenizer.json is there"
        path.write_bytes(kept)
    (tmp_path / "w" / "tokenizer.json").unlink()
    (tmp_path / "w" / "config.json").unlink()
    assert "config.json" in refuse("--weights", "w")
    (tmp_path / "w" / "spiece.model").write_bytes(b"nonsense")
    assert "not a SentencePiece model" in refuse("--weights", "w")


def test_labels_that_cannot_be_written_are_refused_before_training(refuse, tmp_path):
    rows = [row(i, label=("⅓ full", "full")[i % 2]) for i in range(20)]
    write_jsonl(tmp_path / "thirds" / "train.jsonl", rows)
    assert "'⅓ full'" in refuse("--dataset", "thirds") and "⅓" in refuse("--dataset", "thirds")


@pytest.mark.parametrize("platform, version", [("win32", (3, 12)), ("linux", (3, 9, 18))])
@pytest.mark.parametrize("name", PROGRAMS)
def test_another_system_is_refused_before_anything_is_imported(name, platform, version):
    text = (ROOT / name).read_text()
    ast.parse(text, feature_version=(3, 6))  # it can be read
    code = f"import sys; sys.platform, sys.version_info = {platform!r}, {version}; sys.path = []; "
    done = run("-c", f"{code}exec(compile({text!r}, {name!r}, 'exec'))", check=1)
    assert done.stderr.count("\n") == 1 and "Python 3.10" in done.stderr and not done.stdout


def test_a_driver_that_torch_cannot_use_is_warned_of(tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("it can be used here")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    evaluation.warn_of_idle_gpu.cache_clear()
    for device, warned in (("cpu", 0), (None, 1), (None, 0)):
        assert evaluation.choose_device(device).type == "cpu"
        assert capsys.readouterr().err.count("warning: ") == warned
