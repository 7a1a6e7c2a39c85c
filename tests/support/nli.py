"""Natural language inference by a small grammar: pairs of sentences whose label follows from how they were made.

A sentence is `QUANTIFIER [ADJECTIVE] NOUN is STATE`. Nouns have a hypernym, states an antonym: nothing is both, some
things are neither. There are several things of each noun and adjective. Every hypothesis comes once with each label, so
that its words alone say nothing about the label.
"""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

LABELS = ("contradiction", "neutral", "entailment")  # in the order of fairseq's MNLI models
KINDS = {
    "animal": ("dog", "cat", "horse", "bird", "mouse"),
    "plant": ("tree", "rose", "fern", "herb", "cactus"),
    "person": ("painter", "farmer", "doctor", "pilot", "child"),
    "vehicle": ("car", "train", "boat", "bike", "truck"),
}
ADJECTIVES = ("red", "blue", "green", "white", "black", "tiny", "local", "old")
_OPPOSITES = (
    *(("hot", "cold"), ("fast", "slow"), ("near", "far"), ("loud", "quiet"), ("clean", "dirty"), ("early", "late")),
    *(("strong", "weak"), ("cheap", "dear"), ("high", "low"), ("safe", "risky"), ("rare", "common"), ("wet", "dry")),
)
ANTONYM = {one: other for pair in _OPPOSITES for one, other in (pair, pair[::-1])}
HYPERNYM = {noun: kind for kind, nouns in KINDS.items() for noun in nouns}
NEGATION = {"every": "not every", "not every": "every", "some": "no", "no": "some"}
WORDS = ("every", "some", "no", "not", "is", *KINDS, *HYPERNYM, *ADJECTIVES, *ANTONYM)

Pair = tuple[str, str, str]  # premise, hypothesis, label


@dataclass(frozen=True)
class Sentence:
    """Says of how many things of a sort (adjective and noun) that they are in a state."""

    quantifier: str
    adjective: str  # or ""
    noun: str
    state: str

    def __str__(self) -> str:
        return " ".join(f"{self.quantifier} {self.adjective} {self.noun} is {self.state}".split())


def sentences() -> list[Sentence]:
    """All of the language."""
    nouns = [*KINDS, *HYPERNYM]
    return [Sentence(q, a, n, s) for q in NEGATION for a in ("", *ADJECTIVES) for n in nouns for s in ANTONYM]


def narrowed(s: Sentence) -> list[Sentence]:
    """The same of fewer things: one detail more, or a hyponym."""
    details = [] if s.adjective else [replace(s, adjective=adjective) for adjective in ADJECTIVES]
    return [*details, *(replace(s, noun=noun) for noun in KINDS.get(s.noun, ()))]


def widened(s: Sentence) -> list[Sentence]:
    """The same of more things."""
    details = [replace(s, adjective="")] if s.adjective else []
    return [*details, *([replace(s, noun=HYPERNYM[s.noun])] if s.noun in HYPERNYM else [])]


def _with(s: Sentence, quantifiers: Iterable[str], state: str) -> list[Sentence]:
    return [replace(s, quantifier=quantifier, state=state) for quantifier in quantifiers]


def reasons(s: Sentence) -> list[list[Sentence]]:
    """What entails `s`, by the rule that says so."""
    by_quantifier = {"some": ["every"], "not every": ["no"]}.get(s.quantifier, [])
    by_antonym = {"no": ["every"], "not every": ["some", "every"]}.get(s.quantifier, [])
    by_sort = widened(s) if s.quantifier in ("every", "no") else narrowed(s)
    return [[s], by_sort, _with(s, by_quantifier, s.state), _with(s, by_antonym, ANTONYM[s.state])]


def denials(s: Sentence) -> list[list[Sentence]]:
    """What contradicts `s`: the reasons of its negation."""
    return reasons(replace(s, quantifier=NEGATION[s.quantifier]))


def weaker(s: Sentence) -> list[list[Sentence]]:
    """What leaves `s` open: what `s` entails without being entailed, and what is said of another state."""
    by_quantifier = {"every": ["some"], "no": ["not every"]}.get(s.quantifier, [])
    by_antonym = {"every": ["no", "not every"], "some": ["not every"]}.get(s.quantifier, [])
    by_sort = narrowed(s) if s.quantifier in ("every", "no") else widened(s)
    other = [replace(s, state=state) for state in ANTONYM if state not in (s.state, ANTONYM[s.state])]
    return [other, by_sort, _with(s, by_quantifier, s.state), _with(s, by_antonym, ANTONYM[s.state])]


def pairs(count: int, seed: int = 1) -> Iterator[tuple[Sentence, Sentence, str]]:
    """`count` triples with a hypothesis of their own each: three premises, one for each label."""
    generator = random.Random(seed)
    for hypothesis in generator.sample(sentences(), count):
        for label, rules in zip(LABELS, (denials, weaker, reasons), strict=True):
            rule = generator.choice([found for found in rules(hypothesis) if found])
            yield generator.choice(rule), hypothesis, label


def nli(train: int, valid: int, seed: int = 1) -> dict[str, list[Pair]]:
    """Pairs of text for training and validation, from so many hypotheses each; none is in both."""
    texts = [(str(premise), str(hypothesis), label) for premise, hypothesis, label in pairs(train + valid, seed)]
    parts = {"train": texts[: 3 * train], "valid": texts[3 * train :]}
    for part in parts.values():
        random.Random(seed).shuffle(part)
    return parts


_TEXT = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
_TEXT += " sentence1 sentence2"
_TSV = {
    "train.tsv": (f"{_TEXT} label1 gold_label", 2),
    "dev_matched.tsv": (f"{_TEXT} label1 label2 label3 label4 label5 gold_label", 6),
    "dev_mismatched.tsv": (f"{_TEXT} label1 label2 label3 label4 label5 gold_label", 6),
}


def write_glue(folder: Path, train: int, valid: int, seed: int = 1) -> None:
    """`folder` as GLUE's MNLI; both development files hold `valid` hypotheses of their own."""
    folder.mkdir(parents=True)
    parts = nli(train, 2 * valid, seed)
    dev = parts["valid"]
    contents = dict(zip(_TSV, (parts["train"], dev[: 3 * valid], dev[3 * valid :]), strict=True))
    for name, (header, labels) in _TSV.items():
        lines = [header.split()]
        for i, (premise, hypothesis, label) in enumerate(contents[name]):
            lines.append([str(i), "n/a", "n/a", "grammar", "", "", "", "", premise, hypothesis, *[label] * labels])
        (folder / name).write_text("".join("\t".join(line) + "\n" for line in lines))


def dictionary(words: Iterable[str]) -> Dictionary:
    """fairseq's, of these words."""
    made = Dictionary()
    for word in words:
        made.add_symbol(word)
    return made


def write_binary(folder: Path, parts: dict[str, list[Pair]]) -> None:
    """The folders input0 (premises), input1 (hypotheses) and label that fairseq's sentence_prediction reads."""
    dictionaries = {"input0": dictionary(WORDS), "input1": dictionary(WORDS), "label": dictionary(LABELS)}
    for column, (part, words) in enumerate(dictionaries.items()):
        (folder / part).mkdir(parents=True)
        words.save(str(folder / part / "dict.txt"))
        for name, texts in parts.items():
            builder = MMapIndexedDatasetBuilder(str(folder / part / f"{name}.bin"), dtype=np.uint16)
            for text in texts:
                line = [words.index(word) for word in text[column].split()]
                builder.add_item(torch.tensor([*line, words.eos()], dtype=torch.int))
            builder.finalize(str(folder / part / f"{name}.idx"))


def write_bpe(folder: Path) -> None:
    """encoder.json, vocab.bpe and dict.txt in the form of GPT-2's: all bytes, and merges that make a word one symbol.

    Only a word after a space becomes one symbol, as every merge goes on from the space.
    """
    folder.mkdir(parents=True)
    space = bytes_to_unicode()[ord(" ")]
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        for end in range(len(word)):
            merges[(space + word[:end], word[end])] = None
    symbols = [*bytes_to_unicode().values(), *map("".join, merges)]
    (folder / "encoder.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    (folder / "dict.txt").write_text("".join(f"{i} {len(symbols) - i}\n" for i in range(len(symbols))))
