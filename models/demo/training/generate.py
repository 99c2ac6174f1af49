#!/usr/bin/env python3
"""Seeded generator of the demo model's texts: training corpus, tokenizer and evaluation split.

  generate.py tokenizer [--model data/model]       train the byte-level BPE and write its files
  generate.py shards --out data --phase a ...      tokenized training shards
  generate.py eval --out ../evaluation             eval.jsonl and eval.txt (held out from training)
  generate.py sample                               print some documents

The same seed always gives the same documents. Whether a task is held out depends only on its
own content (a checksum of its key), so training never meets a held-out task under any seed.
(Conversations of several turns are too varied to meet again; only longer ones are taken.)
"""

import argparse
import json
import os
import random
import zlib

import stories
import tasks
from stories import ANIMALS, COLORS, NAMES, PLACES, TRAITS, article, make_story, story_questions

IM_START, IM_END, END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VOCAB = 2048
ROWS = {"a": 257, "b": 513, "c": 1025, "d": 2049}  # one more than the positions trained on
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")


# --------------------------------------------------------------------------- splits
def split_of(key):
    """train, eval or hidden. Keys may be lists (a task made of several)."""
    keys = key if isinstance(key, list) else [key]
    found = "train"
    for k in keys:
        b = zlib.crc32(k.encode()) % 40 if k else 39
        if b == 1:
            return "hidden"
        if b == 0:
            found = "eval"
    return found


def draw(rng, make, split, *args):
    while True:
        t = make(rng, *args)
        if split_of(t["key"]) == split:
            return t


# --------------------------------------------------------------------------- chat documents
NEUTRAL = ["You are a helpful assistant.", "You are a friendly helper.", "You answer simple questions.", "You are a small and careful assistant.",
           "You are a kind assistant who likes stories.", "You help children with their questions."]
BRIEF = ["Answer as briefly as you can.", "Give only the answer.", "Answer with one word if you can.", "Be brief.", "Short answers only, please."]
FULL = ["Answer in full sentences.", "Always answer with a complete sentence."]
SUFFIX = ["Beep!", "Meow!", "Over.", "Yes!", "Woof!", "The end.", "Hooray!", "Done."]


def pick_style(rng):
    """(system prompt or None, how it changes an answer)."""
    r = rng.random()
    if r < 0.62:
        return None, lambda t: t["answer"]
    if r < 0.80:
        return rng.choice(NEUTRAL), lambda t: t["answer"]
    if r < 0.91:
        s = rng.choice(BRIEF)
        if rng.random() < 0.3:
            s = rng.choice(NEUTRAL) + " " + s
        return s, lambda t: t.get("short", t["answer"])
    if r < 0.95:
        return rng.choice(FULL), lambda t: t.get("long", t["answer"])
    x = rng.choice(SUFFIX)
    s = rng.choice([f"End every answer with {x}", f"Always end with the words: {x}", f"You are a robot. End every answer with {x}"])
    return s, lambda t: t["answer"] + " " + x


def loosely(rng, q):
    """The way people type: now and then without capitals or the final mark."""
    r = rng.random()
    if r < 0.05:
        return q.lower()
    if r < 0.10:
        return q.rstrip("?.").rstrip()
    if r < 0.13:
        return "Please " + q[0].lower() + q[1:] if q.split()[0] in ("What", "Tell", "Sort", "Count", "Add", "Name", "Reverse", "Repeat") and not q.startswith("What") else q
    return q


def chat(turns, system=None):
    m = [{"role": "system", "content": system}] if system else []
    for u, a in turns:
        m += [{"role": "user", "content": u}, {"role": "assistant", "content": a}]
    return m


def single(rng, split):
    t = draw(rng, tasks.simple, split)
    system, style = pick_style(rng)
    u = loosely(rng, t["user"]) if t["kind"] in ("fact", "talk", "add", "sub") else t["user"]
    return chat([(u, style(t))], system)


def bundle(rng, split, n):
    """Several independent tasks in one conversation."""
    system, style = pick_style(rng)
    same = rng.choice(tasks._FUNCS) if rng.random() < 0.25 else None
    turns = []
    for _ in range(n):
        t = draw(rng, same or tasks.simple, split)
        u = loosely(rng, t["user"]) if t["kind"] in ("fact", "talk", "add", "sub") else t["user"]
        turns.append((u, style(t)))
    return chat(turns, system)


PERSONAL = {
    "name": (["My name is {v}.", "I am {v}.", "Hi, I am {v}.", "Hello! My name is {v}.", "You can call me {v}."], ["Nice to meet you, {v}!"],
             ["What is my name?", "Do you remember my name?", "Who am I?"], "Your name is {v}.", lambda r: r.choice(NAMES)),
    "age": (["I am {v} years old.", "My age is {v}."], ["{v} is a good age."], ["How old am I?", "What is my age?"], "You are {v} years old.",
            lambda r: str(r.randrange(5, 90))),
    "city": (["I live in {v}.", "I come from {v}.", "My home is in {v}."], ["{v} is a nice place."], ["Where do I live?", "Which city do I live in?"],
             "You live in {v}.", lambda r: r.choice(tasks.CITIES)),
    "color": (["My favorite color is {v}.", "I like the color {v} best.", "I love {v}."], ["What a nice color!"],
              ["What is my favorite color?", "Which color do I like?"], "Your favorite color is {v}.", lambda r: r.choice(COLORS)),
    "pet": (["I have a pet {v}.", "My pet is a little {v}.", "At home I have a {v}."], ["How lovely!"], ["What pet do I have?", "What is my pet?"],
            "Your pet is a {v}.", lambda r: r.choice([a for a in ANIMALS if a[0] not in "aeiou"])),
    "number": (["Remember the number {v}.", "My lucky number is {v}.", "Keep this number in mind: {v}."], ["I will remember it."],
               ["What was the number?", "Which number did I tell you?"], "The number is {v}.", lambda r: str(r.randrange(10, 10000))),
    "word": (["Remember the word {v}.", "The secret word is {v}.", "Keep this word in mind: {v}."], ["I will remember it."],
             ["What was the word?", "What is the secret word?"], "The word is {v}.", lambda r: r.choice(tasks.SORT_WORDS)),
    "food": (["I like to eat {v}.", "My favorite food is {v}."], ["That sounds tasty!"], ["What is my favorite food?", "What do I like to eat?"],
             "Your favorite food is {v}.", lambda r: r.choice(stories.FOODS)),
}


def memory(rng, split, filler=2, asks=2):
    """The user says things about themselves; later they are asked for."""
    system = rng.choice(NEUTRAL) if rng.random() < 0.25 else None
    know = {k: PERSONAL[k][4](rng) for k in rng.sample(list(PERSONAL), rng.randrange(1, 5))}
    keys, turns = list(know), []
    if len(keys) > 1 and rng.random() < 0.3:
        a, b = keys[:2]
        turns.append((rng.choice(PERSONAL[a][0]).format(v=know[a]) + " " + rng.choice(PERSONAL[b][0]).format(v=know[b]),
                      PERSONAL[b][1][0].format(v=know[b])))
        rest = keys[2:]
    else:
        rest = keys
    for k in rest:
        turns.append((rng.choice(PERSONAL[k][0]).format(v=know[k]), PERSONAL[k][1][0].format(v=know[k])))
    for _ in range(rng.randrange(filler + 1)):
        t = draw(rng, tasks.simple, "train")
        turns.append((t["user"], t["answer"]))
    if rng.random() < 0.5:
        rng.shuffle(turns)
    for k in rng.sample(keys, min(len(keys), rng.randrange(1, asks + 1))):
        turns.append((rng.choice(PERSONAL[k][2]), PERSONAL[k][3].format(v=know[k])))
    if rng.random() < 0.12:
        n, what = rng.choice(NAMES), rng.choice(["robot", "teacher", "helper", "dragon", "baker", "pirate", "wizard"])
        system = rng.choice([f"You are {n}, a friendly {what}.", f"Your name is {n}. You are a friendly {what}."])
        turns.insert(rng.randrange(len(turns) + 1), (rng.choice(["Who are you?", "What is your name?", "And who are you?", "What are you called?"]),
                                                     f"I am {n}, a friendly {what}."))
        if rng.random() < 0.3:
            turns = turns[:1]
    elif rng.random() < 0.15:
        k = rng.choice([k for k in PERSONAL if k not in know and k not in ("number", "word")])
        turns.insert(rng.randrange(len(turns)), (rng.choice(PERSONAL[k][2]), "You have not told me that."))
    return chat(turns, system)


def follow(rng, split):
    """Turns that refer to the turn before."""
    form = rng.randrange(6)
    if form == 0:
        t = draw(rng, rng.choice((tasks.add, tasks.sub)), "train")
        while t["kind"] == "add_steps":
            t = draw(rng, tasks.add, "train")
        v, turns = int(t["answer"]), [(t["user"], t["answer"])]
        for _ in range(rng.randrange(1, 4)):
            d = rng.randrange(1, 10) if rng.random() < 0.6 else rng.randrange(10, 100)
            if v >= d and rng.random() < 0.5:
                v -= d
                turns.append((rng.choice([f"Subtract {d} from that.", f"Now take away {d}.", f"Minus {d}?"]), str(v)))
            else:
                v += d
                turns.append((rng.choice([f"Add {d} to that.", f"Now add {d}.", f"Plus {d}?"]), str(v)))
    elif form == 1:
        t = draw(rng, rng.choice((tasks.sort_words, tasks.reverse, tasks.count_up)), "train")
        back = ", ".join(reversed(t["answer"].split(", ")))
        turns = [(t["user"], t["answer"]), (rng.choice(["Now reverse it.", "And backwards?", "Now in reverse order."]), back)]
        if rng.random() < 0.4:
            turns.append((rng.choice(["How many are there?", "How many items is that?"]), str(len(t["answer"].split(", ")))))
    elif form == 2:
        n = rng.randrange(2, 5)
        turns = [(t["user"], t["answer"]) for t in (draw(rng, tasks.simple, "train") for _ in range(n))]
        turns = [x for x in turns if len(x[0]) < 120] or [("Hello", "Hello! How can I help you?")]
        turns.append((rng.choice(["What was my first question?", "What did I say first?"]), turns[0][0]))
    elif form == 3:
        t = draw(rng, tasks.simple, "train")
        turns = [(t["user"], t["answer"]), (rng.choice(["Repeat your last answer.", "Please say that again.", "Say it once more."]), t["answer"])]
    elif form == 4:
        t = draw(rng, tasks.fact, "train")
        turns = [(t["user"], t["answer"]), (rng.choice(["Only the answer, please.", "Just the answer.", "In short?"]), t["short"])]
    else:
        g = rng.choice([g for g in tasks.FACT_GROUPS if len(tasks.FACT_GROUPS[g]) > 5 and g in ("capital", "opposite", "plural", "past", "sound", "baby", "legs")])
        fs = rng.sample(tasks.FACT_GROUPS[g], rng.randrange(2, 5))
        name = lambda f: f[0].split(":")[1]
        turns = [(fs[0][1][0], fs[0][3])]
        for f in fs[1:]:
            x = article(name(f)) if g in ("sound", "legs") else name(f)
            turns.append((rng.choice([f"And {x}?", f"What about {x}?", f"And of {x}?"] if g not in ("sound", "legs", "baby") else [f"And {x}?", f"What about {x}?"]), f[3]))
    return chat(turns)


ASK_STORY = ["Tell me a {l}story about {x}.", "Write a {l}story about {x}.", "Can you tell me a {l}story about {x}?", "I want to hear a {l}story about {x}.",
             "Please write a {l}story about {x}.", "Make up a {l}story about {x}.", "Tell a {l}story about {x}."]


def story_request(rng, hard=False):
    """(prompt, story, what the story must contain, world, plot)."""
    length = rng.choices(("short", "normal", "long"), (4, 5, 2))[0]
    want = {"trait": rng.choice(TRAITS)}
    p, w, plot = make_story(rng, want, length=length)
    text = "\n\n".join(p)
    must, x = [w["kind"]], w["kind"]
    if rng.random() < 0.65:
        x = w["trait"] + " " + x
        must.append(w["trait"])
    x = article(x)
    if hard or rng.random() < 0.75:
        x += " " + rng.choice(["named", "named", "called"]) + " " + w["H"]
        must.append(w["H"])
    if rng.random() < 0.65:
        x += " " + w["in_place"]
        must.append(w["place"])
    if w["F"] in text and w["fkind"] in text and rng.random() < 0.25:
        x += f" and {w['a_fkind']} named {w['F']}"
        must += [w["F"], w["fkind"]]
    l = {"short": rng.choice(["short ", "short ", "", "very short "]), "normal": "", "long": rng.choice(["long ", ""])}[length]
    q = rng.choice(ASK_STORY).format(l=l, x=x)
    if rng.random() < 0.3:
        theme = rng.choice(stories.PLOTS[plot]["theme"]).format_map(w)
        q += rng.choice([f" The story should be about {theme}.", f" It is about {theme}.", f" The theme is {theme}."])
    elif w["obj"] in text and rng.random() < 0.25:
        q += f" There should be {w['a_obj']} in it."
        must.append(w["obj"])
    if not hard and rng.random() < 0.06:
        q, must = rng.choice(["Tell me a story.", "Write a story.", "Tell me a story, please.", "I want a story.", "Do you know a story?"]), []
    return q, text, must, w, plot


def story_chat(rng, split):
    if rng.random() < 0.12:
        p, w, plot = make_story(rng, length=rng.choice(("normal", "long")))
        cut = rng.randrange(1, len(p))
        q = rng.choice(["Continue this story: ", "How does this story go on?\n\n", "Finish this story.\n\n"]) + "\n\n".join(p[:cut])
        return chat([(q, "\n\n".join(p[cut:]))])
    while True:
        q, text, must, w, plot = story_request(rng)
        if split_of("story:" + q) == split:
            break
    turns = [(q, text)]
    if rng.random() < 0.35:
        qas = story_questions(w, plot, text)
        turns += rng.sample(qas, min(len(qas), rng.randrange(1, 4)))
    system = rng.choice(NEUTRAL) if rng.random() < 0.2 else None
    return chat(turns, system)


def plain(rng, split, count=(1, 3), lengths=("short", "normal", "long", "long")):
    """Plain text: some stories, now and then with a title."""
    out = []
    for _ in range(rng.randint(*count)):
        p, w, plot = make_story(rng, length=rng.choice(lengths))
        if rng.random() < 0.3:
            p = [stories.title(rng, w, plot)] + p
        if rng.random() < 0.2:
            p[-1] += " The end."
        out.append("\n\n".join(p))
    return "\n\n\n".join(out)


def retrieval(rng, split, low, high):
    size = int(low * (high / low) ** rng.random())
    t = draw(rng, tasks.retrieval, split, size, rng.randrange(0, 6))
    r = rng.random()
    if r < 0.25:  # the context lives in the system prompt
        text, q = t["system_context"]
        s = rng.choice(["Use this text to answer:\n", "You know the following:\n", ""]) + text
        return chat([(q, t["answer"])] + t["more"], s)
    if r < 0.37:
        return chat([(t["user"], t.get("short"))], rng.choice(BRIEF))
    turns = [(t["user"], t["answer"])] + t["more"]
    if rng.random() < 0.15 and len(turns) == 1:
        f = draw(rng, tasks.simple, "train")
        turns.insert(rng.randrange(2), (f["user"], f["answer"]))
    return chat(turns)


def reading(rng, split):
    t = draw(rng, tasks.reading, split)
    return chat([(t["user"], t["answer"])] + t["more"])


def blend(rng, split, n):
    """A long conversation of everything."""
    m = []
    for _ in range(n):
        f = rng.choice([lambda: memory(rng, split, 3, 3), lambda: bundle(rng, split, rng.randrange(2, 7)), lambda: follow(rng, split),
                        lambda: retrieval(rng, split, 60, 400), lambda: story_chat(rng, split)])
        m += [x for x in f() if x["role"] != "system"]
    return m


# The phases of training: later ones have longer rows (see train.py). Each is a mixture of
# (maker, share of documents, weight of the answers in tenths).
def _mix(phase):
    k = "abcd".index(phase)
    lens = [("short", "short", "normal"), ("short", "normal", "normal", "long"), ("normal", "long"), ("normal", "long")][k]
    return [
        (lambda r, s: plain(r, s, ((1, 1), (1, 2), (2, 4), (3, 8))[k], lens), (7, 7, 5, 4)[k], 10),
        (lambda r, s: story_chat(r, s), (8, 7, 4, 2)[k], 10),
        (lambda r, s: single(r, s), (24, 16, 10, 8)[k], 20),
        (lambda r, s: bundle(r, s, r.randrange(*((2, 6), (3, 11), (5, 18), (8, 30))[k])), (26, 24, 18, 14)[k], 20),
        (lambda r, s: memory(r, s, (1, 3, 6, 10)[k], (2, 2, 3, 3)[k]), (9, 9, 8, 6)[k], 20),
        (lambda r, s: follow(r, s), (9, 8, 4, 2)[k], 20),
        (lambda r, s: reading(r, s), (4, 4, 3, 2)[k], 20),
        (lambda r, s: retrieval(r, s, *((20, 130), (40, 330), (60, 800), (100, 1500))[k]), (13, 17, 20, 20)[k], 20),
        (lambda r, s: blend(r, s, (1, 2, 3, 6)[k]), (0, 2, 5, 6)[k], 20)]


def document(rng, phase, split="train"):
    mix = _mix(phase)
    make, _, weight = rng.choices(mix, [m[1] for m in mix])[0]
    return make(rng, split), weight


def render(messages, prompt=False):
    """The chat template in Python."""
    if isinstance(messages, str):
        return messages
    s = "".join(f"{IM_START}{m['role']}\n{m['content']}{IM_END}\n" for m in messages)
    return s + (f"{IM_START}assistant\n" if prompt else "")


# --------------------------------------------------------------------------- tokenizer
def train_tokenizer(out, docs=16000, seed=11):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    rng = random.Random(seed)

    def texts():
        for _ in range(docs):
            d, _ = document(rng, "b")
            for m in ([{"content": d}] if isinstance(d, str) else d):
                yield m["content"]
        for r in ("system", "user", "assistant"):
            for _ in range(docs // 4):
                yield r + "\n"

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
                             "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(add_prefix_space=False, use_regex=False, trim_offsets=False)
    specials = [END, IM_START, IM_END]
    tok.train_from_iterator(texts(), trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[AddedToken(s, special=True, normalized=False) for s in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    assert tok.get_vocab_size() == VOCAB
    os.makedirs(out, exist_ok=True)
    tok.save(os.path.join(out, "tokenizer.json"))
    added = {str(tok.token_to_id(s)): dict(content=s, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True) for s in specials}
    conf = dict(add_bos_token=False, add_prefix_space=False, added_tokens_decoder=added, additional_special_tokens=[IM_START, IM_END], bos_token=None,
                chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False, eos_token=IM_END, errors="replace", model_max_length=2048,
                pad_token=END, split_special_tokens=False, tokenizer_class="PreTrainedTokenizerFast", unk_token=None)
    json.dump(conf, open(os.path.join(out, "tokenizer_config.json"), "w"), indent=2, ensure_ascii=False)
    return tok


# --------------------------------------------------------------------------- shards
def write_shard(tok, out, phase, docs, seed, row):
    """Packs whole documents best-fit into rows of `row` tokens; writes ids (uint16) and weights (uint8, tenths)."""
    import numpy as np
    rng = random.Random(seed)
    ass = tok.token_to_id("assistant")
    eot, start, end = (tok.token_to_id(s) for s in (END, IM_START, IM_END))
    all_ids, all_w, skipped = [], [], 0
    while docs > 0:
        n = min(docs, 4000)
        docs -= n
        made = [document(rng, phase) for _ in range(n)]
        for (d, weight), e in zip(made, tok.encode_batch([render(d) + END for d, _ in made])):
            ids = np.array(e.ids, dtype=np.uint16)
            if len(ids) > row:
                skipped += 1
                continue
            if isinstance(d, str):
                w = np.full(len(ids), 10, dtype=np.uint8)
            else:
                w = np.full(len(ids), 1, dtype=np.uint8)
                s = np.flatnonzero(ids[:-1] == start)
                stops = np.flatnonzero(ids == end)
                for i, j in zip(s, stops):
                    if ids[i + 1] == ass:  # short exact answers count more per token
                        w[i + 3:j + 1] = weight if weight == 10 else int(weight * min(2.0, max(1.0, (12 / (j - i - 2)) ** 0.5)))
            all_ids.append(ids)
            all_w.append(w)
    # best fit into open rows
    order = list(range(len(all_ids)))
    rows, open_rows = [], []
    for i in order:
        n = len(all_ids[i])
        best = None
        for k, (free, _) in enumerate(open_rows):
            if free >= n and (best is None or free < open_rows[best][0]):
                best = k
        if best is None:
            open_rows.append([row - n, [i]])
            if len(open_rows) > 64:  # close the fullest
                k = min(range(len(open_rows)), key=lambda k: open_rows[k][0])
                rows.append(open_rows.pop(k)[1])
        else:
            open_rows[best][0] -= n
            open_rows[best][1].append(i)
            if open_rows[best][0] < 24:
                rows.append(open_rows.pop(best)[1])
    rows += [r for _, r in open_rows]
    rng.shuffle(rows)
    X = np.full((len(rows), row), eot, dtype=np.uint16)
    W = np.zeros((len(rows), row), dtype=np.uint8)
    for k, r in enumerate(rows):
        o = 0
        for i in r:
            n = len(all_ids[i])
            X[k, o:o + n], W[k, o:o + n] = all_ids[i], all_w[i]
            o += n
    np.savez(out, ids=X, weights=W)
    return X.size, int((W > 0).sum()), int((W >= 10).sum()), skipped


# --------------------------------------------------------------------------- evaluation split
def eval_items(split, per_kind, seed):
    rng = random.Random(seed)
    makers = {
        "fact": lambda: draw(rng, tasks.fact, split),
        "add": lambda: next(t for t in iter(lambda: draw(rng, tasks.add, split), None) if t["kind"] == "add"),
        "add_steps": lambda: next(t for t in iter(lambda: draw(rng, tasks.add, split), None) if t["kind"] == "add_steps"),
        "sub": lambda: draw(rng, tasks.sub, split),
        "word_problem": lambda: draw(rng, tasks.word_problem, split),
        "sort": lambda: draw(rng, tasks.sort_words, split),
        "sort_numbers": lambda: draw(rng, tasks.sort_numbers, split),
        "reverse": lambda: draw(rng, tasks.reverse, split),
        "pick": lambda: draw(rng, tasks.pick, split),
        "count": lambda: draw(rng, rng.choice((tasks.count_items, tasks.how_long)), split),
        "count_up": lambda: draw(rng, rng.choice((tasks.count_up, tasks.next_number)), split),
        "copy": lambda: draw(rng, tasks.copy, split),
        "replace": lambda: draw(rng, tasks.replace, split),
        "json": lambda: draw(rng, tasks.json_task, split),
        "needle_short": lambda: draw(rng, tasks.retrieval, split, int(30 * 8 ** rng.random())),
        "needle_long": lambda: draw(rng, tasks.retrieval, split, int(300 * (800 / 300) ** rng.random())),
        "reading": lambda: draw(rng, tasks.reading, split),
    }
    items, asked = [], set()
    for kind, make in makers.items():
        for i in range(per_kind):
            t = make()
            while t["user"] in asked:
                t = make()
            asked.add(t["user"])
            items.append(dict(id=f"{kind}-{i:03d}", kind=kind, messages=chat([(t["user"], t["answer"])])[:-1], answer=t["answer"]))
    for kind, make in (("memory", memory), ("follow", follow)):
        i = 0
        while i < per_kind:
            m = make(rng, split)
            if split_of(render(m)) == split and len(render(m)) >= 240:  # short ones could come up in training by chance
                items.append(dict(id=f"{kind}-{i:03d}", kind=kind, messages=m[:-1], answer=m[-1]["content"]))
                i += 1
    i = 0
    while i < per_kind:
        q, text, must, _, _ = story_request(rng, hard=True)
        if split_of("story:" + q) == split:
            items.append(dict(id=f"story-{i:03d}", kind="story", messages=[{"role": "user", "content": q}], must_include=must))
            i += 1
    return items


def eval_text(seed, size):
    rng, out, n = random.Random(seed), [], 0
    while n < size:
        t = plain(rng, "eval")
        out.append(t)
        n += len(t.encode()) + 3
    return "\n\n\n".join(out) + "\n"


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("command", choices=["tokenizer", "shards", "eval", "sample"])
    ap.add_argument("--model", default="data/model")
    ap.add_argument("--out", default="data")
    ap.add_argument("--phase", default="a", choices=["a", "b", "c", "d"])
    ap.add_argument("--docs", type=int, default=20000)
    ap.add_argument("--row", type=int, default=0, help="default: 257, 513, 1025 or 2049 by phase")
    ap.add_argument("--first", type=int, default=0)
    ap.add_argument("--count", type=int, default=1)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--split", default="eval", choices=["eval", "hidden"])
    ap.add_argument("--per-kind", type=int, default=25)
    ap.add_argument("--text-bytes", type=int, default=100_000)
    a = ap.parse_args()
    if a.command == "tokenizer":
        train_tokenizer(a.model)
    elif a.command == "shards":
        from tokenizers import Tokenizer
        tok = Tokenizer.from_file(os.path.join(a.model, "tokenizer.json"))
        os.makedirs(a.out, exist_ok=True)
        for i in range(a.first, a.first + a.count):
            path = os.path.join(a.out, f"{a.phase}-{i:03d}.npz")
            if not os.path.exists(path):
                n = write_shard(tok, path, a.phase, a.docs, f"{a.seed}-{a.phase}-{i}", a.row or ROWS[a.phase])
                print(path, "tokens", n[0], "used", n[1], "learnt", n[2], "documents too long", n[3], flush=True)
    elif a.command == "eval":
        os.makedirs(a.out, exist_ok=True)
        items = eval_items(a.split, a.per_kind, f"{a.split}-items-{a.seed}")
        with open(os.path.join(a.out, "eval.jsonl"), "w") as f:
            for it in items:
                f.write(json.dumps(it, ensure_ascii=False) + "\n")
        if a.text_bytes:
            with open(os.path.join(a.out, "eval.txt"), "w") as f:
                f.write(eval_text(f"{a.split}-text-{a.seed}", a.text_bytes))
    else:
        rng = random.Random(a.seed)
        for _ in range(a.docs if a.docs < 1000 else 20):
            d, _ = document(rng, a.phase)
            print(render(d) + END + "\n" + "-" * 60)


if __name__ == "__main__":
    main()
