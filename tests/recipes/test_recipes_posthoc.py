"""recipes/posthoc.sh on tiny networks: from a Hugging Face folder, and from a checkpoint, to the table."""

import json

import pytest
import torch
from hf_folders import config, logits, weights, write_folder
from nli import WORDS, write_glue
from test_recipes_mnli import ROOT, recipe
from vision_fixture import write_images

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.networks.registry import build
from recipes.imagenet import from_timm

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture(autouse=True)
def _recipes_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def bert(folder, words, head=None, **changed):
    """A tiny BERT whose words are these."""
    options = config("bert", vocab_size=len(SPECIAL) + len(words), max_position_embeddings=40, **changed)
    state = weights(options, head)
    write_folder(folder, options, state)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in [*SPECIAL, *words]))
    return options, state


@pytest.mark.slow
def test_from_a_folder_to_the_table_and_again(tmp_path):
    bert(tmp_path / "folder", WORDS)
    write_glue(tmp_path / "data/MNLI", 16, 8)
    arguments = ["folder", "out", "--data", "data", "--task", "mnli"]
    settings = {"SEEDS": "1", "NOISES": "0.1", "UPDATES": "2", "IPQ_UPDATES": "2"}
    settings["METHODS"] = "posthoc@once posthoc@feedback budget@best"
    done = recipe("posthoc.sh", *arguments, cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "out/posthoc.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["dense", "budget@best", "posthoc@feedback", "posthoc@once"]
    assert all(line["score"] in [round(100 * n / 24, 2) for n in range(25)] for line in lines)
    packed = tmp_path / "out/mnli/seed-1/noise-0.1/budget@best.safetensors"
    assert lines[1]["bytes"] == packed.stat().st_size
    assert lines[1]["bytes"] <= lines[3]["bytes"]
    assert len(read(packed).manifest.tensors) > 0
    table = (tmp_path / "out/table.md").read_text().splitlines()
    assert table[0] == "| network | task | noise | method | seeds | score | before | file MiB | ratio | ms a sentence |"
    assert [row.split(" | ")[3] for row in table[2:]] == ["dense", "budget@best", "posthoc@feedback", "posthoc@once"]
    again = recipe("posthoc.sh", *arguments, cwd=tmp_path, **settings)
    assert "[step]" not in again.stdout
    assert again.stdout.endswith("\n".join(table) + "\n")


@pytest.mark.slow
def test_a_checkpoint_is_compressed_as_published(tmp_path):
    """Residues without noise: nothing is fine-tuned before."""
    (tmp_path / "theirs").mkdir()
    bert(tmp_path / "theirs", list(RESIDUES), "words")
    main(["from-hf", str(tmp_path / "theirs"), "--out", str(tmp_path / "published/model.pt")])
    (tmp_path / "published/vocab.txt").unlink()
    (tmp_path / "chains.txt").write_text("\n".join(RESIDUES[i:] + RESIDUES[:i] for i in range(12)))
    arguments = ["published/model.pt", "out", "--data", "chains.txt", "--task", "residues"]
    settings = {"SEEDS": "1", "NOISES": "0", "METHODS": "posthoc_int8@once"}
    done = recipe("posthoc.sh", *arguments, cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "fine-tune" not in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "out/posthoc.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["dense", "posthoc_int8@once"]
    assert (tmp_path / "out/residues/seed-1/noise-0/posthoc_int8@once.safetensors").exists()


@pytest.mark.slow
def test_an_image_network_is_compressed_as_published_by_its_own_answers(tmp_path):
    """Codes are trained with the published network as the teacher, so the labels of training images do not matter."""
    write_images(tmp_path / "data", each=6)
    options = {"num_classes": 3, "width": 0.1, "depth": 0.6, "lite": True}
    torch.save(build("quant_noise_efficientnet", options, 0).state_dict(), tmp_path / "weights.pth")
    arguments = [str(tmp_path / "weights.pth"), *(f"--set={key}={value}" for key, value in options.items())]
    arguments += ["--image-size", "32", "--crop-ratio", "1.0", "--normalization", "inception"]
    from_timm.main([*arguments, "--arch", "quant_noise_efficientnet_lite0", "--out", str(tmp_path / "net.pt")])
    settings = {
        "SEEDS": "1",
        "NOISES": "0",
        "IPQ_UPDATES": "2",
        "METHODS": "efficientnet_lite@feedback efficientnet_lite@once budget@best",
        "ENCODE": "feedback",
    }
    done = recipe("posthoc.sh", "net.pt", "out", "--data", "data", "--task", "images", cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "out/posthoc.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == [
        "dense",
        "budget@best",
        "efficientnet_lite@feedback",
        "efficientnet_lite@once",
    ]
    assert all(line["score"] in [round(100 * n / 18, 2) for n in range(19)] for line in lines)
    assert lines[1]["bytes"] <= lines[3]["bytes"]
    assert "error feedback" in (tmp_path / "out/images/seed-1/noise-0/budget@best.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["minilm"], "give NETWORK OUT"),
        (["minilm", "out"], "give --data DIR, the folder of the data of mnli"),
        (["nowhere", "out"], "there are minilm, sapiens-vh, sapiens-vl"),
        (["data", "out"], "give --task mnli, sst2, stsb, residues or images"),
        (["efficientnet-lite0", "out"], "give --data DIR, a folder with train/CLASS/IMAGE and val/CLASS/IMAGE"),
        (["efficientnet-lite0", "out", "--data", "data"], "data: has no folders train and val of images"),
        (["data", "out", "--task", "cola"], "task cola is none of"),
        (["data", "out", "--task", "residues"], "give --data FILE"),
        (["a", "b", "c"], "c: give NETWORK and OUT alone"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, said):
    (tmp_path / "data").mkdir()
    done = recipe("posthoc.sh", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_tables_of_the_tasks_are_read(tmp_path):
    from recipes.posthoc.texts import BadTableError, rows

    for folder, name, text in (
        ("sst2", "train.tsv", "sentence\tlabel\nit 's good \t1\nbad\t0\n"),
        ("sst2", "dev.tsv", "sentence\tlabel\nso , so\t0\n"),
        ("stsb", "train.csv", '"A man, here.",A man.,2.5\n'),
        ("stsb", "dev.csv", "A cat.,A dog.,0.0\n"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text)
    assert rows("sst2", tmp_path) == {"train": [("it 's good", "1"), ("bad", "0")], "valid": [("so , so", "0")]}
    assert rows("stsb", tmp_path)["train"] == [("A man, here.", "A man.", "0.5000")]
    (tmp_path / "chains.csv").write_text("id,input_seq\n1,ACD\n2,GGG\n3,AAA\n")
    assert rows("residues", tmp_path / "chains.csv") == {"train": [("ACD",), ("GGG",)], "valid": [("AAA",)]}
    (tmp_path / "stsb/dev.csv").write_text("A cat.,A dog.,7\n")
    (tmp_path / "sst2/dev.tsv").write_text("sentence\tlabel\nso\t2\n")
    (tmp_path / "chains.csv").write_text("id,input_seq\n1,A D\n")
    for task, data, said in (
        ("stsb", tmp_path, "is no table of two sentences"),
        ("sst2", tmp_path, "is no table of sentence and label"),
        ("residues", tmp_path / "chains.csv", "holds no chains"),
        ("mnli", tmp_path, "train.tsv: No such file"),
    ):
        with pytest.raises(BadTableError, match=said):
            rows(task, data)


def test_the_scores_are_those_of_the_network(tmp_path):
    """Against the plain computation: accuracy, rank correlation and masked words, in batches with padding."""
    from recipes.posthoc import score

    (tmp_path / "text").mkdir()
    options, state = bert(tmp_path / "folder", list("abcdefgh"), "classes", num_hidden_layers=1)
    main(["from-hf", str(tmp_path / "folder"), "--out", str(tmp_path / "net/model.pt")])
    (tmp_path / "net/label").mkdir(exist_ok=True)
    lines = ["a b c", "d", "e f", "g h a b"]
    for i, texts in enumerate((lines, lines[::-1])):
        (tmp_path / f"text/valid.input{i}").write_text("".join(f"{text}\n" for text in texts))
    network = score.network_of(tmp_path / "net/model.pt")
    words = [*SPECIAL, *"abcdefgh"]
    expected = []
    for one, two in zip(lines, lines[::-1], strict=True):
        row = ["[CLS]", *one.split(), "[SEP]", *two.split(), "[SEP]"]
        expected.append(logits(state, options, torch.tensor([[words.index(word) for word in row]]))[0])
    rows = score.sentences(tmp_path / "text", tmp_path / "net/dict.txt", 2, separator=False)
    torch.testing.assert_close(score.predictions(network, rows), torch.stack(expected), rtol=0, atol=1e-5)
    best = torch.stack(expected).argmax(1).tolist()
    (tmp_path / "text/valid.label").write_text("".join(f"{'xyz'[k]}\n" for k in [*best[:3], (best[3] + 1) % 3]))
    (tmp_path / "labels.txt").write_text("x 1\ny 1\nz 1\n")
    found = score.score(network, "mnli", tmp_path / "text", tmp_path / "net", tmp_path / "labels.txt", separator=False)
    assert found == 75.0
    assert score.sentences(tmp_path / "text", tmp_path / "net/dict.txt", 2, separator=True)[1] == [0, 7, 2, 2, 8, 9, 2]
    assert score.milliseconds(network, [torch.tensor(row) for row in rows]) > 0


def test_the_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    from recipes.posthoc.score import spearman

    one, two = torch.tensor([1.0, 2.0, 2.0, 5.0, -1.0, 0.3]), torch.tensor([0.1, 0.4, 0.3, 0.3, -2.0, 9.0])
    assert spearman(one, two) == pytest.approx(spearmanr(one, two).statistic, abs=1e-12)


def test_masked_words_are_counted_once_in_seven():
    from recipes.posthoc.score import masked_accuracy

    class Knows(torch.nn.Module):
        """Finds every masked word but those after a 9; its mask is 11."""

        def forward(self, tokens):
            guess = torch.where((tokens == 11) & (tokens.roll(1, 1) != 9), 5, 6)
            return torch.nn.functional.one_hot(guess, 12).float()

    rows = [[0, *[5] * 14, 2], [0, 9, *[5] * 13, 2], [0, 5, 2]]
    # row 0 masks places 1 and 8; row 1 places 2 (after the 9, not found) and 9; row 2 place 3, which is not in it
    assert masked_accuracy(Knows(), rows, 11) == 3 / 4
