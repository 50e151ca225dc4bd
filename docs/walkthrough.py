"""Writes `docs/walkthrough.md`: one SVAMP problem on its way through the files, with real values.

`python docs/walkthrough.py --data-root datasets > docs/walkthrough.md`, with SVAMP and PaLM's
completions under `datasets/`. The student is `tiny`, untrained, so that no download is needed.
"""

import sys

if sys.platform == "win32" or sys.version_info < (3, 10):
    sys.exit("error: this program needs Linux or macOS and Python 3.10 or newer")

import argparse
import json
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import dsbs
import t5
import teacher
import train

STEPS = 400  # on this one problem, until the student has memorized it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default="datasets")
    root = Path(parser.parse_args().data_root)
    torch.manual_seed(1)
    torch.set_num_threads(1)

    def show(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    bare = data.load_dataset("svamp", "train", root)[0]
    example = data.load_dataset("svamp", "train", root, "palm")[0]
    position = int(bare.id.rsplit("-", 1)[1])
    record = (root / "svamp" / "svamp_train.json").read_text().splitlines()[position]
    completion = json.loads((root / "svamp/llm/train_CoT_0.json").read_text())[position]
    turns = teacher.read_prompt("svamp").turns(example.input)
    rationale, answer = data.parse_completion("svamp", completion)

    rows = dsbs.make_rows([example], "step-by-step", "human")
    tokenizer = data.Tokenizer(train.DEMO_VOCABULARY)
    tokens = data.tokenize_rows(rows, tokenizer)
    batch = {k: torch.from_numpy(v) for k, v in data.collate(tokens, np.arange(2)).items()}
    start = t5.shift_right(batch["labels"])

    model = t5.T5(t5.T5.untrained_config("tiny", tokenizer.vocab_size))
    counts = torch.stack([(batch["labels"][i] != -100).sum() for i in (0, 1)])

    def losses() -> dsbs.Losses:
        logits = model(batch["input_ids"], batch["attention_mask"], start)
        return dsbs.multitask_loss(logits, batch["labels"], batch["tasks"], counts)

    model.eval()
    before = losses()
    logits = model(batch["input_ids"], batch["attention_mask"], start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / STEPS)
        optimizer.zero_grad()
        losses().total.backward()
        optimizer.step()
    after = losses()
    ids = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=100)
    label, explanation = (tokenizer.decode(row.tolist()) for row in ids)

    ids_in, ids_out, ids_start = (row.tolist()[:8] for row in (
        batch["input_ids"][0], batch["labels"][0], start[0]))  # fmt: skip
    worth = data.evaluate_arithmetic(example.label)
    marker = data.get_task("svamp").marker
    scores = {text: data.is_correct("svamp", text, example.label)
              for text in (answer, label, "84 / 2", "84 * 2 - 6")}  # fmt: skip
    width, size = logits.shape[-1], sum(p.numel() for p in model.parameters())
    messages = "\n".join(show(turn) for turn in [*turns[:3], turns[-1]])
    two_rows = "\n".join(map(str, rows))
    print(f"""# One problem, from raw record to score

`python docs/walkthrough.py --data-root datasets > docs/walkthrough.md` computed all values below
and wrote this page; a test checks that it still does. Open the file that each heading names, and
follow.

## 1. A record of SVAMP (`data.py`: `load_dataset`)

Line {position + 1} of `datasets/svamp/svamp_train.json`:

```json
{record}
```

becomes an `Example`. SVAMP's labels are equations. It has no validation split: a fixed random
tenth of train is taken for it (`split_indices`), and this problem is not in it.

```python
id    {bare.id!r}
input {bare.input!r}
label {bare.label!r}
```

## 2. A question to the teacher (`teacher.py`: `read_prompt`, Section 3.1)

`prompts/svamp.txt` has an instruction and ten demonstrations. The chat API gets {len(turns)}
messages: ten questions and answers, with the instruction at the start of the first question, and
then the problem. The first three and the last:

```json
{messages}
```

## 3. Its answer (`data.py`: `parse_completion`)

PaLM-540B's released completion for it (the paper's own prompt is not released):

```json
{show(completion)}
```

is split at the marker "{marker}" into the rationale r^ and the label y^:

```python
rationale     {rationale!r}
teacher_label {answer!r}
```

The parser ignores everything from an invented "Q:" on, and what follows the first blank line after
the answer. y^ is right ({scores[answer]}): both equations equal {worth}.

## 4. Two rows (`dsbs.py`: `make_rows`, Section 3.2)

One input, two tasks, each with its prefix. With `--labels teacher` the first target would be y^.

```python
{two_rows}
```

## 5. Ids (`data.py`: `tokenize_rows`, `collate`)

The bundled vocabulary has {tokenizer.pieces} pieces; T5's {data.SENTINELS} sentinel tokens make
{tokenizer.vocab_size} ids. A pretrained T5 brings its own vocabulary.
Sources end with EOS ({data.Tokenizer.eos_id}) and are padded with {data.Tokenizer.pad_id}, \
targets with -100, which no loss counts.

```python
input_ids      {tuple(batch["input_ids"].shape)}  {ids_in} ...
attention_mask {tuple(batch["attention_mask"].shape)}  {int(batch["attention_mask"].sum())} tokens
labels         {tuple(batch["labels"].shape)}  {ids_out} ...
tasks          {batch["tasks"].tolist()}  0 label, 1 rationale
```

The decoder reads the target shifted right by one position (`t5.py`: `shift_right`):
{ids_start} ...

## 6. Logits and losses (`t5.py`: `forward`; `dsbs.py`: `multitask_loss`)

The untrained `tiny` student ({size:,} parameters) gives logits {tuple(logits.shape)}: the
{tokenizer.vocab_size} ids, rounded up to a multiple of 64.
Each task's cross-entropy is summed over its target tokens, {counts.tolist()}, and divided by their
number in the whole step:

```
L_label     {before.label:.2f}     Eq. 1
L_rationale {before.rationale:.2f}     Eq. 4
L           {before.total:.2f}    Eq. 3, lambda = 1
```

A student that gave all {width} ids the same probability would have ln {width} = \
{np.log(width):.2f} for each.

## 7. Training (`train.py`)

A run does this with hundreds of problems. Here AdamW takes {STEPS} steps (learning rate from 1e-3
to 0, no dropout) on this one problem. Afterwards L_label is {after.label:.2f} and L_rationale is
{after.rationale:.2f}: the student has memorized it, which tells us nothing about other problems.

## 8. Prediction and score (`t5.py`: `generate`; `data.py`: `is_correct`)

At test time the student is asked for the label alone, so the rationale costs nothing; `--explain`
asks for it too.

```python
"[label] ..."      {label!r}
"[rationale] ..."  {explanation!r}
```

The equation is parsed, never executed, and its value compared with the label's:

```python
{scores}
```""")


if __name__ == "__main__":
    main()
