"""recipes/roberta, recipes/mnli and recipes/table3.sh, on the grammar's pairs of sentences and its tiny byte pairs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from nli import write_bpe, write_glue

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _recipes_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def recipe(name, *args, cwd=ROOT, **env):
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    command = ["bash", str(ROOT / "recipes" / name), *map(str, args)]
    env = {"PATH": path, "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1", "BASH_ENV": forks.shell(), **env}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of GLUE's MNLI, one of byte pairs, and one of text, as a user has them."""
    folder = tmp_path_factory.mktemp("sources")
    write_glue(folder / "MNLI", 96, 48)
    write_bpe(folder / "bpe")
    text = folder / "text"
    text.mkdir()
    rows = (folder / "MNLI" / "train.tsv").read_text().splitlines()[1:]
    for split in ("train", "valid"):
        (text / f"wiki.{split}.tokens").write_text(
            " = Title = \n\n" + "".join(f" {r.split(chr(9))[8]} . \n" for r in rows)
        )
    return folder


def test_mnli_from_the_text_to_the_result_and_again(sources, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("stages: [{match: 'encoder.sentence_encoder.layers.*fc[12]', block_size: 8, n_centroids: 16}]\n")
    settings = {"SIZE": "cpu", "UPDATES": "3", "IPQ_UPDATES": "3", "PLAN": str(plan)}
    bpe = ["--bpe", sources / "bpe"]
    steps = [
        ["roberta/prepare.sh", "text-bin", "--local", sources / "text", "--words", 300, *bpe],
        ["roberta/run.sh", "text-bin", "pre"],
        ["mnli/prepare.sh", "mnli-bin", "--local", sources / "MNLI", "--dict", "text-bin/dict.txt", *bpe],
        ["mnli/run.sh", "mnli-bin", "out", "pre/checkpoint_best.pt"],
    ]
    for name, *arguments in steps:
        done = recipe(name, *arguments, cwd=tmp_path, **settings)
        assert done.returncode == 0, name + done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    for kind in ("dense", "one_shot", "ipq"):
        assert set(result[f"accuracy_{kind}"]) == {"valid", "valid1"}
    assert result["file_bytes"] < result["dense_bytes"]
    again = recipe(name, *arguments, cwd=tmp_path, **settings)
    assert again.stdout.count("[skip]") == 7
    assert "[step]" not in again.stdout
    assert json.loads(again.stdout.splitlines()[-1]) == result


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("mnli/prepare.sh", ["OUT", "--local", "nowhere"], "nowhere/train.tsv does not exist"),
        ("mnli/prepare.sh", ["OUT", "--local", "MNLI", "--bpe", "MNLI"], "MNLI/encoder.json does not exist"),
        (
            "mnli/prepare.sh",
            ["OUT", "--local", "MNLI", "--bpe", "bpe", "--dict", "no.txt"],
            "--dict no.txt does not exist",
        ),
        ("mnli/prepare.sh", ["MNLI", "--local", "MNLI"], "MNLI exists and holds something else"),
        ("mnli/run.sh", ["MNLI", "OUT", "model.pt"], "MNLI/input0/dict.txt is missing"),
        ("roberta/prepare.sh", ["OUT"], "no text given"),
        ("roberta/prepare.sh", ["OUT", "--local", "MNLI"], "MNLI holds neither train.txt nor wiki.train.tokens"),
        ("roberta/prepare.sh", ["OUT", "--local", "text", "--words", "few"], "--words few is not a positive number"),
        ("roberta/run.sh", ["MNLI", "OUT"], "MNLI/dict.txt is missing"),
        ("table3.sh", ["OUT", "--glue", "MNLI"], "give OUT_DIR --wikitext DIR --glue DIR"),
    ],
)
def test_a_mistake_is_one_line(sources, name, arguments, said):
    done = recipe(name, *arguments, cwd=sources)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (sources / "OUT").exists()


def test_byte_pairs_are_the_same_from_several_processes(sources, tmp_path, monkeypatch):
    from recipes import gpt2_bpe

    monkeypatch.setattr(gpt2_bpe, "_CHUNK", 50)
    source = sources / "text/wiki.train.tokens"
    outs = [tmp_path / f"{workers}.bpe" for workers in (1, 2)]
    lines = [gpt2_bpe.encode_file(sources / "bpe", source, out, workers) for workers, out in enumerate(outs, 1)]
    assert lines == [len(source.read_text().splitlines())] * 2
    assert lines[0] > 3 * 50
    assert outs[0].read_text() == outs[1].read_text()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("a\tb\n1\t2\n", "has no column sentence1"),
        ("sentence1\tsentence2\tgold_label\nA b.\tC.\n", "line 2: 2 columns instead of 3"),
        ("sentence1\tsentence2\tgold_label\nA b.\tC.\t-\n", "line 2: label '-' is none of"),
    ],
)
def test_a_table_that_is_not_mnli_is_refused(tmp_path, table, said):
    from recipes.mnli.pairs import BadTableError, pairs

    path = tmp_path / "train.tsv"
    path.write_text(table)
    with pytest.raises(BadTableError, match=said):
        pairs(path)


def test_quotes_and_odd_spaces_in_a_table_stay_in_their_cells(tmp_path):
    from recipes.mnli.pairs import pairs

    path = tmp_path / "train.tsv"
    path.write_text(
        'sentence2\tgold_label\tsentence1\r\n"Less\u2028 loud.\tneutral\tHe said "no\r\n', encoding="utf-8", newline=""
    )
    assert [tuple(" ".join(part.split()) for part in row) for row in pairs(path)] == [
        ('He said "no', '"Less loud.', "neutral")
    ]


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("It weighs 0 @.@ 7 – 2 @.@ 2 kg ( 1 @,@ 500 lb ) .", "It weighs 0.7 – 2.2 kg (1,500 lb)."),
        (
            "He said \" no more \" , and it is n't the well @-@ known man 's .",
            "He said \"no more\", and it isn't the well-known man's.",
        ),
    ],
)
def test_wikitext_as_plain_text(tokens, text):
    from recipes.roberta.plain_text import paragraphs, plain

    assert plain(tokens) == text
    article = [" = A = \n", "\n", f" {tokens} \n", " = = Part = = \n", f" {tokens} \n", " = B = \n", f" {tokens} \n"]
    assert list(paragraphs(article)) == [text, text, "", text]
