"""The programs of docs/deployment.md, on a small model of a few words."""

import re
import runpy
from pathlib import Path

import numpy
import pytest
from exported import LM, WORDS, packed_file, session

from fairseq_quant_noise.cli.main import main

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")

PAGE = Path(__file__).parents[2] / "docs/deployment.md"


def test_the_programs_complete_a_text_and_convert_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = [f"Return True if the value {a} is {b}." for a in "abcdefgh" for b in "mnopqrst"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix="spm", vocab_size=50, hard_vocab_limit=False, minloglevel=2
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file="spm.model")
    names = [pieces.id_to_piece(i) for i in range(3, len(pieces))]
    lines = (names + [f"madeupword{i:04}" for i in range(WORDS)])[: WORDS - 4]
    Path("dict.txt").write_text("".join(f"{name} 1\n" for name in lines), encoding="utf-8")
    path = packed_file(tmp_path, options=LM)
    main(["export-onnx", str(path), "--part", "step", "--out", "step.onnx"])
    capsys.readouterr()
    complete, convert = re.findall(r"```python\n(.+?)```", PAGE.read_text(), re.DOTALL)
    Path("complete.py").write_text(complete)
    names = runpy.run_path("complete.py")
    assert capsys.readouterr().out.startswith("Return True if the")
    words, model, past = names["words"], names["model"], numpy.zeros((2, 2, 1, 4, 0, 8), dtype=numpy.float32)
    tokens = numpy.array([[2, *(words.index(piece) if piece in words else 3 for piece in names["text"][:-1])]])
    in_steps, _ = model.run(None, {"tokens": tokens, "past": past})
    (whole,) = session(path).run(None, {"tokens": tokens})
    assert words[whole[0, -1].argmax()] == names["text"][-1]
    numpy.testing.assert_allclose(in_steps, whole, atol=1e-4)

    Path("convert.py").write_text(convert)
    ready = runpy.run_path("convert.py")["model"].run(None, {"tokens": tokens, "past": past})
    numpy.testing.assert_allclose(ready[0], whole, atol=1e-4)
