"""Writes the bundled task: refund requests to a shop, two teachers' answers, a vocabulary.

Everything here is synthetic and made by this script alone: `python demo/make_demo.py` writes the
same bytes every time. It must not know torch, students or training.

The task. A request mentions four facts, each in one of many wordings: how long ago the thing was
bought, whether it is sealed or opened, whether it is for personal or household use, and whether
the customer is a member. `policy` turns the facts into one of four decisions. A student sees the
request alone; the rationale names the facts in plain terms and the rule that follows from them.

Besides the three splits it writes `pool.jsonl`, requests without a label but with the good
teacher's answers, and `weak.jsonl`, a worse teacher's answers to the requests of the splits.
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
SIZES = {"train": 300, "valid": 200, "test": 1000, "pool": 700}
LABELS = ["refund", "exchange", "voucher", "refuse"]
MARKER = "So the answer is"
PREFIXES = ["[label]", "[rationale]", "predict:", "explain:"]
# Shares of wrong and of unparsable answers. The good teacher is about as sound as a large model
# on an easy task; the weak one is wrong on more than a quarter and says less.
GOOD, WEAK = {"wrong": 0.065, "unparsable": 0.015}, {"wrong": 0.27, "unparsable": 0.06}
VOCABULARY = 512  # at most: 256 bytes, 94 printable characters, about 150 words

# How each fact is said. Days since the purchase, by the words for them; 30 days are in time.
DAYS = {
    "yesterday": 1, "four days ago": 4, "last week": 7, "two weeks ago": 14,
    "twenty days ago": 20, "three weeks ago": 21,
    "forty days ago": 40, "six weeks ago": 42, "two months ago": 60, "seventy days ago": 70,
    "half a year ago": 180, "last year": 365,
}
STATES = {
    "sealed": ["The seal is not broken.", "The box was never opened.", "It is still wrapped.",
               "Nobody has tried it yet.", "The tape is on the box."],
    "opened": ["The seal is broken.", "The box was opened.", "It is no longer wrapped.",
               "Somebody has tried it once.", "The tape is off the box."],
}
ITEMS = {
    "personal": ["razor", "toothbrush", "lipstick", "swimsuit", "hairbrush", "perfume"],
    "household": ["kettle", "lamp", "chair", "radio", "mirror", "toaster"],
}
MEMBERS = {
    True: ["Member for two years.", "Has our loyalty card.", "Joined the club in May.",
           "Collects points with us."],
    False: ["Not a member.", "Has no loyalty card.", "Did not want to join the club.",
            "Is new to us."],
}
# Said in passing; none of it matters to the policy.
GREETINGS = ["Hello.", "Good morning.", "Dear shop,"]
BOUGHT = ["I bought a {item} {time}.", "I ordered this {item} {time}.",
          "This {item} is from your shop, I got it {time}."]
ASIDES = ["It was a gift.", "I do not like the colour.", "It is too big for us.", ""]
WISHES = ["Can I bring it back?", "I would like my money.", "Please help me."]
REMARKS = ["Has the receipt.", "Paid in cash.", "Wrote to us.", ""]


def policy(facts: dict) -> tuple[str, str]:
    """The shop's decision and the rule that it follows from."""
    in_time, member = facts["days"] <= 30, facts["member"]
    if facts["state"] == "sealed" and in_time:
        return "refund", "Sealed and in time earns a refund."
    if facts["state"] == "sealed" and member:
        return "exchange", "A member may exchange a sealed item late."
    if facts["state"] == "sealed":
        return "voucher", "For a late sealed item a guest gets a voucher."
    if facts["category"] == "household" and in_time:
        return "exchange", "An opened household item in time we exchange."
    if member:
        return "voucher", "For any other opened item a member gets a voucher."
    return "refuse", "Any other opened item of a guest we refuse."


def make_request(rng: random.Random) -> tuple[str, dict]:
    """One request as the student reads it, and its facts, each fact drawn evenly."""
    time = rng.choice(list(DAYS))
    state, category, member = rng.choice(list(STATES)), rng.choice(list(ITEMS)), rng.random() < 0.5
    item = rng.choice(ITEMS[category])
    bought = rng.choice(BOUGHT).format(item=item, time=time)
    message = [rng.choice(GREETINGS), bought, rng.choice(ASIDES)]
    notes = [rng.choice(MEMBERS[member]), rng.choice(REMARKS)]
    rng.shuffle(notes)
    # The customer or the clerk says what state the thing is in.
    rng.choice([message, notes]).append(rng.choice(STATES[state]))
    message.append(rng.choice(WISHES))
    text = " ".join(filter(None, ["Customer:", *message, "Clerk:", *notes]))
    facts = {"days": DAYS[time], "state": state, "category": category, "member": member}
    return text, facts


def misread(rng: random.Random, facts: dict) -> dict:
    """The facts with one of them read wrongly, such that the decision changes."""
    other = {"days": 60 if facts["days"] <= 30 else 14,
             "state": "opened" if facts["state"] == "sealed" else "sealed",
             "category": "household" if facts["category"] == "personal" else "personal",
             "member": not facts["member"]}
    wrong = [{**facts, key: value} for key, value in other.items()]
    return rng.choice([seen for seen in wrong if policy(seen)[0] != policy(facts)[0]])


def say_facts(facts: dict) -> list[str]:
    """The four facts in plain terms."""
    return ["in time" if facts["days"] <= 30 else "late", facts["state"], facts["category"],
            "a member" if facts["member"] else "a guest"]


def good_rationale(rng: random.Random, facts: dict) -> str:
    """All facts and the rule; in one wording, so `rng` is not used."""
    time, state, category, member = say_facts(facts)
    return f"The {category} item is {state}, {time}, from {member}. {policy(facts)[1]}"


def weak_rationale(rng: random.Random, facts: dict) -> str:
    """One fact of the four, no rule."""
    time, state, category, member = say_facts(facts)
    fact = rng.choice([f"The request is {time}.", f"The item is {state}.",
                       f"The item is {category}.", f"It is from {member}."])
    opening = rng.choice(["I think this is a usual request.", "The shop decides this.", ""])
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
        answer = (None, None) if how == "unparsable" else (say(rng, seen), policy(seen)[0])
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
        sentence_iterator=iter(texts), model_writer=model, model_type="unigram",
        vocab_size=VOCABULARY, hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0,
        required_chars="".join(map(chr, range(33, 127))), num_threads=1,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    return model.getvalue()


def make_demo() -> dict[str, bytes]:
    """All files of the task, by name."""
    rng = random.Random(SEED)
    requests: dict[str, dict] = {}  # a text once, so that no split shares an input with another
    while len(requests) < sum(SIZES.values()):
        text, facts = make_request(rng)
        requests.setdefault(text, facts)
    drawn = iter(requests.items())
    files: dict[str, list[dict]] = {"weak": []}
    for split, size in SIZES.items():
        texts, facts = zip(*[next(drawn) for _ in range(size)])
        labels = [None if split == "pool" else policy(one)[0] for one in facts]
        rows = [{"id": f"demo-{split}-{i}", "input": text, "label": label}
                for i, (text, label) in enumerate(zip(texts, labels))]
        files[split] = teach(rng, rows, facts, GOOD, good_rationale)
        if split != "pool":
            files["weak"] += teach(rng, rows, facts, WEAK, weak_rationale)
            files[split] = [{**row, "facts": one} for row, one in zip(files[split], facts)]
    task = {"labels": LABELS, "scorer": "text", "marker": MARKER}
    written = {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()
               for name, rows in files.items()}
    written["task.json"] = (json.dumps(task) + "\n").encode()
    written["spiece.model"] = train_vocabulary(
        files["train"] + files["pool"] + files["weak"][:SIZES["train"]])
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
