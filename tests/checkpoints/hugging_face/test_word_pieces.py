"""Text in a BERT's word pieces."""

import json

import pytest
from hf_folders import PIECES

from fairseq_quant_noise.checkpoints.hugging_face.word_pieces import WordPieces
from fairseq_quant_noise.errors import UserError

WORDS = [*PIECES, "cafe", "café", "Dog", "$", "don", "'", "t", "東", "京", "##t", "-"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("The dogs!", "the dog ##s !"),
        ("unaffable", "un ##aff ##able"),
        ("  a\tdog\u00a0a\u3000dog\n", "a dog a dog"),
        ("CAFÉ cafe\u0301", "cafe cafe"),
        ("a$dog don't a-a", "a $ dog don ' t a - a"),
        ("東京", "東 京"),
        ("d\u200bog\x00 do\ufffdg", "dog dog"),
        ("dogx the", "[UNK] the"),
        ("a" * 101, "[UNK]"),
        ("", ""),
    ],
)
def test_pieces_of_text_in_lower_case(text, pieces):
    assert WordPieces(WORDS).encode(text) == pieces.split()


def test_case_and_accents_are_kept_where_the_network_knows_them(tmp_path):
    assert WordPieces(WORDS, do_lower_case=False).encode("Dog café 東") == ["Dog", "café", "東"]
    assert WordPieces(WORDS, strip_accents=False).encode("CAFÉ") == ["café"]
    assert WordPieces([*WORDS, "東京"], tokenize_chinese_chars=False).encode("東京") == ["東京"]
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    assert WordPieces.of(tmp_path / "vocab.txt").encode("DOG") == ["dog"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "strip_accents": None}))
    assert WordPieces.of(tmp_path / "vocab.txt").encode("Dog") == ["Dog"]


def test_pieces_become_text_again():
    assert WordPieces(WORDS).decode(["un", "##aff", "##able", "dog", "##s", "!"]) == "unaffable dogs !"


def test_a_vocabulary_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone.txt: No such file or directory; give the vocab.txt"):
        WordPieces.of(tmp_path / "gone.txt")
