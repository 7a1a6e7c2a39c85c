"""What users of fairseq reported, as commands: each is run, and its exit code and its output are what they must be.

    python tests/scripts/reported.py                          all rows, minutes on one core
    python tests/scripts/reported.py --only fp16_cpu          one case
    python tests/scripts/reported.py --markdown               and the table goes to docs/upstream.md

The rows are in reported_rows.py. Data and models are of seconds. Exit code 1 where a row is not as it must be.
"""

import argparse
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

import forks  # noqa: E402
import yaml  # noqa: E402
from lm_fixture import PLANS, USER_DIR, Lab, split  # noqa: E402
from reported_rows import PROGRAMS, ROWS, Row  # noqa: E402
from roberta_fixture import SENTENCES, RobertaLab  # noqa: E402
from translation_fixture import PLAN, SHARED, TranslationLab  # noqa: E402

PAGE = ROOT / "docs/upstream.md"
BEGIN, END = "<!-- reported.py -->\n", "<!-- end of reported.py -->\n"
LONGEST = 200  # letters of a last line
LIMIT = 300  # seconds of a command
STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \S+ \| \w+ \| \S+ \| |\w+:[\w.]+:)")  # of fairseq's log
HEADER = "| case | command | exit | last line | as it must be |\n|---|---|---|---|---|\n"


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    row: Row
    exit: int
    output: str

    @property
    def last_line(self) -> str:
        """Of its output, without the time and the logger's name."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        return STAMP.sub("", lines[-1]).strip() if lines else ""

    @property
    def shown(self) -> str:
        """The last line, cut, and without the seconds that differ from run to run."""
        line = re.sub(r"\d+\.\d+ seconds", "… seconds", self.last_line)
        return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"

    @property
    def right(self) -> bool:
        """Whether it is as the row says."""
        exits = (self.row.exits,) if isinstance(self.row.exits, int) else self.row.exits
        if self.exit not in exits or re.search(self.row.never, self.output, re.MULTILINE):
            return False
        return bool(re.search(self.row.says, self.output, re.MULTILINE))

    @property
    def verdict(self) -> str:
        """The last column of the table."""
        return "yes" if self.right else "**no**"


class Bench:
    """A folder with data for every row, in which the commands run; a command runs once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, {}
        data = folder / "data"
        lm, mt, sentences = Lab(data / "lm"), TranslationLab(data / "mt"), RobertaLab(data / "sentences")
        more_words = shutil.copytree(lm.data, data / "more_words")
        with open(more_words / "dict.txt", "a") as dictionary:
            dictionary.write("another 1\n")
        texts = split(
            "--task language_modeling --sample-break-mode eos --gen-subset valid --batch-size 8 --cpu",
            "--beam 1 --max-len-b 12",
        )
        plugin = ["--user-dir", USER_DIR]
        #: What a word of a command stands for, with what is behind it.
        self.words: dict[str, Callable[..., list[str]]] = {
            "LM": lm.arguments,
            "MORE_WORDS": lambda *rest: [str(more_words), *lm.arguments(*rest)[1:]],
            "MT": mt.arguments,
            "SENTENCES": lambda *rest: sentences.arguments(*rest, kind=SENTENCES),
            "EVAL": lambda *rest: [*lm.eval_arguments("later"), *plugin, *rest],
            "GENERATE": lambda *rest: [*mt.generate_arguments("later"), *plugin, *rest],
            "TEXTS": lambda *rest: [str(lm.data), *texts, *plugin, *rest],
            "LM_DATA": lambda *rest: [str(lm.data), *rest],
            "MT_DATA": lambda *rest: [str(data / "mt" / SHARED), *rest],
        }
        (folder / "lm.yaml").write_text(yaml.safe_dump(PLANS["plain"]))
        (folder / "mt.yaml").write_text(yaml.safe_dump(PLAN))
        (folder / "two.txt").write_text("w1 w2 w3\nw4 w5\n")
        for name, text in PROGRAMS.items():
            (folder / f"{name}.py").write_text(text)

    def run(self, row: Row) -> Outcome:
        """Run the row's command, or say what it came to before."""
        if row.command not in self.done:
            self.done[row.command] = self._run(row.command)
        code, output = self.done[row.command]
        return Outcome(row, code, output.replace(str(self.folder) + "/", "").replace(str(ROOT) + "/", ""))

    def _run(self, command: str) -> tuple[int, str]:
        processes = 2 if command.startswith("2 x ") else 1
        words = self._expanded(shlex.split(command.removeprefix("2 x ").replace("PORT", str(_free_port()))))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        started = []
        for rank in range(processes):
            line = forks.command(*(str(rank) if word == "RANK" else word for word in words))
            with open(self.folder / f"output{rank}.txt", "w") as output:
                started.append(subprocess.Popen(line, stdout=output, stderr=output, cwd=self.folder, env=environment))
        codes = [_code_of(process) for process in started]
        outputs = [
            (self.folder / f"output{rank}.txt").read_text(errors="replace") for rank in reversed(range(processes))
        ]
        return max(codes), "\n".join(outputs)

    def _expanded(self, words: list[str]) -> list[str]:
        """A command's words with those that stand for others replaced by them."""
        for i in reversed(range(1, len(words))):
            if words[i] in self.words:
                words[i:] = self.words[words[i]](*words[i + 1 :])
        if words[0] == "python":
            words[1] += ".py"
        return words


def _code_of(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a program; one that takes too long is killed."""
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return forks.KILLED


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """A row for each command, in Markdown."""
    lines = [
        f"| {case} | `{cell(one.row.command)}` | {one.exit} | {cell(one.shown)} | {one.verdict} |\n"
        for case, ones in outcomes.items()
        for one in ones
    ]
    return HEADER + "".join(lines)


def cell(text: str) -> str:
    """A text for one cell of a table."""
    return text.replace("|", "\\|")


def paste(text: str) -> None:
    """Put the table in its place in the page."""
    page = PAGE.read_text()
    before, after = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(page[:before] + text + page[after:])


def main() -> int:
    """Run the rows; print each as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ROWS, metavar="CASE", help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--markdown", action="store_true", help="write the table into docs/upstream.md")
    options = parser.parse_args()
    if options.only and options.markdown:
        parser.error("the table has all rows: leave out --only or --markdown")
    outcomes: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        for case in [options.only] if options.only else ROWS:
            outcomes[case] = []
            for row in ROWS[case]:
                outcomes[case].append(one := bench.run(row))
                print(f"{case}: {row.command}\n    exit {one.exit}, right: {one.verdict}: {one.last_line}", flush=True)
                if options.only and not one.right:
                    print(one.output)
    if options.markdown:
        paste(table(outcomes))
    wrong = sum(not one.right for ones in outcomes.values() for one in ones)
    print(f"{sum(map(len, outcomes.values()))} rows, {wrong} of them not as they must be")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
