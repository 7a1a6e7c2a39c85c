"""recipes/evidence.sh without its trainings: its grid fits the network, its verdicts and its page."""

import json
import subprocess

import pytest
from test_recipes_mnli import ROOT, recipe

from fairseq_quant_noise.networks.registry import build
from fairseq_quant_noise.noise import attach_rules
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.quantization.targets import resolve_stages

SMALL = {
    "decoder_layers": 4,
    "decoder_embed_dim": 128,
    "decoder_ffn_embed_dim": 512,
    "decoder_attention_heads": 4,
    "share_decoder_input_output_embed": True,
}


@pytest.fixture(autouse=True)
def _recipes_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def test_every_plan_of_the_grid_quantizes_the_same_weights(tmp_path):
    from recipes.evidence.grid import FILES, write

    write(tmp_path, 900)
    model = build("quant_noise_transformer_lm", SMALL, 500)
    targets = {file: {t.weight.name for t in resolve_stages(Plan.of(FILES[file].plan), model)} for file in FILES}
    assert len(targets["ipq"]) == 4 * 6 + 1
    assert all(names == targets["ipq"] for names in targets.values())
    plans = sorted(tmp_path.glob("*/*.yaml"))
    assert len(plans) > 40
    for path in plans:
        plan = Plan.of(path)
        assert {t.weight.name for t in resolve_stages(plan, model)} in (set(), targets["ipq"])
    attach_rules(model, Plan.of(tmp_path / "proxy-0.05/noise.yaml").noise)
    assert plan.noise or plan.stages
    rising = Plan.of(tmp_path / "proxy-schedule/noise.yaml").noise
    assert {rule.schedule.updates for rule in rising} == {600}
    assert all(rule.schedule is None for rule in Plan.of(tmp_path / "proxy-schedule/ipq.yaml").noise)


def test_the_shell_reads_what_the_grid_writes(tmp_path):
    from recipes.evidence.grid import write

    write(tmp_path, 900)
    say = 'printf "%s|" "$START" "$KEEP" "${FLAGS[@]}" "${FILES[*]}" "${STAGED[*]}"'
    done = subprocess.run(
        ["bash", "-c", f". shared-pruned/settings && {say}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split("|")[:-1] == [
        *("shared", "every-other", "--share-layers", "2", "--decoder-layerdrop", "0.2"),
        *("one-shot ipq ipq-k64 ipq-k16 ipq-shared-weighted", "ipq ipq-k64 ipq-k16 ipq-shared-weighted"),
    ]


def test_every_claim_is_about_runs_that_are_made():
    from recipes.evidence.claims import CLAIMS
    from recipes.evidence.grid import NETWORKS

    made = {f"{name}/{file}" for name, network in NETWORKS.items() for file in (*network.files, "dense")}
    assert {run for claim in CLAIMS for run in (claim.ours, claim.other)} <= made


@pytest.mark.parametrize(
    ("ours", "within", "verdict"),
    [
        ([80, 81, 79], None, "holds"),
        ([120, 121, 119], None, "does not hold"),
        ([80, 130, 95], None, "undecided"),
        ([80, 81], None, "undecided"),
        ([100.5, 101, 100.8], 0.02, "holds"),
        ([99.5, 99, 99.2], 0.02, "holds"),
        ([110, 110.5, 110.2], 0.02, "does not hold"),
        ([89, 90, 89.5], 0.02, "holds"),
        ([101, 104, 99], 0.02, "undecided"),
    ],
)
def test_a_verdict_needs_seeds_that_agree(ours, within, verdict):
    from recipes.evidence.claims import Claim, find

    scores = {("a/ipq", s): float(x) for s, x in enumerate(ours)} | {("b/ipq", s): 100.0 for s in range(5)}
    found = find(Claim("a beats b", "", "a/ipq", "b/ipq", within), scores)
    assert len(found.ours) == len(found.other) == len(ours)
    assert found.verdict == verdict


@pytest.mark.slow
def test_the_page_is_built_again_from_its_lines(tmp_path):
    lines = [
        {"run": f"{network}/{file}", "seed": seed, "ppl": ppl + seed / 10, "bytes": size}
        for seed in (1, 2, 3)
        for network, ppl in (("none", 170.0), ("proxy-0.05", 160.0))
        for file, size in (("ipq", 300_000), ("dense", 5_000_000))
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = recipe("evidence.sh", "--page", cwd=tmp_path, OUT=str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert "has no finished run; run: bash recipes/evidence.sh" in done.stderr
    from recipes.evidence import page

    text = page.text(lines)
    assert "| iPQ: Quant-Noise beats no noise" in text
    assert "| -5.9 ± 0.0 %" in text
    assert "170.2 ± 0.1" in text
    page.draw(lines, tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_the_page_in_docs_is_that_of_its_lines():
    from recipes.evidence import page

    lines = [json.loads(line) for line in (ROOT / "docs/evidence.jsonl").read_text().splitlines()]
    text = page.text(lines)
    assert (ROOT / "docs/evidence.md").read_text() == text + "\n"


def test_a_network_that_is_not_there_is_named(tmp_path):
    done = recipe("evidence.sh", cwd=tmp_path, ONLY="none proxi", OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ONLY names a network 'proxi'; there are: none proxy-0.02")


def test_a_file_that_is_not_there_is_named(tmp_path):
    done = recipe("evidence.sh", cwd=tmp_path, ONLY_FILES="ipq ipq-d5", OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr == "error: ONLY_FILES names a file 'ipq-d5'; --list shows what there is\n"
