"""What README.md and docs/ tell people to type is run, in order, on a tiny model; what cannot be run here is parsed.
The files that the documents name exist.

A block of commands or Python that cannot run offline has a comment above it: `<!-- not run: the reason -->`. Its
options must exist all the same. Recipes take time and data, so of `bash recipes/...` the script is looked at, and so is
a command with `...` in it, whose rest is the reader's.
"""

import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import fairseq.distributed.utils
import fairseq_cli.eval_lm
import fairseq_cli.train
import pytest
import torch
import yaml
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from lm_fixture import ROOT, USER_DIR, forgetful_fairseq
from torch import nn

from fairseq_quant_noise.cli.main import _VERBS, main, make_parser
from fairseq_quant_noise.plan.plan import Plan

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: What people read besides, whose commands take hours or are repeated from the pages.
DOCUMENTS = [
    *PAGES,
    *(ROOT / name for name in ("RESULTS.md", "SECURITY.md", "CONTRIBUTING.md", "benchmarks/README.md")),
]
PACKAGE = ROOT / "fairseq_quant_noise"
HOLD_FILES = ("tests", "scripts", "recipes", "benchmarks")
NOT_OURS = ("scripts/average_checkpoints.py",)  # fairseq's
MARK = re.compile(r"<!-- (?:not run: (.+?)|file: (\S+)) -->")
PROGRAMS = ("fairseq-", "bash ", "python ", "pip ")
PARSERS = {
    "fairseq-train": options.get_training_parser,
    "fairseq-eval-lm": options.get_eval_lm_parser,
    "fairseq-validate": options.get_validation_parser,
    "fairseq-generate": options.get_generation_parser,
    "fairseq-preprocess": options.get_preprocessing_parser,
}
TINY = ["--max-update", "3", "--max-tokens", "400", "--cpu", "--num-workers", "0", "--log-format", "none"]
EVALUATION = ["--gen-subset", "valid", "--tokens-per-sample", "32", "--batch-size", "16", "--sample-break-mode", "none"]


@dataclass(frozen=True)
class Block:
    """A block of code in a page."""

    page: Path
    line: int
    language: str  # python, yaml, text ...; "" for an indented one
    text: str
    reason: str | None  # why it is not run
    file: str | None  # the name under which the reader saves it

    def __str__(self):
        return f"{self.page.name}:{self.line}"

    @property
    def is_shell(self):
        if self.language in ("bash", "sh", "shell"):
            return True
        return not self.language and any(
            re.match(r"([A-Z_]+=\S* )*" + p, self.text) for p in (*PROGRAMS, "[A-Z]+=", "#")
        )


def blocks(page):
    """The fenced and indented blocks of a page, in order."""
    lines, found, mark, i = page.read_text().splitlines(), [], None, 0
    while i < len(lines):
        start, language = i, None
        if lines[i].startswith("```"):
            language, i = lines[i][3:].strip(), i + 1
            while lines[i] != "```":
                i += 1
            text, i = "\n".join(lines[start + 1 : i]), i + 1
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip() or MARK.search(lines[i - 1])):
            language = ""
            while i < len(lines) and (
                lines[i].startswith("    ") or (not lines[i] and "".join(lines[i + 1 : i + 2])[:4] == "    ")
            ):
                i += 1
            text = "\n".join(line[4:] for line in lines[start:i])
        else:
            mark = MARK.search(lines[i]) or (mark if not lines[i].strip() else None)
            i += 1
        if language is not None:
            reason, file = mark.groups() if mark else (None, None)
            found.append(Block(page, start + 1, language, text, reason, file))
            mark = None
    return found


def commands(text, variables=None):
    """The commands of a block as lists of words; variables are filled in, settings before a command left out."""
    variables = {} if variables is None else variables
    found = []
    text = re.sub(r'"[^"]*"', lambda m: m[0].replace("\n", " "), text)  # a value of several lines
    for line in re.sub(r"\\\n", " ", text).replace(" && ", "\n").splitlines():
        line = line.replace("$(fairseq-quant-noise user-dir)", USER_DIR)
        line = re.sub(r"\$([A-Z_]+)", lambda m: variables.get(m[1], m[0]), line)
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if words:
            found.append(words)
    return found


def check_options(words):
    """The verb and the options exist."""
    program, *arguments = words
    flags = [a.partition("=")[0] for a in arguments if a.startswith("--")]
    if program == "fairseq-quant-noise":
        assert arguments, "a verb is missing"
        assert arguments[0] in _VERBS, f"no verb {arguments[0]}"
        known = next(a for a in make_parser()._actions if a.dest == "verb").choices[arguments[0]]._option_string_actions
        if arguments[0] != "bench":  # whose options are the benchmark's own
            assert [f for f in flags if f not in known] == []
    elif program in PARSERS:
        parse(program, [a for a in arguments if a != "..."])
    elif program == "fairseq-hydra-train":
        assert "--config-dir" in arguments
    else:
        assert program in ("bash", "python", "pip", "pytest", "cd", "source"), (
            f"{program}: not a command that this test knows"
        )
        if program == "bash":
            script = ROOT / arguments[0]
            assert script.is_file(), f"{arguments[0]} does not exist"
            assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
            assert [f for f in flags if f not in ("--help",) and f not in script.read_text()] == []


def parse(program, arguments):
    """fairseq's own configuration of a command line; what a shortened one leaves out is filled in."""
    defaults = {"fairseq-train": ["--arch", "quant_noise_transformer_lm_small"], "fairseq-eval-lm": ["--path", "x"]}
    if program == "fairseq-preprocess":
        return PARSERS[program]().parse_args(arguments)
    lacking = [] if {"--arch", "--path"} & {*arguments} else defaults.get(program, [])
    if program != "fairseq-eval-lm" and "--task" not in arguments:
        lacking += ["--task", "language_modeling"]
    if not arguments or arguments[0].startswith("--"):
        lacking = ["DATA", *lacking]
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            return options.parse_args_and_arch(PARSERS[program](), [*lacking, *arguments])
        except SystemExit:
            raise AssertionError(errors.getvalue().strip().splitlines()[-1]) from None


def run(words):
    """One command, in this process."""
    program, *arguments = words
    shortened = "..." in arguments
    if program == "fairseq-quant-noise" and not shortened:
        main(arguments)
    elif program == "fairseq-eval-lm":
        arguments = [a for a in arguments if a != "..."]
        arguments += EVALUATION if shortened or "--gen-subset" not in arguments else []
        cfg = convert_namespace_to_omegaconf(parse(program, [*arguments, "--cpu", "--num-workers", "0"]))
        with forgetful_fairseq():
            assert fairseq_cli.eval_lm.main(cfg)["perplexity"] > 1
    elif program == "fairseq-train" and not shortened:
        cfg = convert_namespace_to_omegaconf(parse(program, [*arguments, *TINY]))
        with forgetful_fairseq():
            fairseq.distributed.utils.call_main(cfg, fairseq_cli.train.main)
    else:
        check_options(words)


def do(words, run_it):
    """Run or check a command; what a program that stops says is the error."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            (run if run_it else check_options)(words)
        except SystemExit:
            raise AssertionError(f"{words[0]}: {errors.getvalue().strip()}") from None


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 32), nn.Flatten(), nn.Linear(32 * 4, 64))


@pytest.fixture(scope="module")
def files(runs, tmp_path_factory):
    """The files that the pages name, of tiny models."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "configs").symlink_to(ROOT / "configs")
    for name in ("DATA", "data-bin"):
        shutil.copytree(runs.lab.data, folder / name)
    made = {
        "dense/checkpoint_best.pt": runs.noised("adaptive").path,
        "dense.pt": runs.lab.train("--decoder-layers", 8, arch="transformer_lm", updates=2).path,
        "ipq/checkpoint_last.pt": runs.ipq("adaptive").path,
        "model.safetensors": runs.packed("plain"),
        **{f"runs/{name}/model.safetensors": runs.packed("plain") for name in ("quickstart", "table1")},
    }
    for name, source in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    return folder


def work_in(folder, page, files):
    """A folder to type the page's commands in; a tutorial makes all but the data itself."""
    if page.name.startswith("tutorial"):
        shutil.copytree(files / "data-bin", folder / "data-bin")
    else:
        shutil.copytree(files, folder, symlinks=True)
    (folder.parent / "configs").symlink_to(ROOT / "configs")
    return folder


def said(block, error):
    return AssertionError(f"{block.page.relative_to(ROOT)}, line {block.line}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_says_to_type_works(page, files, tmp_path, monkeypatch):
    monkeypatch.chdir(work_in(tmp_path / "work", page, files))
    variables, names = {}, {"model": network(), "network": network()}
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(block.text)
        try:
            if block.is_shell:
                for words in commands(block.text, variables):
                    do(words, run_it=not block.reason)
            elif block.language == "python":
                code = compile(block.text, str(block), "exec")
                if not block.reason:
                    with contextlib.redirect_stdout(io.StringIO()):
                        exec(code, names)
            elif block.language in ("yaml", "json"):
                Plan.of(yaml.safe_load(block.text)) if block.language == "yaml" else json.loads(block.text)
        except Exception as error:
            raise said(block, error) from error


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_within_a_line_have_verbs_and_options_that_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for code in re.findall(r"`(fairseq-quant-noise [^`]+)`", text):
        verb = code.split()[1]
        if verb.islower():
            check_options(["fairseq-quant-noise", verb, *re.findall(r"(?<![\w-])--[\w-]+", code)])


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), target
            headings = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE) if anchor else []
            anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert not anchor or anchor in anchors, target


def missing_files(text):
    """The source files named between backticks that are neither in the package nor in the checkout.

    A name without a folder, such as `patches.py`, may be anywhere in them; capitals stand for a name of the reader's.
    """
    places = [PACKAGE, *(ROOT / name for name in HOLD_FILES)]
    return [
        name
        for name in re.findall(
            r"`(?:python |bash )?((?:[\w-]+/)*[a-z_\d-]+\.(?:py|cpp|sh)|configs/[a-z_\d/]+\.yaml)", text
        )
        if not ((PACKAGE / name).exists() or (ROOT / name).exists() or name in NOT_OURS)
        and ("/" in name or not any([*place.rglob(name)] for place in places))
    ]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_that_a_document_names_exists(page):
    assert missing_files(page.read_text()) == []


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/how_it_works.md", "CONTRIBUTING.md"])
def test_every_folder_that_a_page_on_the_code_names_exists(page):
    named = re.findall(r"(?:`|^ +)((?:[a-z_]+/)+)(?:`|  )", (ROOT / page).read_text(), re.MULTILINE)
    assert len(named) >= 3
    assert [name for name in named if not ((PACKAGE / name).is_dir() or (ROOT / name).is_dir())] == []


def test_a_file_that_does_not_exist_is_found():
    text = "`weights/blocks.py`, `weights/gone.py`, `gone.py`, `patches.py`, `python scripts/gone.py --check`"
    assert missing_files(text) == ["weights/gone.py", "gone.py", "scripts/gone.py"]


def test_the_readme_is_short_and_every_page_is_in_the_list_of_pages():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    listed = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs/README.md").read_text())
    assert {page.name for page in PAGES if page.parent.name == "docs"} == {"README.md", *listed}


def test_each_fault_of_fairseq_has_one_row():
    rows = re.findall(r"^\| ([\d, ]+) \|", (ROOT / "docs/upstream.md").read_text(), re.MULTILINE)
    numbers = [int(number) for row in rows for number in row.split(", ")]
    assert len(numbers) > 20
    assert numbers == sorted(set(numbers))


def test_the_architecture_has_the_layers_that_import_linter_checks():
    contract = (ROOT / "pyproject.toml").read_text().partition('containers = ["fairseq_quant_noise"]')[2]
    layers = re.findall(r'"(.+)"', re.search(r"layers = \[(.+?)\n\]", contract, re.DOTALL)[1])
    assert len(layers) > 5
    assert "```text\n" + "\n".join(layers) + "\n```" in (ROOT / "docs/architecture.md").read_text()


def test_a_comment_in_a_configuration_says_something_by_itself():
    """Such as "Nesterov momentum" beside a key, and not "of it"."""
    fragment = re.compile(r"^(?!\s*#).* # (of|from|and|by|at|in|so|to|as|up to|down to)\b.*$", re.MULTILINE)
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(files) > 50
    assert [line[0] for path in files for line in fragment.finditer(path.read_text())] == []


def test_the_pages_have_the_blocks_that_this_test_looks_for():
    """Or a change of style would switch it off."""
    found = [block for page in PAGES for block in blocks(page)]
    assert sum(block.is_shell and block.reason is None for block in found) > 12
    assert sum(block.language == "python" and block.reason is None for block in found) > 3


@pytest.mark.parametrize(
    "command", ["fairseq-train DATA --quant-noize 0.1 ...", "fairseq-quant-noise plan --pth x", "bash recipes/none.sh"]
)
def test_a_command_that_does_not_exist_is_found(command):
    with pytest.raises(AssertionError):
        check_options(command.split())


def test_the_plan_reference_is_what_the_dataclasses_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    reference = importlib.import_module("plan_reference")
    assert reference.PAGE.read_text() == reference.page(), "run: python scripts/plan_reference.py"
