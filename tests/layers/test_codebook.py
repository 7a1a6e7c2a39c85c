"""One codebook for several weights: found, trained, stored and loaded once."""

import copy

import pytest
import torch
from lm_fixture import ATTENTION, FFN, WORD_VECTORS, same, split, state_of
from stacks import net
from toys import adopting, quiet, refuses, weight_of, zoo

from fairseq_quant_noise import load, quantize_, save, share_layers_
from fairseq_quant_noise.artifact import pack, read
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.layers import quantized_weights
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.pq.kmeans import kmeans
from fairseq_quant_noise.quantization.encoding import _by_codebook
from fairseq_quant_noise.quantization.table import make_table, model_bytes
from fairseq_quant_noise.quantization.targets import resolve_stages


def linears(n=3, width=16):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(n)))


def shared(**more):
    return {"stages": [{"match": ".*", "block_size": 4, "n_centroids": 16, "codebook": "shared", **more}]}


def quantized(plan=None, model=None):
    return quantize_(model or linears(), plan or shared(), progress=quiet)


def weights(model):
    return list(quantized_weights(model).values())


def test_the_weights_of_a_stage_hold_one_codebook_the_k_means_of_all_their_blocks():
    model = linears()
    blocks = torch.cat([layer.weight.detach().view(-1, 4) for layer in model])
    found = kmeans(blocks, 16)
    first, *others = weights(quantized(model=model))
    assert all(other.centroids is first.centroids for other in others)
    assert torch.equal(first.centroids, found.centroids)
    assert torch.equal(torch.cat([weight.codes.flatten() for weight in weights(model)]), found.codes)
    assert len(list(model.parameters())) == 1
    assert first.users == tuple(weights(model))


def test_of_other_block_sizes_or_stages_it_is_another_one():
    plan = {
        "stages": [
            {"match": "0|1", "block_size": {"0": 4, "default": 8}, "n_centroids": 8, "codebook": "shared"},
            {"match": "2|3", "block_size": 4, "n_centroids": 8, "codebook": "shared"},
        ]
    }
    a, b, c, d = weights(quantized(plan, linears(4)))
    assert c.centroids is d.centroids
    assert len({id(weight.centroids) for weight in (a, b, c)}) == 3
    assert [weight.codebook_number for weight in (a, b, c, d)] == [None, None, 2, 2]


def test_few_blocks_make_few_centroids_and_those_of_all_weights_count():
    model = linears()  # 64 blocks each
    (own,) = {t.n_centroids for t in resolve_stages(Plan.of(shared(n_centroids=256, codebook="own")), model)}
    (together,) = {t.n_centroids for t in resolve_stages(Plan.of(shared(n_centroids=256)), model)}
    assert (own, together) == (16, 32)


def test_the_table_counts_its_bytes_once_and_so_do_model_and_file(tmp_path):
    model = linears()
    table = make_table(model, resolve_stages(Plan.of(shared()), model))
    codes, centroids = 64 * 4 / 8, 16 * 4 * 2
    assert [row.bytes for row in table.rows] == [codes + centroids, codes, codes]
    quantized(model=model)
    assert model_bytes(model)[0] == table.paper_bytes == 3 * codes + centroids
    assert sum(entry.paper_bytes for entry in pack(model).manifest.tensors.values()) == table.paper_bytes


def test_the_gradient_of_a_centroid_is_of_its_blocks_in_all_weights():
    model = quantized().train()
    towards = [torch.randn(16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    sum((weight.decode() * t).sum() for weight, t in zip(weights(model), towards, strict=True)).backward()
    codes = torch.cat([weight.codes.flatten() for weight in weights(model)]).long()
    gradients = torch.cat([t.view(-1, 4) for t in towards])
    expected = torch.stack([gradients[codes == k].sum(0) / (codes == k).sum().sqrt() for k in range(16)])
    torch.testing.assert_close(weights(model)[0].centroids.grad, expected)


def test_a_gradient_after_new_codes_counts_those():
    model = quantized().train()
    weights(model)[0].decode().sum().backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["1.weight.codes"].zero_()
    model.load_state_dict(state)
    model.zero_grad()
    sum(weight.decode().sum() for weight in weights(model)).backward()
    counts = torch.cat([weight.codes.flatten() for weight in weights(model)]).long().bincount(minlength=16)
    torch.testing.assert_close(weights(model)[0].centroids.grad, counts.sqrt().unsqueeze(1).expand(16, 4))


@pytest.mark.parametrize("change", [copy.deepcopy, torch.nn.Module.half, torch.nn.Module.double])
def test_it_stays_one(change):
    first, *others = weights(change(quantized()))
    assert all(other.centroids is first.centroids for other in others)
    assert all(user is weight for user, weight in zip(first.users, (first, *others), strict=True))


def test_a_state_says_that_it_is_shared_even_where_each_copy_has_memory_of_its_own():
    """As fairseq saves a model that is on a GPU."""
    model = quantized()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, *others = weights(adopting(linears(), state))
    assert all(other.centroids is first.centroids for other in others)
    assert same(state, dict(adopting(linears(), state).state_dict()))


def test_a_state_in_which_it_cannot_be_is_refused():
    state = {name: tensor.clone() for name, tensor in quantized().state_dict().items()}
    state |= {"1.weight.centroids": torch.zeros(8, 8), "1.weight.codes": torch.zeros(16, 2, dtype=torch.uint8)}
    with refuses("^codebook 0: weights with other blocks or centroids share it; the state is damaged"):
        adopting(linears(), state)


# The file.


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_file_has_it_once_and_a_loaded_network_too(tmp_path, dtype):
    plan = shared() | {"centroids": {"dtype": dtype}}
    model = quantized(plan).eval()
    n_bytes = save(model, tmp_path / "shared.safetensors", plan)
    packed = read(tmp_path / "shared.safetensors")
    assert [name for name in packed.tensors if "centroids" in name] == ["0.weight.centroids"]
    assert [entry.codebook for entry in packed.manifest.tensors.values()] == [None, "0.weight", "0.weight"]
    loaded = load(tmp_path / "shared.safetensors", into=linears())
    first, *others = weights(loaded)
    assert all(other.centroids is first.centroids for other in others)
    with torch.no_grad():
        for one, other in zip(model, loaded, strict=True):
            assert torch.equal(weight_of(one), weight_of(other))
    assert save(loaded, tmp_path / "again.safetensors", plan) == n_bytes
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "shared.safetensors").read_bytes()


def test_a_file_without_shared_codebooks_is_of_the_version_before(tmp_path):
    for codebook, version in (("own", 3), ("shared", 4)):
        assert pack(quantized(shared(codebook=codebook))).manifest.format_version == version


@pytest.mark.parametrize(
    ("codebook", "message"),
    [
        ("3.weight", "tensor 1.weight: damaged .its codebook '3.weight' is not in the file"),
        ("1.weight", "tensor 1.weight: damaged .its codebook '1.weight' is not in the file"),
        ("2.weight", "tensor 1.weight: damaged .its codebook '2.weight' is not in the file"),
        (7, "its manifest is damaged"),
        ("", "its manifest is damaged .a tensor entry .*codebook=''"),
    ],
)
def test_a_codebook_that_leads_nowhere_is_refused(tmp_path, codebook, message):
    from packed_files import damaged, forge

    path = tmp_path / "model.safetensors"
    forge(path, pack(quantized()), lambda m: m["tensors"]["1.weight"].update(codebook=codebook))
    with damaged(message):
        read(path)


def test_a_codebook_of_other_blocks_is_refused(tmp_path):
    from packed_files import damaged, forge

    plan = {"stages": [{"match": str(i), "block_size": 4 * (i or 1), "n_centroids": 8} for i in range(3)]}
    path = tmp_path / "model.safetensors"

    def edit(manifest):
        manifest["tensors"]["2.weight"]["codebook"] = "0.weight"
        manifest["format_version"] = 4

    forge(path, pack(quantized(plan)), edit)
    with damaged("tensor 2.weight: damaged .its codebook '0.weight' has other centroids"):
        read(path)


def test_layers_that_share_their_weights_and_their_codebook(tmp_path):
    model = share_layers_(net(), 2)
    plan = {"stages": [{"match": r"layers\.\d+\.fc", "block_size": 4, "n_centroids": 8, "codebook": "shared"}]}
    quantize_(model, plan, progress=quiet).eval()
    assert len({id(weight.centroids) for weight in weights(model)}) == 1
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", into=net())
    with torch.no_grad():
        assert all(torch.equal(a.fc.weight, b.fc.weight) for a, b in zip(model.layers, loaded.layers, strict=True))


def test_tied_weights_use_it_too(tmp_path):
    model = quantize_(zoo(), shared(match="fc|emb", block_size=4, n_centroids=8), progress=quiet).eval()
    found = quantized_weights(model)
    assert found["fc"].centroids is found["emb"].centroids
    save(model, tmp_path / "model.safetensors")
    assert same(
        dict(load(tmp_path / "model.safetensors", into=zoo()).state_dict()).keys(), dict(model.state_dict()).keys()
    )


def test_one_process_encodes_all_that_share_one():
    model = linears(4)
    plan = Plan.of({"stages": [shared(match="0|2")["stages"][0], {"match": "1|3", "block_size": 4, "n_centroids": 4}]})
    targets = sorted(resolve_stages(plan, model), key=lambda target: target.stage)
    assert [[targets[i].weight.name for i in of] for of in _by_codebook(targets)] == [["0", "2"], ["1"], ["3"]]


def test_an_unknown_codebook_is_refused():
    with refuses("^stage '.*': unknown codebook 'common'; known: own, shared"):
        Plan.of(shared(codebook="common"))


# In fairseq.

PLAN = {"stages": [{**FFN, "codebook": "shared"}, WORD_VECTORS, {**ATTENTION, "codebook": "shared"}]}


def test_it_is_trained_resumed_exported_and_evaluated_as_one(lab, runs, capsys):
    plan = ["--quantization-config-path", lab.plan(PLAN), *split("--disable-validation --save-interval-updates 1")]
    flags = [*plan, "--batch-size", 24]
    run = lab.train(*flags, "--finetune-from-model", runs.stock("plain").path, updates=9)
    found = quantized_weights(run.model)
    assert {weight.users[0] for name, weight in found.items() if "fc" in name} == {found["decoder.layers.0.fc1"]}
    assert len({id(weight.centroids) for weight in found.values()}) == 3
    state = state_of(run.path)
    for at in ("1_2", "1_4", "2_8"):
        resumed = state_of(lab.train(*flags, "--restore-file", run.folder / f"checkpoint_{at}.pt", updates=9).path)
        assert same(resumed["model"], state["model"]), at
        assert same(resumed["last_optimizer_state"], state["last_optimizer_state"]), at
    out, dense = lab.new("shared.safetensors"), lab.new("dense.pt")
    main(["export", "--path", str(run.path), "--out", str(out)])
    assert len([name for name in read(out).tensors if name.endswith("centroids")]) == 3
    main(["to-dense", str(out), "--out", str(dense)])
    assert lab.eval_lm(out) == lab.eval_lm(run.path) == lab.eval_lm(dense)
    goes_on = lab.train("--finetune-from-model", out, updates=2)
    assert len({id(weight.centroids) for weight in quantized_weights(goes_on.model).values()}) == 3
    capsys.readouterr()
