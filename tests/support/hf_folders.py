"""Small Hugging Face folders of RoBERTa, XLM-R and BERT, and what their networks compute, in torch's own operations.

The computation follows the papers and Hugging Face's names of tensors; it shares no code with the package.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fairseq_quant_noise.cli.main import main

SPECIAL = {
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
}
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("#", "#"), ("o", "g")]
PIECES = ["the", "dog", "##s", "##g", "a", "!", "un", "##aff", "##able", "ü"]
SENTENCE_PIECES = ["▁the", "▁dog", "s", "▁", "g"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
POSITIONS = 20


def refusal(capsys, verb: str, source: Path, out: Path) -> str:
    """What a conversion that is refused says: one line, and exit code 2."""
    with pytest.raises(SystemExit, match="2"):
        main([verb, str(source), "--out", str(out)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def tokens(kind: str) -> list[str]:
    """The words of a folder of this kind in their order."""
    if kind == "bert":  # as in bert-base-uncased: [PAD] first, words, the others in the middle, words
        return ["[PAD]", "[unused0]", *PIECES[:4], "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES[4:]]
    first = ["<s>", "<pad>", "</s>", "<unk>"]
    if kind == "xlm-roberta":
        return [*first, *SENTENCE_PIECES, "<mask>"]
    return [*first, "t", "h", "e", "d", "o", "g", "Ġ", "#", *("".join(m) for m in MERGES), "<|endoftext|>", "<mask>"]


def config(kind: str, **changed) -> dict:
    """config.json of a small network."""
    bert = kind == "bert"
    usual = {
        "model_type": kind,
        "vocab_size": len(tokens(kind)),
        **SIZES,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12 if bert else 1e-5,
        "max_position_embeddings": POSITIONS if bert else POSITIONS + 2,
        "type_vocab_size": 2 if bert else 1,
        "pad_token_id": 0 if bert else 1,
    }
    return usual | changed


class Weights(dict):
    """Random tensors by name."""

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        self.dim, self.generator = dim, torch.Generator().manual_seed(seed)

    def add(self, name: str, *shape: int, scale: float = 0.15) -> None:
        self[name] = torch.randn(*shape, generator=self.generator) * scale

    def linear(self, name: str, rows: int, columns: int) -> None:
        self.add(f"{name}.weight", rows, columns)
        self.add(f"{name}.bias", rows)

    def norm(self, name: str) -> None:
        self.add(f"{name}.weight", self.dim)
        self[f"{name}.weight"] += 1
        self.add(f"{name}.bias", self.dim)


def weights(options: dict, head: str | None = None, classes: int = 3, seed: int = 0, tied: bool = True) -> Weights:
    """Random weights under Hugging Face's names; `head` is words, classes or None for the network alone."""
    dim, inner, bert = options["hidden_size"], options["intermediate_size"], options["model_type"] == "bert"
    state = Weights(dim, seed)
    p = "" if head is None else "bert." if bert else "roberta."
    for part, rows in (
        ("word", "vocab_size"),
        ("position", "max_position_embeddings"),
        ("token_type", "type_vocab_size"),
    ):
        state.add(f"{p}embeddings.{part}_embeddings.weight", options[rows], dim, scale=0.02)  # as in a fresh network
    state.norm(f"{p}embeddings.LayerNorm")
    for i in range(options["num_hidden_layers"]):
        layer = f"{p}encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            state.linear(f"{layer}.attention.{part}", dim, dim)
        state.linear(f"{layer}.intermediate.dense", inner, dim)
        state.linear(f"{layer}.output.dense", dim, inner)
        state.norm(f"{layer}.attention.output.LayerNorm")
        state.norm(f"{layer}.output.LayerNorm")
    if bert and head != "words":
        state.linear(f"{p}pooler.dense", dim, dim)
    _add_head(state, options, head, classes, tied)
    return state


def _add_head(state: Weights, options: dict, head: str | None, classes: int, tied: bool) -> None:
    dim, bert = options["hidden_size"], options["model_type"] == "bert"
    if head == "classes" and bert:
        state.linear("classifier", classes, dim)
    elif head == "classes":
        state.linear("classifier.dense", dim, dim)
        state.linear("classifier.out_proj", classes, dim)
    elif head == "words":
        transform = "cls.predictions.transform" if bert else "lm_head"
        output = "cls.predictions" if bert else "lm_head"
        state.linear(f"{transform}.dense", dim, dim)
        state.norm(f"{transform}.{'LayerNorm' if bert else 'layer_norm'}")
        state.add(f"{output}.bias", options["vocab_size"])
        if not tied:
            state.add(f"{output}.decoder.weight", options["vocab_size"], dim)


def logits(state: dict[str, Tensor], options: dict, ids: Tensor) -> Tensor:
    """What the network computes for rows of words (B, T), by its own numbers; without a head, the last layer's output.

    Rows are padded on the right with `pad_token_id`. Every word has token type 0.
    """
    bert, eps, heads = options["model_type"] == "bert", options["layer_norm_eps"], options["num_attention_heads"]
    prefix = next((p for p in ("bert.", "roberta.") if any(name.startswith(p) for name in state)), "")
    act = {"gelu": F.gelu, "relu": F.relu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}[options["hidden_act"]]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return unit * state[f"{name}.weight"] + state[f"{name}.bias"]

    words = ids != options["pad_token_id"]  # (B, T)
    first = 0 if bert else options["pad_token_id"] + 1
    places = (torch.arange(ids.shape[1]) + first).expand_as(ids)
    e = f"{prefix}embeddings"
    x = state[f"{e}.word_embeddings.weight"][ids] + state[f"{e}.position_embeddings.weight"][places]
    x = norm(x + state[f"{e}.token_type_embeddings.weight"][0], f"{e}.LayerNorm")  # (B, T, C)
    for i in range(options["num_hidden_layers"]):
        layer = f"{prefix}encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{layer}.attention.self.{part}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )  # (B, H, T, C/H)
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~words[:, None, None], -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = norm(x + linear(y, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        y = linear(act(linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        x = norm(x + y, f"{layer}.output.LayerNorm")
    output = state[f"{e}.word_embeddings.weight"]
    if "classifier.weight" in state:
        return linear(linear(x[:, 0], "bert.pooler.dense").tanh(), "classifier")
    if "classifier.dense.weight" in state:
        return linear(linear(x[:, 0], "classifier.dense").tanh(), "classifier.out_proj")
    if "lm_head.bias" in state:
        x = norm(F.gelu(linear(x, "lm_head.dense")), "lm_head.layer_norm")
        return x @ state.get("lm_head.decoder.weight", output).T + state["lm_head.bias"]
    if "cls.predictions.bias" in state:
        x = norm(act(linear(x, "cls.predictions.transform.dense")), "cls.predictions.transform.LayerNorm")
        return x @ state.get("cls.predictions.decoder.weight", output).T + state["cls.predictions.bias"]
    return x


def write_tokenizer(folder: Path, kind: str, whole: bool = True) -> None:
    """tokenizer.json, or the files of older versions."""
    ids = {token: i for i, token in enumerate(tokens(kind))}
    special = SPECIAL["bert" if kind == "bert" else "roberta"]
    added = [{"id": ids[token], "content": token, "special": True} for token in special]
    if kind == "bert" and whole:
        model = {"type": "WordPiece", "unk_token": "[UNK]", "vocab": ids}
        normalizer = {"type": "BertNormalizer", "lowercase": True, "strip_accents": None, "handle_chinese_chars": True}
        content = {"added_tokens": added, "normalizer": normalizer, "model": model}
    elif kind == "xlm-roberta" and whole:
        content = {"added_tokens": added, "model": {"type": "Unigram", "vocab": [[token, -1.5] for token in ids]}}
    elif whole:
        content = {"added_tokens": added, "model": {"type": "BPE", "vocab": ids, "merges": [list(m) for m in MERGES]}}
    elif kind == "bert":
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in ids), encoding="utf-8")
    elif kind == "xlm-roberta":
        (folder / "sentencepiece.bpe.model").write_bytes(sentence_piece_model(SENTENCE_PIECES))
    else:
        (folder / "vocab.json").write_text(json.dumps(ids))
        (folder / "merges.txt").write_text(
            "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES), encoding="utf-8"
        )
    if whole:
        (folder / "tokenizer.json").write_text(json.dumps(content))


def sentence_piece_model(pieces: list[str]) -> bytes:
    """A model of SentencePiece with its special pieces and these: field 1 a piece, in it 1 text, 2 score, 3 type."""

    def piece(text: str) -> bytes:
        inner = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15\x00\x00\x80\xbf" + b"\x18\x01"
        return b"\x0a" + bytes([len(inner)]) + inner

    trainer = b"\x12\x02\x18\x07"  # field 2, which is skipped
    return b"".join(map(piece, ["<unk>", "<s>", "</s>", *pieces])) + trainer


def write_folder(
    folder: Path, options: dict, state: dict[str, Tensor], whole: bool = True, dtype=torch.float32
) -> Path:
    """A folder as `save_pretrained` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(options))
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    write_tokenizer(folder, options["model_type"], whole)
    return folder


def rows(kind: str, count: int = 5, length: int = 9) -> Tensor:
    """Rows of words (B, T) by Hugging Face's numbers; from the second on, each ends in padding one word earlier."""
    names = tokens(kind)
    first, last, padding = (
        names.index(t) for t in (("[CLS]", "[SEP]", "[PAD]") if kind == "bert" else ("<s>", "</s>", "<pad>"))
    )
    generator = torch.Generator().manual_seed(3)
    words = [i for i in range(len(names)) if i not in (first, last, padding)]
    ids = torch.tensor(words)[torch.randint(len(words), (count, length), generator=generator)]
    ids[:, 0] = first
    for i in range(count):
        ids[i, length - 1 - i] = last
        ids[i, length - i :] = padding
    return ids


def in_fairseq(kind: str, ids: Tensor, dictionary: Path) -> Tensor:
    """The same rows by the numbers of a fairseq dictionary whose symbols are the words themselves."""
    lines = [line.rpartition(" ")[0] for line in dictionary.read_text(encoding="utf-8").splitlines()]
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"] if kind == "bert" else ["<s>", "<pad>", "</s>", "<unk>"]
    numbers = {word: i for i, word in enumerate([*special, *lines, "[MASK]" if kind == "bert" else "<mask>"])}
    names = tokens(kind)
    return torch.tensor([[numbers[names[i]] for i in row] for row in ids.tolist()])
