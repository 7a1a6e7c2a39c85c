"""The words of a Hugging Face folder in fairseq's order, and the files that turn text into them."""

import json

import pytest
from hf_folders import (
    MERGES,
    SENTENCE_PIECES,
    config,
    sentence_piece_model,
    tokens,
    weights,
    write_folder,
    write_tokenizer,
)

from fairseq_quant_noise.checkpoints.hugging_face.byte_pairs import byte_letters, numbers_of
from fairseq_quant_noise.checkpoints.hugging_face.sentence_pieces import read_pieces
from fairseq_quant_noise.checkpoints.hugging_face.vocabulary import read_vocabulary
from fairseq_quant_noise.errors import DamagedFileError, UserError


def lines(vocabulary):
    return vocabulary.files["dict.txt"].decode().splitlines()


def test_a_berts_special_tokens_come_where_fairseq_has_its_own(tmp_path):
    write_tokenizer(tmp_path, "bert")
    names = tokens("bert")
    found = read_vocabulary(tmp_path, "bert", len(names) + 1)  # the embedding has a row that no token uses
    assert [names[i] for i in found.order[:4]] == ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
    assert names[found.order[-1]] == "[MASK]"
    rest = [i for i, name in enumerate(names) if name not in ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")]
    assert found.order[4:-1] == [*rest, len(names)]
    assert lines(found) == [*(f"{names[i]} 1" for i in rest), f"madeupword{len(names) - 1:04d} 1"]
    assert found.files["vocab.txt"].decode().splitlines()[:4] == ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
    settings = json.loads(found.files["tokenizer_config.json"])
    assert (settings["do_lower_case"], settings["mask_token"]) == (True, "[MASK]")


@pytest.mark.parametrize("whole", [True, False])
def test_symbols_of_byte_pairs_are_the_numbers_of_gpt2(tmp_path, whole):
    write_tokenizer(tmp_path, "roberta", whole)
    found = read_vocabulary(tmp_path, "roberta", len(tokens("roberta")))
    assert found.order == [*range(len(tokens("roberta")))]
    numbers = json.loads(found.files["encoder.json"])
    letters = ["t", "h", "e", "d", "o", "g", "Ġ", "#"]
    assert lines(found) == [f"{numbers[x]} 1" for x in (*letters, *map("".join, MERGES), "<|endoftext|>")]
    assert [numbers["".join(pair)] for pair in MERGES] == [256, 257, 258, 259, 260]
    assert numbers["<|endoftext|>"] == 256 + len(MERGES)
    assert found.files["vocab.bpe"].decode() == "#version: 0.2\nĠ t\nh e\nĠt he\n# #\no g\n"


def test_the_bytes_have_gpt2s_numbers():
    """As in the published encoder.json: ! is 0, A 32, ¡ 94, the byte 0 188, a space 220."""
    letters = byte_letters()
    assert len({*letters}) == 256
    assert [letters.index(x) for x in "!A¡ÿĀĠ"] == [0, 32, 94, 187, 188, 220]
    assert numbers_of([]) == {**{x: i for i, x in enumerate(letters)}, "<|endoftext|>": 256}


def test_sentence_pieces_come_from_either_file(tmp_path):
    (tmp_path / "old").mkdir()
    write_tokenizer(tmp_path, "xlm-roberta")
    write_tokenizer(tmp_path / "old", "xlm-roberta", whole=False)
    rows = len(tokens("xlm-roberta"))
    new, old = (read_vocabulary(place, "xlm-roberta", rows) for place in (tmp_path, tmp_path / "old"))
    assert lines(new) == lines(old) == [f"{piece} 1" for piece in SENTENCE_PIECES]
    assert new.files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()
    assert old.files["sentencepiece.bpe.model"] == (tmp_path / "old/sentencepiece.bpe.model").read_bytes()


def test_a_model_of_sentencepiece_is_read_without_its_library(tmp_path):
    import sentencepiece

    text, model = tmp_path / "text", tmp_path / "pieces.model"
    text.write_text("the dog sees a cat\nthe cats see two dogs\n" * 20)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(text), model_prefix=str(tmp_path / "pieces"), vocab_size=18, minloglevel=2
    )
    expected = sentencepiece.SentencePieceProcessor(str(model))
    assert read_pieces(model) == [expected.IdToPiece(i) for i in range(expected.GetPieceSize())]
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match="no whole model of SentencePiece"):
        read_pieces(model)


@pytest.mark.parametrize("content", [b"", b"\x0a\x05abc", b"\xff\xff", b"\x0b\x00", b"\x0a\x04\x0a\x02\xff\xff"])
def test_a_damaged_model_of_sentencepiece_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DamagedFileError, match="no whole model of SentencePiece"):
        read_pieces(tmp_path / "x")


def test_every_line_of_the_dictionary_can_be_read(tmp_path):
    """A piece that holds a space, or is one of fairseq's own words, gives its row another name."""
    pieces = ["▁a", "a b", "<s>", "madeupword0005", "", "ü"]
    (tmp_path / "sentencepiece.bpe.model").write_bytes(sentence_piece_model(pieces[:2] + pieces[3:4] + pieces[5:]))
    found = read_vocabulary(tmp_path, "xlm-roberta", 9)
    assert lines(found) == ["▁a 1", "madeupword0005 1", "madeupword0006 1", "ü 1"]
    vocab = [[piece, 0.0] for piece in ("<s>", "<pad>", "</s>", "<unk>", "▁a", "", "\u3000", "<mask>")]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": vocab}}))
    assert lines(read_vocabulary(tmp_path, "xlm-roberta", 8)) == ["▁a 1", "madeupword0005 1", "madeupword0006 1"]


def test_special_tokens_of_other_names_are_found(tmp_path):
    write_tokenizer(tmp_path, "bert")
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("[CLS]", "<start>").replace("[MASK]", "<hide>"))
    with pytest.raises(UserError, match=r"no cls_token '\[CLS\]'"):
        read_vocabulary(tmp_path, "bert", 16)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"cls_token": "<start>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "<hide>"}}))
    found = read_vocabulary(tmp_path, "bert", 16)
    assert (found.order[0], found.order[-1]) == (tokens("bert").index("[CLS]"), tokens("bert").index("[MASK]"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": "<start>"}))
    with pytest.raises(UserError, match="two of the special tokens"):
        read_vocabulary(tmp_path, "bert", 16)


def test_a_roberta_without_a_tokenizer_has_numbers_for_words(tmp_path):
    options = config("roberta")
    folder = write_folder(tmp_path / "folder", options, weights(options))
    (folder / "tokenizer.json").unlink()
    found = read_vocabulary(folder, "roberta", 7)
    assert lines(found) == ["4 1", "5 1"]
    assert found.order == [*range(7)]
    assert found.notes == ["no tokenizer: the words in dict.txt are numbers"]


def test_byte_pairs_without_their_merges_are_refused(tmp_path):
    write_tokenizer(tmp_path, "roberta", whole=False)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match="vocab.json without merges.txt"):
        read_vocabulary(tmp_path, "roberta", 30)
