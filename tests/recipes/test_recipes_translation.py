"""recipes/translation, on a toy pair of languages in plain text and on files as IWSLT'14 has them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from toys import python

from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.plan.plan import Plan

ROOT = Path(__file__).parents[2]


def split(text):
    return text.split()


GERMAN = split("der ein kleiner grosser Hund Mann Ball sieht nimmt wirft heute gern")
ENGLISH = split("the a small big dog man ball sees takes throws today gladly")


@pytest.fixture(autouse=True)
def _recipes_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def recipe(name, *args, cwd, **env):
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    command = ["bash", str(ROOT / "recipes/translation" / name), *map(str, args)]
    here = {"PATH": path, "HOME": os.environ.get("HOME", "/"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env = {**here, **env}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def sentences(n, seed):
    """n pairs; a translation has the words in their order, with the verb moved to the end."""
    draw = random.Random(seed)
    for _ in range(n):
        words = [draw.randrange(len(GERMAN)) for _ in range(draw.randrange(3, 8))]
        yield " ".join(GERMAN[i] for i in words), " ".join(ENGLISH[i] for i in [*words[1:], words[0]])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Parallel text as a user has it, and a pair of files that do not belong together."""
    folder = tmp_path_factory.mktemp("sources")
    for split, (n, seed) in {"train": (200, 1), "valid": (30, 2), "odd": (30, 3)}.items():
        german, english = zip(*sentences(n, seed), strict=True)
        (folder / f"{split}.de").write_text("\n".join(german) + "\n")
        (folder / f"{split}.en").write_text("\n".join(english[1:] if split == "odd" else english) + "\n")
    with open(folder / "train.de", "a") as de, open(folder / "train.en", "a") as en:
        print("", file=de)
        print("a line without a translation", file=en)
    return folder


PREPARE = ["bin", "--langs", "de", "en", "--words", 60, "--workers", 1, "--train", "train", "--valid", "valid"]
RUN = {"SIZE": "cpu", "UPDATES": "4", "IPQ_UPDATES": "3", "BEAM": "2", "KEEP": "0,2"}


def test_from_the_text_to_the_result_and_again(sources):
    prepared = recipe("prepare.sh", *PREPARE, cwd=sources)
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    assert "train: 200 pairs" in prepared.stdout  # not the one without a translation
    assert {"dict.de.txt", "dict.en.txt", "spm.model"} <= {path.name for path in (sources / "bin").iterdir()}
    plan = sources / "plan.yaml"
    plan.write_text("stages: [{match: '.*layers.*(fc[12]|attn.*)', block_size: 8, n_centroids: 16}]\n")
    settings = {**RUN, "PLAN": str(plan), "FLAGS": "--encoder-embed-dim 32 --encoder-ffn-embed-dim 32"}
    done = recipe("run.sh", "bin", "out", cwd=sources, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((sources / "out/result.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    assert result["split"] == "valid"
    assert {f"bleu_{name}" for name in ("dense", "one_shot", "ipq")} < result.keys()
    assert result["file_bytes"] < result["dense_bytes"]
    again = recipe("run.sh", "bin", "out", cwd=sources, **settings)
    assert again.stdout.count("[skip]") == 8
    assert "[step]" not in again.stdout
    best = recipe("run.sh", "bin", "out", cwd=sources, **settings, METHOD="best")
    assert best.returncode == 0, best.stdout[-2000:] + best.stderr[-2000:]
    assert "iPQ (ipq-best)" in best.stdout
    assert json.loads((sources / "out/ipq-best.json").read_text()).keys() == result.keys()
    assert json.loads((sources / "out/result.json").read_text()) == result
    stages = Checkpoint(sources / "out/ipq-best/checkpoint_last.pt").stages
    assert Plan.of(stages["plan"]).codes.train
    assert Plan.of(stages["plan"]).tuning.joint
    interactive = "from fairseq_cli.interactive import cli_main; cli_main()"
    flags = split("--source-lang de --target-lang en --bpe sentencepiece --sentencepiece-model bin/spm.model --cpu")
    flags += ["--beam", 2, "--path", "out/ipq.safetensors", "--user-dir", ROOT / "fairseq_quant_noise"]
    text = python("-c", interactive, "bin", *flags, input="der Hund sieht\n", cwd=sources)
    assert [line.split("\t")[0] for line in text.stdout.splitlines() if line[:2] in ("S-", "D-")] == ["S-0", "D-0"], (
        text.stderr[-2000:]
    )


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("prepare.sh", [], "no output folder given"),
        ("prepare.sh", ["OUT", "--train", "train"], "needs both --train PREFIX and --valid PREFIX"),
        ("prepare.sh", ["OUT", "--train", "train", "--valid", "nowhere"], "nowhere.de does not exist"),
        ("prepare.sh", ["OUT", "--langs", "de"], "--langs needs two languages"),
        ("prepare.sh", ["OUT", "--langs", "fr", "en"], "--langs fr en: IWSLT'14 here is de and en"),
        ("prepare.sh", ["OUT", "--iwslt", "nowhere"], "--iwslt nowhere is not a folder"),
        ("prepare.sh", ["OUT", "--words", "many"], "--words many is not a positive number"),
        ("run.sh", [], "no data given"),
        ("run.sh", ["nowhere", "OUT"], "nowhere holds no train.*.bin"),
    ],
)
def test_a_mistake_is_one_line(sources, name, arguments, said):
    done = recipe(name, *arguments, cwd=sources)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (sources / "OUT").exists()


@pytest.mark.parametrize(
    ("splits", "words", "said"),
    [
        (["train=odd", "valid=valid"], 60, "odd.de has 30 lines and odd.en 29; give two files whose lines belong"),
        (["train=train", "valid=valid"], 9000, "--words 9000: "),
    ],
)
def test_text_that_is_not_parallel_or_too_small_is_refused(sources, splits, words, said):
    arguments = ["-m", "recipes.translation.pieces", sources / "pieces", "--langs", "de", "en", "--words", words]
    done = python(*arguments, *splits, cwd=sources)
    assert done.returncode == 2
    assert said in done.stderr


def write_iwslt(folder):
    """Seven talks of ten sentences with their headers, and the five small sets."""
    folder.mkdir()
    pairs = list(sentences(70, 4))
    for side, lang in enumerate(("de", "en")):
        lines = []
        for i, pair in enumerate(pairs):
            if i % 10 == 0:
                lines += [f"<url>http://{i}</url>", f"<talkid>{i}</talkid>", "<keywords>a, b</keywords>"]
            lines.append(f"<title>{pair[side]}</title>" if i % 10 == 1 else f" {pair[side]} ")
        lines[3] += " word" * (20 * side)  # too long for its translation
        (folder / f"train.tags.de-en.{lang}").write_text("\n".join(lines) + "\n")
        for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"):
            segments = "".join(f'<seg id="{i}"> {name} {lang} &amp; {i} </seg>\n' for i in (1, 2))
            (folder / f"IWSLT14.{name}.de-en.{lang}.xml").write_text(f"<doc>\n{segments}</doc>\n")
    return pairs


def test_iwslt14_becomes_the_usual_splits(tmp_path):
    from recipes.translation.iwslt14 import BadFolderError, splits

    pairs = write_iwslt(tmp_path / "de-en")
    found = splits(tmp_path / "de-en")
    assert [len(found[split]) for split in ("train", "valid", "test")] == [66, 3, 10]
    assert found["train"][0] == pairs[1]  # a title, and the first one was too long
    assert found["valid"] == [pairs[23], pairs[46], pairs[69]]
    assert found["test"][2] == ("TEDX.dev2012 de & 1", "TEDX.dev2012 en & 1")
    (tmp_path / "de-en/IWSLT14.TED.tst2011.de-en.en.xml").unlink()
    with pytest.raises(BadFolderError, match=r"tst2011.de-en.en.xml does not exist; give the folder de-en"):
        splits(tmp_path / "de-en")
