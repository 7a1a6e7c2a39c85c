"""The program of docs/deployment.md, on a small model of a few words."""

import re
import runpy
from pathlib import Path

import pytest
from exported import LM, WORDS, packed_file

from fairseq_quant_noise.cli.main import main

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")

PAGE = Path(__file__).parents[2] / "docs/deployment.md"


def test_the_program_completes_a_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = [f"Return True if the value {a} is {b}." for a in "abcdefgh" for b in "mnopqrst"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix="spm", vocab_size=50, hard_vocab_limit=False, minloglevel=2
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file="spm.model")
    names = [pieces.id_to_piece(i) for i in range(3, len(pieces))]
    lines = (names + [f"madeupword{i:04}" for i in range(WORDS)])[: WORDS - 4]
    Path("dict.txt").write_text("".join(f"{name} 1\n" for name in lines), encoding="utf-8")
    main(["export-onnx", str(packed_file(tmp_path, options=LM)), "--out", "model.onnx"])
    capsys.readouterr()
    (program,) = re.findall(r"```python\n(.+?)```", PAGE.read_text(), re.DOTALL)
    Path("program.py").write_text(program)
    runpy.run_path("program.py")
    assert capsys.readouterr().out.startswith("Return True if")
