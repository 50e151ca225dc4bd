"""Writes the bundled task: refund requests to a shop, two teachers' answers, a vocabulary.

Everything here is synthetic and made by this script alone: `python demo/make_demo.py` writes the
same bytes every time. It must not know torch, students or training.

The task. A request mentions four facts, each in one of many wordings: how long ago the thing was
bought, whether it is sealed, opened or faulty, what it is (personal or household), and whether the
customer is a member. `policy` turns the facts into one of four decisions. A student sees the
request alone; the rationale names the facts in plain terms and the rule that follows from them.
"""
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
VOCABULARY = 508  # 94 printable characters, 256 bytes, the rest words of the task

# How each fact is said. Days since the purchase, by the words for them; 30 days are in time.
DAYS = {
    "yesterday": 1, "four days ago": 4, "last week": 7, "two weeks ago": 14,
    "twenty days ago": 20, "three weeks ago": 21,
    "forty days ago": 40, "six weeks ago": 42, "two months ago": 60, "seventy days ago": 70,
    "half a year ago": 180, "last year": 365,
}
STATES = {
    "sealed": ["The seal is not broken.", "The box was never opened.", "It is still wrapped.",
               "Nobody has tried it yet.", "It has not been used."],
    "opened": ["The seal is broken.", "The box was opened.", "It is no longer wrapped.",
               "Somebody has tried it once.", "It has been used twice."],
    "faulty": ["It came broken.", "There is a crack in it.", "It never worked as it should.",
               "A part is missing.", "It was damaged in the box."],
}
ITEMS = {
    "personal": ["razor", "toothbrush", "lipstick", "swimsuit", "hairbrush", "perfume"],
    "household": ["kettle", "lamp", "chair", "radio", "mirror", "toaster"],
}
MEMBERS = {
    True: ["Member for two years.", "Has our loyalty card.", "Joined the club in May.",
           "Collects points with us."],
    False: ["Not a member.", "Has no loyalty card.", "Did not want to join the club.",
            "Ordered as a guest."],
}
# Said in passing; none of it matters to the policy.
GREETINGS = ["Hello.", "Good morning.", "Dear shop,", "Hi there."]
BOUGHT = ["I bought a {item} {time}.", "I ordered this {item} from you {time}.",
          "This {item} is from your shop, I got it {time}."]
ASIDES = ["It was a gift for my sister.", "I do not like the colour.", "It is too big for us.", ""]
WISHES = ["Can I bring it back?", "I would like my money.", "Please help me."]
REMARKS = ["Has the receipt.", "Paid in cash.", "Wrote to us.", ""]


def policy(facts: dict) -> tuple[str, str]:
    """The shop's rules, the first that fits: (decision, the rule in words)."""
    in_time, state, member = facts["days"] <= 30, facts["state"], facts["member"]
    if state == "faulty":
        if in_time:
            return "refund", "A faulty item in time earns a refund."
        return "exchange", "A faulty item that comes late earns an exchange."
    if not in_time:
        if member:
            return "voucher", "A member who comes late earns a voucher."
        return "refuse", "Late requests without membership we refuse."
    if state == "sealed":
        return "refund", "A sealed item in time earns a refund."
    if facts["category"] == "personal":
        return "refuse", "Opened personal items we refuse."
    if member:
        return "exchange", "A member may exchange an opened household item."
    return "voucher", "An opened household item without membership earns a voucher."


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
    wrong = [{**facts, "days": 60 if facts["days"] <= 30 else 14},
             {**facts, "member": not facts["member"]},
             {**facts, "category": "household" if facts["category"] == "personal" else "personal"}]
    wrong += [{**facts, "state": state} for state in STATES]
    return rng.choice([other for other in wrong if policy(other)[0] != policy(facts)[0]])


def say_facts(facts: dict) -> list[str]:
    """The four facts in plain terms."""
    return ["bought in time" if facts["days"] <= 30 else "bought too long ago", facts["state"],
            f"a {facts['category']} item", "a member" if facts["member"] else "not a member"]


def good_rationale(rng: random.Random, facts: dict) -> str:
    return f"It was {', '.join(say_facts(facts))}. {policy(facts)[1]}"


def weak_rationale(rng: random.Random, facts: dict) -> str:
    """Names one fact, no rule."""
    opening = rng.choice(["I think the shop decides this.", "This looks like a usual request.", ""])
    closing = rng.choice(["That seems to settle it.", "I would go by that."])
    return " ".join(filter(None, [opening, f"It says: {rng.choice(say_facts(facts))}.", closing]))


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
    # The trainer proposes only what stands in two distinct words; so that every whole word is
    # proposed, each one stands here once alone and once before a comma.
    words = sorted({word.strip(".,:?[]") for text in texts for word in text.split()})
    texts += [f"{word} {word}," for word in words]
    model = io.BytesIO()
    # One thread and no input file: neither the machine nor a path shows in the bytes.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="unigram",
        vocab_size=VOCABULARY, byte_fallback=True, character_coverage=1.0,
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
    written["spiece.model"] = train_vocabulary(files["train"] + files["pool"])
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the bundled task, the same bytes always.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, content in make_demo().items():
        beside = out / f"{name}.tmp"
        beside.write_bytes(content)
        os.replace(beside, out / name)


if __name__ == "__main__":
    main()
