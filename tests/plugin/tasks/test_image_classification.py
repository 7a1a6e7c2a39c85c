"""EfficientNet in fairseq: training with noise, stages, evaluation from the packed file, and every verb."""

import copy
import json
import shutil
import subprocess

import pytest
import timm
import torch
import yaml
from lm_fixture import one_error, same, state_of
from PIL import Image
from toys import WITHOUT_FAIRSEQ, python, refuses
from vision_fixture import CLASSES, PLAN, ImageLab, verb

from fairseq_quant_noise import load
from fairseq_quant_noise.images import evaluation_transform
from fairseq_quant_noise.layers.batch_statistics import batch_norms, estimating
from fairseq_quant_noise.networks.registry import build
from fairseq_quant_noise.networks.timm_weights import timm_names
from fairseq_quant_noise.plugin import calibration
from fairseq_quant_noise.plugin.tasks.image_dataset import ImageDataset
from fairseq_quant_noise.quantization.quantize import STALE
from recipes.imagenet import from_timm

DENSE = ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1", "--quant-noise-pq", "0.1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return ImageLab(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def plan(images):
    path = images.folder / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def dense(images):
    """Four epochs with proxy noise."""
    return images.train(*DENSE, "--max-update", 12)


@pytest.fixture(scope="module")
def ipq(images, dense, plan):
    """Three stages of two updates, with the dense network as the teacher."""
    flags = ["--criterion", "ipq", "--ipq-teacher", dense.path, "--finetune-from-model", dense.path]
    flags += ["--lr", "0.002", "--quantization-config-path", plan, "--max-update", 6, "--quant-noise-pq", "0.1"]
    return images.train(*flags)


@pytest.fixture(scope="module")
def packed(images, ipq):
    path = images.new("ipq.safetensors")
    verb("export", "--path", ipq.path, "--out", path)
    return path


def test_the_loss_falls_and_top1_is_the_share_of_images_whose_likeliest_class_is_right(dense, images):
    losses = [float(update["loss"]) for update in dense.updates]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    transform, model = evaluation_transform(32, 1.0), dense.model.eval()
    found = [
        sorted(CLASSES)[model(transform(Image.open(path))[None]).argmax()] == path.parent.name
        for path in sorted((images.data / "val").rglob("*.png"))
    ]
    assert dense.valid[-1]["top1"] == pytest.approx(100 * sum(found) / len(found))
    assert dense.valid[-1]["top5"] == 100


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_a_teacher_of_images_takes_the_inputs_of_half_precision(images, dense, precision):
    run = images.train("--criterion", "ipq", "--ipq-teacher", dense.path, precision, "--max-update", 1)
    assert float(run.updates[0]["ipq_distillation"]) > 0


def test_the_stages_leave_every_product_in_codes_and_log_the_size(ipq):
    names = state_of(ipq.path)["model"]
    assert "classifier.weight.codes" in names
    assert "conv_stem.weight.centroids" in names
    assert not [name for name, tensor in names.items() if name.endswith(".weight") and tensor.dim() > 1]
    assert ipq.updates[-1]["ipq_ratio"] > ipq.updates[0]["ipq_ratio"] > 1


def test_fairseq_validate_gives_the_packed_file_what_it_gives_the_checkpoint(images, ipq, packed):
    of_file, of_checkpoint = images.validate(packed), images.validate(ipq.path)
    assert of_file["top1"] == of_checkpoint["top1"] == ipq.valid[-1]["top1"]
    assert of_file["loss"] == pytest.approx(of_checkpoint["loss"], abs=0.02)


def test_a_file_loads_and_classifies_without_fairseq(packed, images):
    script = f"""{WITHOUT_FAIRSEQ}
from PIL import Image
from fairseq_quant_noise import load
from fairseq_quant_noise.layers.batch_statistics import batch_norms, estimating
from fairseq_quant_noise.images import evaluation_transform
from fairseq_quant_noise.artifact import read
image = evaluation_transform(32, 1.0)(Image.open({str(images.data / "val/red/0.png")!r}))
print(read({str(packed)!r}).manifest.model["classes"], tuple(load({str(packed)!r})(image[None]).shape))
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{sorted(CLASSES)} (1, 3)"


def test_inspect_and_verify_know_the_file(packed):
    info = json.loads(verb("inspect", packed, "--json"))
    assert info["model"] == "quant_noise_efficientnet"
    assert info["file_bytes"] == packed.stat().st_size
    assert info["plan"]["stages"][-1]["match"] == "classifier"
    assert "whole" in verb("verify", packed)


def test_to_dense_writes_weights_that_timm_and_the_plugin_load(images, packed):
    path = images.new("dense.pt")
    verb("to-dense", packed, "--out", path)
    state = torch.load(path, weights_only=True)
    assert "blocks.3.1.conv_pw.weight" in state["model"]
    assert not [name for name in state["model"] if ".first." in name or ".codes" in name]
    assert images.validate(path)["top1"] == images.validate(packed)["top1"]
    assert state["model"]["conv_stem.weight"].dim() == 4


def test_timms_weights_become_a_checkpoint_and_go_back_to_timm(tmp_path):
    theirs = timm.create_model("efficientnet_b0", num_classes=5)
    torch.save(theirs.state_dict(), tmp_path / "b0.pth")
    arguments = ["--arch", "quant_noise_efficientnet_b0", "--set", "num_classes=5", "--out", tmp_path / "b0.pt"]
    from_timm.main([str(tmp_path / "b0.pth"), *map(str, arguments)])
    verb("to-dense", tmp_path / "b0.pt", "--out", tmp_path / "out.pt")
    again = timm.create_model("efficientnet_b0", num_classes=5, checkpoint_path=str(tmp_path / "out.pt"))
    assert same(dict(again.state_dict()), dict(theirs.state_dict()))


def test_weights_of_another_network_end_the_program_in_one_line(tmp_path, capsys):
    torch.save({"conv_stem.weight": torch.zeros(1)}, tmp_path / "w.pth")
    arguments = [str(tmp_path / "w.pth"), "--arch", "quant_noise_efficientnet_lite0", "--out", str(tmp_path / "out.pt")]
    with pytest.raises(SystemExit) as ended:
        from_timm.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'w.pth'}: lacks ")
    assert not (tmp_path / "out.pt").exists()


def test_a_checkpoint_of_published_weights_validates_and_is_calibrated_without_a_training(images, tmp_path):
    """Its state has no task, and its configuration few sections."""
    options = {"num_classes": 3, "width": 0.1, "depth": 0.6, "drop_path": 0.0}
    theirs = build("quant_noise_efficientnet", options, 0)
    torch.save(timm_names(theirs.state_dict()), tmp_path / "w.pth")
    arguments = [f"--set={key}={value}" for key, value in options.items()]
    arguments += ["--arch", "quant_noise_efficientnet_b0", "--image-size", "32", "--crop-ratio", "1.0"]
    path, out = images.new("published.pt"), images.new("published.safetensors")
    from_timm.main([str(tmp_path / "w.pth"), *arguments, "--normalization", "inception", "--out", str(path)])
    assert 0 <= images.validate(path)["top1"] <= 100
    plan = images.new("published.yaml")
    plan.write_text(yaml.safe_dump({"stages": [{"match": ".*", "scheme": "int8"}]}))
    verb("quantize", "--path", path, "--plan", plan, "--out", out, "--calibration-data", images.data)
    assert not torch.equal(load(out).bn1.running_mean, theirs.bn1.running_mean)


def test_the_normalization_decides_what_range_pixels_have():
    white = Image.new("RGB", (8, 8), "white")
    seen = {name: evaluation_transform(8, 1.0, name)(white)[:, 0, 0] for name in ("imagenet", "inception")}
    torch.testing.assert_close(seen["inception"], torch.ones(3))
    torch.testing.assert_close(seen["imagenet"], torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))
    with refuses("--normalization is 'none'; give one of imagenet, inception"):
        evaluation_transform(8, 1.0, "none")


INT8 = {"stages": [{"match": ".*", "scheme": "int8"}], "activations": {"bits": 8, "calibration_batches": 2}}


def test_quantize_in_one_go_with_calibrated_inputs_evaluates(images, dense):
    plan, out = images.new("int8.yaml"), images.new("int8.safetensors")
    plan.write_text(yaml.safe_dump(INT8))
    verb("quantize", "--path", dense.path, "--plan", plan, "--out", out, "--calibration-data", images.data)
    found = images.validate(out)
    assert found["top1"] == pytest.approx(dense.valid[-1]["top1"], abs=14)
    assert len(json.loads(verb("inspect", out, "--json"))["inputs"]) > 30


def all_images(images):
    """Every training image in one batch, as evaluation sees it."""
    transform = evaluation_transform(32, 1.0)
    return torch.stack([transform(Image.open(path)) for path in sorted((images.data / "train").rglob("*.png"))])


def has_statistics_of(model, batch):
    """Whether the running statistics are those of this batch in this network, up to rounding."""
    expected = copy.deepcopy(model)
    with estimating(expected):
        expected(batch)
    theirs = batch_norms(expected)
    near = [
        torch.allclose(getattr(norm, name), getattr(theirs[path], name), rtol=0.02, atol=0.01)
        for path, norm in batch_norms(model).items()
        for name in ("running_mean", "running_var")
    ]
    return all(near)


@pytest.mark.upstream(34)
def test_quantize_estimates_batch_statistics_on_the_training_images(images, dense, plan, monkeypatch, caplog):
    batch = all_images(images)
    monkeypatch.setattr(calibration, "IMAGES", len(batch))
    found, stale = images.new("with.safetensors"), images.new("without.safetensors")
    verb("quantize", "--path", dense.path, "--plan", plan, "--out", found, "--calibration-data", images.data)
    assert STALE not in caplog.messages
    assert has_statistics_of(load(found), batch)
    verb("quantize", "--path", dense.path, "--plan", plan, "--out", stale)
    assert caplog.messages.count(STALE) == 1
    assert "--calibration-data DATA" in STALE
    assert not has_statistics_of(load(stale), batch)


@pytest.mark.upstream(34)
def test_each_stage_begins_with_the_statistics_of_its_weights(images, dense, plan):
    flags = ["--augmentation", "none", "--batch-size", len(all_images(images)), "--lr", "0", "--max-update", 3]
    flags += ["--finetune-from-model", dense.path, "--quantization-config-path", plan]
    run = images.train(*flags)  # each update is on the same images and changes nothing
    assert has_statistics_of(run.model.eval(), all_images(images))


def test_plan_reads_checkpoints_and_needs_no_vocabulary_for_an_architecture(dense, plan):
    of_checkpoint = json.loads(verb("plan", "--path", dense.path, "--plan", plan, "--json"))
    sets = ["--set", "width=0.1", "--set", "depth=1.0", "--set", "num_classes=3"]
    of_name = json.loads(verb("plan", "--arch", "quant_noise_efficientnet_small", *sets, "--plan", plan, "--json"))
    assert of_checkpoint["paper_bytes"] == of_name["paper_bytes"]


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(images, dense):
    folder = images.new()
    images.train(*DENSE, "--max-update", 5, save=folder)
    again = images.train(*DENSE, "--max-update", 12, save=folder)
    assert same(state_of(again.path)["model"], state_of(dense.path)["model"])


def test_pruned_blocks_are_gone_from_the_checkpoint_which_evaluates_trains_and_quantizes(images, dense, plan):
    pruned, out = images.new("pruned.pt"), images.new("pruned.safetensors")
    printed = verb(
        "prune", "--path", dense.path, "--keep", "blocks_3=1", "--keep", "blocks_5=every-other", "--out", pruned
    )
    assert "1 layers in blocks.3" in printed
    images.validate(pruned)
    options = state_of(pruned)["cfg"]["model"]
    assert (options["blocks_3_layers"], options["blocks_5_layers"]) == (1, 2)
    verb("quantize", "--path", pruned, "--plan", plan, "--out", out)
    assert images.validate(out)["loss"] > 0
    run = images.train("--restore-file", pruned, "--max-update", 2, "--blocks-3-layers", 1, "--blocks-5-layers", 2)
    assert run.valid[-1]["loss"] > 0


def test_layers_to_keep_prune_while_a_checkpoint_is_loaded(images, dense):
    flags = ["--finetune-from-model", dense.path, "--blocks-3-layers", 2, "--blocks-3-layers-to-keep", "1"]
    run = images.train(*flags, "--max-update", 1, "--lr", "0")
    assert len(run.model.blocks[3].layers) == 1
    theirs = state_of(dense.path)["model"]["blocks.3.layers.1.conv_pw.weight"]
    assert torch.equal(run.model.blocks[3].layers[0].conv_pw.weight, theirs)


def test_shared_blocks_are_stored_once_and_keep_their_own_statistics(images, dense, plan):
    shared, out = images.new("shared.pt"), images.new("shared.safetensors")
    verb("share", "--path", dense.path, "--share-layers", "2", "--share-from", "mean", "--out", shared)
    run = images.train("--restore-file", shared, "--share-layers", 2, "--max-update", 2, "--quant-noise-pq", "0.1")
    two = run.model.blocks[3].layers
    assert two[0].conv_pw.weight is two[1].conv_pw.weight
    assert not torch.equal(two[0].bn1.running_mean, two[1].bn1.running_mean)
    verb("quantize", "--path", run.path, "--plan", plan, "--out", out)
    back = load(out)
    assert torch.equal(back.blocks[3].layers[1].bn1.running_mean, two[1].bn1.running_mean)
    info = json.loads(verb("inspect", out, "--json"))
    tied = {row["name"]: row["tied_to"] for row in info["tensors"] if row["tied_to"]}
    assert tied["blocks.3.layers.1.conv_dw.weight"] == "blocks.3.layers.0.conv_dw.weight"
    assert images.validate(out)["loss"] > 0


def test_a_plans_structure_shares_and_drops_blocks(images):
    path = images.new("structure.yaml")
    path.write_text(yaml.safe_dump({"structure": {"share_layers": 2, "layerdrop": 0.5}, **PLAN}, sort_keys=False))
    flags = ["--quantization-config-path", path, "--max-update", 3, "--criterion", "ipq"]
    run = images.train(*flags)
    stack = run.model.blocks[5].layers
    assert (type(stack).__name__, stack.chunk, stack.p) == ("LayerStack", 2, 0.5)
    assert stack[0]._modules["conv_pw"]._modules["weight"] is stack[1]._modules["conv_pw"]._modules["weight"]


def test_timms_weights_start_a_training_and_are_not_needed_again(images, dense):
    weights = images.new("timm.pth")
    torch.save(timm_names(state_of(dense.path)["model"]), weights)
    run = images.train("--timm-weights", weights, "--max-update", 1, "--lr", "0")
    assert torch.equal(run.model.conv_head.weight, state_of(dense.path)["model"]["conv_head.weight"])
    weights.unlink()
    assert images.validate(run.path)["loss"] > 0


def test_an_unknown_class_is_refused_and_a_missing_one_is_not(images, dense, capsys):
    other = images.new("other")
    shutil.copytree(images.data, other)
    shutil.rmtree(other / "train")
    shutil.rmtree(other / "val/blue")
    assert images.validate(dense.path, other)["top5"] == 100
    (other / "val/green").rename(other / "val/yellow")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        images.validate(dense.path, other)
    assert stopped.value.code == 2
    assert "class 'yellow'" in one_error(capsys.readouterr())


MISTAKES = [
    (["--timm-weights", "nowhere.pth"], "nowhere.pth: No such file"),
    (["--num-classes", "4"], "--num-classes is 4, and the data has 3 classes"),
    (["--crop-ratio", "2"], "--crop-ratio 2.0: give pixels, and a share up to 1"),
    (["--width", "0"], "option width is 0.0"),
    (["--blocks-3-layers-to-keep", "5"], "--blocks-3-layers-to-keep names layer 5"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=lambda v: v[0] if isinstance(v, list) else "")
def test_a_mistake_is_one_line_with_exit_code_2(images, flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        images.train(*flags, "--max-update", 1)
    assert stopped.value.code == 2
    assert message in one_error(capsys.readouterr())


def test_augmentation_depends_on_seed_epoch_and_image_alone(images):
    def dataset(seed):
        jitter = torch.nn.Dropout(0.5)  # draws from torch's generator, as torchvision's transforms do
        transform = evaluation_transform(32, 1.0)
        return ImageDataset(
            images.data / "train", sorted(CLASSES), lambda x: jitter(transform(x)), shuffle=True, seed=seed
        )

    one, same_seed, other_seed = dataset(1), dataset(1), dataset(2)
    first = one[5]["image"]
    torch.rand(7)
    assert torch.equal(first, same_seed[5]["image"])
    assert not torch.equal(first, other_seed[5]["image"])
    order = one.ordered_indices().tolist()
    same_seed.set_epoch(2)
    assert not torch.equal(first, same_seed[5]["image"])
    assert order != same_seed.ordered_indices().tolist()
    assert sorted(order) == list(range(len(one)))


def test_the_whole_command_line_works_in_a_program_of_its_own(images, packed):
    done = python(
        *("-m", "fairseq_cli.validate", images.data, "--path", packed, "--user-dir", "fairseq_quant_noise"),
        *("--task", "image_classification", "--image-size", 32, "--crop-ratio", 1.0, "--cpu", "--batch-size", 8),
        *("--num-workers", 1, "--log-format", "simple"),
        cwd=subprocess.os.getcwd(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "top1" in done.stdout + done.stderr
