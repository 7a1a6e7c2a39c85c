"""Write the tables and pictures of RESULTS.md and docs/ from the committed lines, docs/*.jsonl.

    python -m recipes.pages

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; TABLES makes it. The pictures are frontier.svg
(recipes/frontier.py) and evidence.png, which comes with the whole of evidence.md (recipes/evidence/page.py).
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from recipes.codes.table import table as codes_table
from recipes.evidence.claims import CLAIMS, Claim, Scores, find
from recipes.evidence.page import CLAIM_HEADER, claim_row
from recipes.evidence.page import write as write_evidence
from recipes.frontier import write as write_frontier
from recipes.posthoc.table import table as posthoc_table
from recipes.results import json_lines
from recipes.table1.table import markdown

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?<=<!-- table: )(\w+) -->\n.*?(?=<!-- end -->)", re.DOTALL)
#: What goes beyond the paper: runs of recipes/codes.sh; `dense` is the network before it is quantized.
BEYOND = (
    Claim("x17: codes that train beat iPQ as in the paper", "", "best", "paper"),
    Claim("x17: the same with fixed codes is worse", "", "best", "fixed"),
    Claim("x17: the plan of a budget is better still", "", "budget-best", "best"),
    Claim("x17: with it, no worse than the dense network", "", "budget-best", "dense", 0.0),
    Claim("x25 (K 64): codes that train beat iPQ as in the paper", "", "k64-best", "k64"),
    Claim("x19 (blocks of 16): codes that train beat iPQ as in the paper", "", "d16-best", "d16"),
    Claim("shared and pruned: codes that train beat iPQ as in the paper", "", "pruned-best", "pruned"),
    Claim("Quant-Noise first helps iPQ as in the paper", "", "noise", "paper"),
    Claim("Quant-Noise first helps codes that train", "", "noise-best", "best"),
    Claim("int4: learned scales beat those of the weights", "", "int4-learned", "int4"),
    Claim("int2: learned scales beat those of the weights", "", "int2-learned", "int2"),
)
#: Of the claims in docs/evidence.md, those of the paper that RESULTS.md shows.
SHOWN = (
    "iPQ: Quant-Noise beats no noise",
    "one-shot iPQ: Quant-Noise beats no noise",
    "iPQ, K 64: Quant-Noise beats no noise",
    "iPQ, blocks of 16: Quant-Noise beats no noise",
    "iPQ: Quant-Noise beats QAT",
    "int4: Quant-Noise beats no noise",
    "int4: Quant-Noise beats QAT",
    "int4: a range per channel beats one per tensor",
    "int8 is nearly free (3 %)",
    "iPQ + int8 is as good as iPQ (2 %)",
    "the proxy is as good as exact noise (2 %)",
    "post-hoc noise beats as long a training without",
    "sharing costs at most a tenth",
    "sharing and pruning cost at most a quarter",
)


def lines(name: str) -> list[dict[str, Any]]:
    """The lines of docs/NAME.jsonl."""
    return json_lines(DOCS / f"{name}.jsonl")


def beyond() -> str:
    """BEYOND with its verdicts."""
    scores: dict[tuple[str, int], float] = {}
    for line in lines("codes"):
        scores[line["run"], line["seed"]] = line["ppl"]
        if not line["run"].startswith(("noise", "pruned")):
            scores["dense", line["seed"]] = line["dense_ppl"]
    return verdicts(BEYOND, scores, with_paper=False)


def paper() -> str:
    """The claims SHOWN with their verdicts."""
    scores = {(line["run"], line["seed"]): line["ppl"] for line in lines("evidence")}
    return verdicts([claim for claim in CLAIMS if claim.claim in SHOWN], scores)


def verdicts(claims: Iterable[Claim], scores: Scores, with_paper: bool = True) -> str:
    """A row for each claim that has a run."""
    kept = [i for i in range(len(CLAIM_HEADER)) if with_paper or i != 1]
    rows = [claim_row(found) for claim in claims if (found := find(claim, scores)).ours]
    return "\n".join(markdown([CLAIM_HEADER[i] for i in kept], [[row[i] for i in kept] for row in rows]))


TABLES: dict[str, Callable[[], str]] = {
    "beyond": beyond,
    "paper": paper,
    "codes": lambda: codes_table(lines("codes")),
    "published": lambda: posthoc_table(lines("posthoc")),
}


def written(page: str) -> str:
    """The text of a page with its tables made anew."""
    return BLOCK.sub(lambda found: f"{found[1]} -->\n\n{TABLES[found[1]]()}\n\n", page)


def pages() -> dict[Path, str]:
    """The text of each page that has a table."""
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "RESULTS.md", *sorted(DOCS.glob("*.md")))}
    return {path: text for path, text in texts.items() if BLOCK.search(text)}


def main() -> None:
    """Write the pages that have changed, and the pictures."""
    write_evidence(lines("evidence"), DOCS)
    write_frontier(DOCS)
    for path, text in pages().items():
        if (now := written(text)) != text:
            path.write_text(now, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: written")


if __name__ == "__main__":
    main()
