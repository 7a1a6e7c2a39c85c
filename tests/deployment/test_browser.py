"""The page of examples/browser: its tokenizer is SentencePiece's, and in a browser it completes a text as in torch."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exported import LM, packed_file

from fairseq_quant_noise import load

sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/browser"
CHROMIUM = Path("/usr/bin/chromium")
TEXT = [
    f"Return True if the value {a} of {b}{a} is {b}, or None (see `{a}.{b}()`)." for a in "abcdefgh" for b in "mnopqrst"
]
OTHERS = [
    "Return True if the value is set.",
    "  two  spaces\tand a tab ",
    "re-turned: values, value_s; the_the.a()",
    "é, ﬁ, 漢字 and 🙂 are in no training text",
    "",
    "<s>the</s>",
]


def program():
    """examples/browser/make.py, as a module."""
    spec = importlib.util.spec_from_file_location("make_page", EXAMPLE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of a tokenizer and its dictionary."""
    folder = tmp_path_factory.mktemp("page") / "corpus"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(folder / "spm"), model_type="bpe",
        vocab_size=90, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    pieces = tokenizer(folder)
    words = sorted(pieces.id_to_piece(i) for i in range(3, len(pieces)))
    (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words), encoding="utf-8")
    return folder


def tokenizer(corpus):
    return sentencepiece.SentencePieceProcessor(model_file=str(corpus / "spm.model"))


def node(program, *arguments):
    """What a module for node prints, as JSON; `text.js` is imported as `text`."""
    program = f"import * as text from {json.dumps((EXAMPLE / 'text.js').as_uri())};\n{program}"
    done = subprocess.run(
        ["node", "--input-type=module", "-e", program, "--", *arguments],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return json.loads(done.stdout)


@needs_node
def test_the_tokenizer_splits_a_text_as_sentencepiece_does(corpus):
    pieces, about, texts = tokenizer(corpus), program().pieces(corpus), TEXT + OTHERS
    script = """
        const [about, texts] = process.argv.slice(-2).map((given) => JSON.parse(given));
        const pieces = new text.Pieces(about);
        const of = (given) => [pieces.split(given), pieces.encode(given), pieces.decode(pieces.encode(given))];
        console.log(JSON.stringify(texts.map(of)));
    """
    words, found = about["words"], node(script, json.dumps(about), json.dumps(texts))
    for given, (split, numbers, back) in zip(texts, found, strict=True):
        expected = pieces.encode(given, out_type=str)
        known = [piece in words for piece in expected]
        assert [piece for piece in split if piece in words] == [p for p, k in zip(expected, known, strict=True) if k]
        assert numbers.count(3) == 0 if all(known) else 3 in numbers
        if given in TEXT:
            assert (split, numbers, back) == (expected, [words.index(piece) for piece in expected], given)


@needs_node
def test_a_text_goes_on_with_the_likeliest_words_until_its_end():
    """A word of number 3 or less is never written, but </s>, number 2, ends the text."""
    script = """
        const words = ["<s>", "<pad>", "</s>", "<unk>", "\\u2581a", "b", "c"];
        const pieces = new text.Pieces({ words, ranks: { "\\u2581a": 1 } });
        const seen = [], rows = [[9, 9, 0, 9, 0, 5, 1], [0, 0, 2, 9, 1, 1, 3], [0, 0, 4, 0, 1, 1, 3]];
        const score = async (numbers) => { seen.push([...numbers]); return rows[seen.length - 1]; };
        const texts = [];
        for await (const so_far of text.complete(pieces, "a", 9, score)) texts.push(so_far);
        console.log(JSON.stringify({ seen, texts }));
    """
    found = node(script)
    assert found["texts"] == ["ab", "abc"]
    assert found["seen"] == [[2, 4], [2, 4, 5], [2, 4, 5, 6]]


def test_a_dictionary_of_another_size_than_the_model_s_is_refused(corpus, tmp_path):
    path = packed_file(tmp_path, options=LM)
    done = subprocess.run(
        [sys.executable, EXAMPLE / "make.py", path, "--corpus", corpus, "--out", tmp_path / "page"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --corpus {corpus}: dict.txt has ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "page").exists()


@needs_node
@pytest.mark.skipif(not CHROMIUM.exists(), reason="Chromium is not installed")
@pytest.mark.skipif(
    not (EXAMPLE / "node_modules/playwright-core").is_dir(), reason="no npm install in examples/browser"
)
def test_in_a_browser_the_page_writes_the_words_that_torch_finds_likeliest(corpus, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    words = program().pieces(corpus)["words"]
    path = packed_file(tmp_path, options=LM, words=len(words))
    arguments = [path, "--corpus", corpus, "--out", tmp_path / "page", "--serve", "0"]
    server = subprocess.Popen(
        [sys.executable, EXAMPLE / "make.py", *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        url = server.stdout.readline().strip()
        shown = subprocess.run(
            ["node", EXAMPLE / "screenshot.mjs", url, tmp_path / "page.png"],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
    finally:
        server.terminate()
        server.wait()
    found = json.loads(shown.stdout)
    pieces, network, numbers = tokenizer(corpus), load(path), [2]
    numbers += [words.index(piece) for piece in pieces.encode(found["given"], out_type=str)]
    for _ in range(24):
        with torch.no_grad():
            scores = network(torch.tensor([numbers]))[0, -1]
        scores[[0, 1, 3]] = -torch.inf
        if (best := int(scores.argmax())) == 2:
            break
        numbers.append(best)
    assert found["given"] + found["more"] == pieces.decode([words[number] for number in numbers[1:]])
    assert found["wrong"] == []
    assert (tmp_path / "page.png").stat().st_size > 5_000
