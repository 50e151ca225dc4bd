"""Writes the bundled task: letters to a shop, two teachers' answers, a vocabulary.

Everything here is synthetic and made by this script alone: `python demo/make_demo.py` writes the
same bytes every time. It must not know torch, students or training.

The task. A letter names an item and says what is the matter with it. `policy` looks up the shop's
decision by the item's department and the kind of matter. The letter names neither: that a kettle
is kitchenware is a fact about the world, and "A part came off." one of many ways to say that it is
faulty. A label tells little about them, since each department and each kind of matter leads to
several decisions. The rationale says both in plain words, which is how a teacher's knowledge gets
to a student that sees the letter alone.

Besides the three splits it writes `pool.jsonl`, letters without a label but with the good
teacher's answers, and `weak.jsonl`, a worse teacher's answers to the letters of the splits.
"""

import sys

if sys.platform == "win32" or sys.version_info < (3, 10):
    sys.exit("error: this program needs Linux or macOS and Python 3.10 or newer")

import argparse
import io
import json
import os
import random
from pathlib import Path

import sentencepiece

SEED = 0
SIZES = {"train": 600, "valid": 200, "test": 1000, "pool": 700}
LABELS = ["refund", "exchange", "voucher", "refuse"]
MARKER = "So the answer is"
PREFIXES = ["[label]", "[rationale]", "predict:", "explain:"]
# Shares of wrong and of unparsable answers. The good teacher is about as sound as a large model
# on an easy task; the weak one is wrong on more than a quarter and says less.
GOOD, WEAK = {"wrong": 0.065, "unparsable": 0.015}, {"wrong": 0.27, "unparsable": 0.06}
VOCABULARY = 640  # at most: 256 bytes, 94 printable characters, about 200 words

ITEMS = {
    "kitchen": [
        "kettle",
        "pan",
        "spoon",
        "toaster",
        "teapot",
        "mug",
        "ladle",
        "whisk",
        "grater",
        "sieve",
    ],
    "clothing": [
        "coat",
        "scarf",
        "shirt",
        "belt",
        "glove",
        "sock",
        "jumper",
        "skirt",
        "hat",
        "vest",
    ],
    "toy": [
        "puzzle",
        "doll",
        "kite",
        "ball",
        "drum",
        "marble",
        "robot",
        "yoyo",
        "rattle",
        "scooter",
    ],
    "garden": [
        "rake",
        "hose",
        "spade",
        "bench",
        "pot",
        "fence",
        "shovel",
        "mower",
        "bucket",
        "trellis",
    ],
}
MATTERS = {
    "faulty": [
        "It does not work.",
        "It broke at once.",
        "There is a crack in it.",
        "A part came off.",
        "It fell to pieces.",
        "One side is torn.",
    ],
    "unwanted": [
        "I changed my mind.",
        "It was a gift, I have one.",
        "We do not need it now.",
        "My wife does not like it.",
        "I bought two by mistake.",
        "It cost less elsewhere.",
    ],
    "misdelivered": [
        "I asked for another colour.",
        "You sent the large size.",
        "This is not what I ordered.",
        "The picture showed a blue one.",
        "I wanted the small model.",
        "It came in green, not red.",
    ],
}
# The shop's decisions are arbitrary on purpose: neither fact decides without the other.
DECISIONS = {
    "kitchen": {"faulty": "exchange", "unwanted": "voucher", "misdelivered": "refund"},
    "clothing": {"faulty": "refund", "unwanted": "exchange", "misdelivered": "voucher"},
    "toy": {"faulty": "voucher", "unwanted": "refuse", "misdelivered": "exchange"},
    "garden": {"faulty": "refuse", "unwanted": "refund", "misdelivered": "refuse"},
}
# Said in passing; none of it matters to the policy.
GREETINGS = ["Hello.", "Good morning.", "Dear shop,", ""]
BOUGHT = [
    "I bought a {item} last week.",
    "I ordered this {item} in May.",
    "This {item} is from your shop.",
    "About the {item} I got from you.",
    "My {item} came today.",
]
ASIDES = ["I have the receipt.", "I paid in cash.", "We live nearby.", "I am a member.", ""]
WISHES = ["What can you do?", "Please help me.", "Can I bring it back?", "I wait for your answer."]


def policy(facts: dict) -> str:
    """The shop's decision."""
    return DECISIONS[facts["department"]][facts["matter"]]


def make_letter(rng: random.Random) -> tuple[str, dict]:
    """One letter as the student reads it, and its facts, each drawn evenly."""
    department, matter = rng.choice(list(ITEMS)), rng.choice(list(MATTERS))
    bought = rng.choice(BOUGHT).format(item=rng.choice(ITEMS[department]))
    text = [rng.choice(GREETINGS), bought, rng.choice(MATTERS[matter]), rng.choice(ASIDES)]
    letter = " ".join(filter(None, [*text, rng.choice(WISHES)]))
    return letter, {"department": department, "matter": matter}


def misread(rng: random.Random, facts: dict) -> dict:
    """The facts with one of them read wrongly, such that the decision changes."""
    wrong = [{**facts, "department": other} for other in ITEMS]
    wrong += [{**facts, "matter": other} for other in MATTERS]
    return rng.choice([seen for seen in wrong if policy(seen) != policy(facts)])


def good_rationale(rng: random.Random, facts: dict) -> str:
    """Both facts; in one wording, so `rng` is not used."""
    return f"The {facts['department']} item is {facts['matter']}."


def weak_rationale(rng: random.Random, facts: dict) -> str:
    """One fact of the two."""
    fact = rng.choice([f"It is a {facts['department']} item.", f"The item is {facts['matter']}."])
    opening = rng.choice(["I think this is a usual letter.", "The shop decides this.", ""])
    closing = rng.choice(["That seems to settle it.", "I would go by that."])
    return " ".join(filter(None, [opening, fact, closing]))


def teach(rng: random.Random, rows: list[dict], facts: list[dict], rates: dict, say) -> list[dict]:
    """The rows with a teacher's `rationale` and `teacher_label`; both null if unparsable.

    The shares in `rates` hold exactly, up to rounding; a wrong answer follows from a fact misread.
    """
    wrong, unparsable = (round(rates[kind] * len(rows)) for kind in ("wrong", "unparsable"))
    fate = ["wrong"] * wrong + ["unparsable"] * unparsable
    fate += ["right"] * (len(rows) - len(fate))
    rng.shuffle(fate)
    taught = []
    for row, true, how in zip(rows, facts, fate):
        seen = misread(rng, true) if how == "wrong" else true
        answer = (None, None) if how == "unparsable" else (say(rng, seen), policy(seen))
        taught.append({**row, "rationale": answer[0], "teacher_label": answer[1]})
    return taught


def train_vocabulary(rows: list[dict]) -> bytes:
    """A SentencePiece model with T5's special ids; every printable ASCII character is a piece."""
    texts = []
    for row in rows:
        texts += [row["input"], *PREFIXES]
        if row["rationale"]:
            texts.append(f"{row['rationale']} {MARKER} {row['teacher_label']}.")
        if row["label"]:
            texts.append(row["label"])
    # The trainer considers only what occurs in two distinct words of the text; so that every
    # whole word is considered, each stands here once alone and once before a comma.
    words = sorted({word.strip(".,:?[]") for text in texts for word in text.split()})
    texts += [f"{word} {word}," for word in words]
    model = io.BytesIO()
    # One thread and no input file: neither the machine nor a path shows in the bytes.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars="".join(map(chr, range(33, 127))),
        num_threads=1,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def make_demo() -> dict[str, bytes]:
    """All files of the task, by name."""
    rng = random.Random(SEED)
    letters: dict[str, dict] = {}  # a text once, so that no split shares an input with another
    while len(letters) < sum(SIZES.values()):
        text, facts = make_letter(rng)
        letters.setdefault(text, facts)
    drawn = iter(letters.items())
    files: dict[str, list[dict]] = {"weak": []}
    for split, size in SIZES.items():
        texts, facts = zip(*[next(drawn) for _ in range(size)])
        labels = [None if split == "pool" else policy(one) for one in facts]
        rows = [
            {"id": f"demo-{split}-{i}", "input": text, "label": label}
            for i, (text, label) in enumerate(zip(texts, labels))
        ]
        files[split] = teach(rng, rows, facts, GOOD, good_rationale)
        if split != "pool":
            files["weak"] += teach(rng, rows, facts, WEAK, weak_rationale)
            files[split] = [{**row, "facts": one} for row, one in zip(files[split], facts)]
    task = {"labels": LABELS, "scorer": "text", "marker": MARKER}
    written = {
        f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()
        for name, rows in files.items()
    }
    written["task.json"] = (json.dumps(task) + "\n").encode()
    written["spiece.model"] = train_vocabulary(
        files["train"] + files["pool"] + files["weak"][: SIZES["train"]]
    )
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the bundled task, the same bytes always.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, content in make_demo().items():
        temporary = out / f"{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, out / name)


if __name__ == "__main__":
    main()
