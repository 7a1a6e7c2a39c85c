"""The tables of the pages are those of the committed lines."""

import pytest
from test_recipes_mnli import ROOT


@pytest.fixture(autouse=True)
def _recipes_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def test_every_table_is_that_of_its_lines():
    from recipes.pages import TABLES, pages, written

    found = pages()
    assert [path.name for path, text in found.items() if written(text) != text] == []
    together = "".join(found.values())
    assert [name for name in TABLES if f"<!-- table: {name} -->" not in together] == []


def test_results_show_claims_of_the_paper_that_are_made():
    from recipes.evidence.claims import CLAIMS
    from recipes.pages import SHOWN

    assert {*SHOWN} <= {claim.claim for claim in CLAIMS}


def test_the_frontier_draws_every_committed_run_beside_the_papers_points():
    from recipes import frontier
    from recipes.pages import DOCS, lines

    found = frontier.marks(DOCS)
    assert len([mark for mark in found["ppl"] if mark.group != frontier.PUBLISHED]) == len(
        {line["run"] for line in lines("codes")}
    )
    seen = [mark for mark in found["accuracy"] if mark.group == frontier.PUBLISHED]
    assert round(seen[1].loss, 1) == 1.2  # iPQ with Quant-Noise: 84.8 to 83.6
    assert round(seen[1].ratio, 1) == 12.6
    assert all(mark.ratio > 1 for marks in found.values() for mark in marks)
    assert frontier.group("budget@best") == frontier.BUDGET
    assert frontier.group("budget@feedback") == frontier.AT_ONCE
    assert b"</svg>" in frontier.picture(found)


def test_a_table_that_was_edited_by_hand_is_made_anew(tmp_path, monkeypatch):
    from recipes import pages

    monkeypatch.setattr(pages, "TABLES", {"some": lambda: "| a |"})
    text = "before\n\n<!-- table: some -->\n\n| wrong |\n\n<!-- end -->\n\nafter\n"
    assert pages.written(text) == text.replace("wrong", "a")
    assert pages.written(text.replace("\n| wrong |\n\n", "")) == text.replace("wrong", "a")
