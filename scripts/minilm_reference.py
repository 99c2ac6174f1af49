#!/usr/bin/env python3
"""The vectors of transformers for test:minilm: `minilm_reference.py MODEL TEXTS OUT THREADS`.

Writes 200 texts of 1 to 512 tokens in ten languages to TEXTS, a JSON list, and to OUT their vectors as
sentence-transformers defines them for this model (mean of the final states, scaled to unit length, texts cut to
max_seq_length), the tokens of each, and the seconds that all of them took in batches of similar length.
"""

import json
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, AutoTokenizer

NUM_TEXTS, MAX_TOKENS, BATCH = 200, 512, 32

LANGUAGES = [
    "The harbour was quiet when the last ferry left, and nobody noticed the small lamp that was still burning.",
    "Über Nacht hatte es geschneit; die Straßenbahn fuhr nur noch bis zum Marktplatz, und alle gingen zu Fuß weiter.",
    "L'été dernier, nous avons traversé la forêt à vélo jusqu'à un café où l'on servait des gâteaux aux noisettes.",
    "¿Cuántas veces has leído ese libro? El año pasado decías que el final te parecía demasiado triste.",
    "Утром почтальон принёс письмо из далёкого города, но адрес на конверте был написан чужой рукой.",
    "昨天下午我们在图书馆里讨论了新的计划，大家都觉得应该先测试，然后再写报告。",
    "電車が遅れたので、駅の前の喫茶店でコーヒーを飲みながら小説を読みました。",
    "في الصباح الباكر خرج الصياد إلى البحر، وكان الهواء باردا والسماء صافية.",
    "बारिश के बाद बच्चे मैदान में खेलने लगे और उनकी हँसी दूर तक सुनाई दी।",
    "def mean(xs): return sum(xs) / len(xs)  # 42% of $1,000 — naïve, isn't it? 🦊🚀 e-mail: a.b+c@d.example",
]


def texts(tokenizer):
    """Text i is of language i mod 10; the lengths, special tokens included, go evenly from 1 to 512."""
    for i in range(NUM_TEXTS):
        wanted = 1 + i * (MAX_TOKENS - 1) // (NUM_TEXTS - 1)
        sentence = LANGUAGES[i % len(LANGUAGES)]
        spaced = " " in sentence
        words = sentence.split() if spaced else list(sentence)
        text, at = "", i * 7
        # An empty text is two tokens, a word some: the shortest texts are as near as texts come.
        while len(tokenizer(text)["input_ids"]) < wanted:
            text += (" " if text and spaced else "") + words[at % len(words)]
            at += 1 + (at // len(words)) % 2
        yield text


@torch.inference_mode()
def embed(model, tokenizer, texts, limit):
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    vectors, tokens = [None] * len(texts), [0] * len(texts)
    for start in range(0, len(order), BATCH):
        batch = order[start:start + BATCH]
        inputs = tokenizer([texts[i] for i in batch], padding=True, truncation=True, max_length=limit, return_tensors="pt")
        mask = inputs["attention_mask"].unsqueeze(-1)
        states = model(**inputs).last_hidden_state
        means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
        for i, mean, count in zip(batch, means.tolist(), mask.sum((1, 2)).tolist()):
            vectors[i], tokens[i] = mean, count
    return vectors, tokens


def main():
    folder, texts_file, out_file, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    limit = json.loads((Path(folder) / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = MAX_TOKENS * 2
    model = AutoModel.from_pretrained(folder).float().eval()
    inputs = list(texts(tokenizer))
    Path(texts_file).write_text(json.dumps(inputs, ensure_ascii=False))
    embed(model, tokenizer, inputs[:BATCH], limit)
    start = time.perf_counter()
    vectors, tokens = embed(model, tokenizer, inputs, limit)
    seconds = time.perf_counter() - start
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    result = dict(vectors=vectors, tokens=tokens, seconds=seconds, version=version)
    Path(out_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
