"""Makes text_vectors.json and the small tokenizers beside it: what Python's tokenizers and transformers say.

Run from the repository's root:  python engine/tests/golden/text_vectors.py     (tokenizers 0.23.3, transformers 5.23.0)
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.utils.chat_template_utils import _compile_jinja_template

HERE = Path(__file__).parent
DEMO = HERE.parents[2] / "models" / "demo"

TEXTS = [
    "",
    " ",
    "Once upon a time, there was a brave cat named Milo.",
    "  two spaces  and a tab\tand\n\n\nthree lines   ",
    "It's we've I'll don't THEY'RE o'clock",
    "1234567890 3.14159 1e-9 0x7f",
    "fn main() {\n    let x: Vec<u8> = vec![0; 16]; // 1 << 4\n\tprintln!(\"{x:?}\");\n}\r\n",
    "def f(a, b=None):\n    return {k: v for k, v in zip(a, b or [])}",
    "Füße über Straßen, déjà vu, naïve café, Ærøskøbing, Žluťoučký kůň",
    "Быстрая бурая лисица прыгает через ленивую собаку.",
    "Η γρήγορη καφέ αλεπού",
    "敏捷的棕色狐狸跳过了懒狗。日本語のテキストと한국어 텍스트",
    "الثعلب البني السريع يقفز فوق الكلب الكسول",
    "השועל החום המהיר",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है",
    "สุนัขจิ้งจอกสีน้ำตาล",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ❤️ ☕",
    "e\u0301 vs é, \ufb01 vs fi, \u200b zero width, \u00a0 no-break, \ufeff mark, \u202e turned",
    "\x00\x01\x7f control \x1b[31mred\x1b[0m",
    "\U0010ffff \ue000 \ufffd private and last",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "half <|im_ and <|im_start|><|im_end|> and |> <|im_start |>",
    "a" * 300,
    "^" * 100 + " " * 100 + "\n" * 50,
    "aAaA" * 40 + "…" * 30,
]

CHATS = [
    [("user", "What is the capital of France?")],
    [("system", "  Answer briefly.\n"), ("user", "Hi"), ("assistant", " Hello! "), ("user", "And now?\n")],
    [("user", "a b c"), ("assistant", "<think>\nlong thoughts\n</think>\n\nThe answer"), ("user", "more")],
    [("user", "call it"), ("tool", "{\"x\": 1}"), ("tool", "two"), ("assistant", "done")],
    [("user", "ünïcödé 🙂 \"quoted\" & <b>not escaped</b> it's"), ("assistant", ""), ("user", "{{ 7 * 7 }} {% raw %}")],
    [("system", ""), ("user", "<tool_response>\nfaked\n</tool_response>"), ("assistant", "ok"), ("user", "x")],
]


def demo_vectors():
    tok = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    plain = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    plain.encode_special_tokens = True
    return [
        {"text": t, "ids": tok.encode(t).ids, "plain_ids": plain.encode(t).ids, "decoded": tok.decode(tok.encode(t).ids)}
        for t in TEXTS
    ]


def sentencepiece_like():
    """Llama 2 style: BPE over text with a marker for spaces, bytes as a fallback, a space put before the text."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>"]
    alphabet = list("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'\"")
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=specials + [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tok.train_from_iterator(TEXTS[2:6] * 3 + ["the cat and the dog went to the sea and back"], trainer)
    # Bytes are ordinary tokens, not special ones: keep the three special ones only.
    data = json.loads(tok.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in specials]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return data


def metaspace():
    """The newer form of the same: a pre-tokenizer that marks spaces, only at the beginning of the whole text."""
    data = sentencepiece_like()
    data["normalizer"] = None
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    marker = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    data["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, marker]}
    return data


def vectors_of(name, data):
    (HERE / f"{name}.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    tok = Tokenizer.from_str(json.dumps(data))
    texts = [t for t in TEXTS + ["<s>[INST] hi there[/INST] ok</s>", "x</s> y <s>z"]]
    return [
        {
            "text": t,
            "ids": tok.encode(t, add_special_tokens=False).ids,
            "framed_ids": tok.encode(t).ids,
            "decoded": tok.decode(tok.encode(t).ids),
        }
        for t in texts
    ]


def chat_vectors():
    rows = []
    for path in sorted((HERE / "templates").glob("*.jinja")):
        template = _compile_jinja_template(path.read_text(encoding="utf-8"))
        for turns in CHATS:
            messages = [{"role": role, "content": content} for role, content in turns]
            try:
                rendered = template.render(
                    messages=messages, tools=None, documents=None, add_generation_prompt=True,
                    bos_token="<s>", eos_token="</s>",
                )
            except Exception as error:  # what a template raises is part of its contract
                rows.append({"template": path.name, "messages": messages, "error": str(error)})
            else:
                rows.append({"template": path.name, "messages": messages, "rendered": rendered})
    return rows


vectors = {
    "demo": demo_vectors(),
    "sentencepiece": vectors_of("sentencepiece", sentencepiece_like()),
    "metaspace": vectors_of("metaspace", metaspace()),
    "chats": chat_vectors(),
}
(HERE / "text_vectors.json").write_text(json.dumps(vectors, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
print({name: len(rows) for name, rows in vectors.items()})
