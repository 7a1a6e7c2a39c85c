"""CIFAR-10 as a tree of images, the small setting's configuration for Hydra, and the table of results."""

import numpy as np
import pytest
from PIL import Image
from toys import python
from vision_fixture import write_images

from recipes.imagenet import cifar10, result

ROOT = cifar10.Path(__file__).parents[2]


def write_binary(folder, records=20):
    """The binary version with `records` images a file; image i of a file has the class i % 10 and the red value i."""
    for name in (*(f"data_batch_{n}.bin" for n in range(1, 3)), "test_batch.bin"):
        rows = np.zeros((records, cifar10.RECORD), dtype=np.uint8)
        rows[:, 0] = np.arange(records) % 10
        rows[:, 1:1025] = np.arange(records)[:, None]
        rows.tofile(folder / name)


def test_the_binary_version_becomes_a_tree_with_the_first_images_of_each_class(tmp_path):
    source = tmp_path / "cifar-10-batches-bin"
    source.mkdir()
    write_binary(source)
    cifar10.make_tree(tmp_path, tmp_path / "out", {"train": 3, "val": 1})
    assert sorted(path.name for path in (tmp_path / "out/train").iterdir()) == sorted(cifar10.CLASSES)
    assert len(list((tmp_path / "out/train").rglob("*.png"))) == 30
    assert len(list((tmp_path / "out/val").rglob("*.png"))) == 10
    image = np.asarray(Image.open(tmp_path / "out/train/cat/00001.png"))
    assert image.shape == (32, 32, 3)
    assert image[..., 0].tolist() == [[13] * 32] * 32
    assert image[..., 1:].sum() == 0


def test_a_tree_of_images_is_cut_to_the_wanted_number(tmp_path):
    write_images(tmp_path / "data", each=6)
    cifar10.make_tree(tmp_path / "data", tmp_path / "out", {"train": 4, "val": 1})
    assert [len(list((tmp_path / "out" / split).rglob("*.png"))) for split in ("train", "val")] == [12, 3]


def test_a_folder_without_cifar_10_is_refused_in_one_line_and_nothing_is_left(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*neither a tree"):
        cifar10.make_tree(tmp_path, tmp_path / "out", {"train": 4, "val": 1})
    assert list(tmp_path.iterdir()) == []


def test_the_table_reads_fairseqs_logs(tmp_path, capsys):
    run = tmp_path / "pq"
    run.mkdir()
    (run / "eval-ipq.log").write_text("INFO | valid |  | valid on 'valid' subset | loss 2.1 | top1 41.25 | top5 88.5\n")
    (run / "ipq.safetensors").write_bytes(bytes(2**20))
    result.main([str(run)])
    assert capsys.readouterr().out.splitlines()[-1] == "| pq | ipq | 41.2 | 88.5 | 1,048,576 | 1.000 |"


@pytest.mark.slow
def test_the_configuration_for_hydra_trains(tmp_path):
    write_images(tmp_path / "data")
    keys = [f"task.data={tmp_path / 'data'}", f"common.user_dir={ROOT / 'fairseq_quant_noise'}"]
    keys += ["optimization.max_update=1", "dataset.batch_size=8", f"hydra.run.dir={tmp_path}"]
    keys += [f"checkpoint.save_dir={tmp_path}", "model.width=0.1"]
    config = ["--config-dir", ROOT / "configs", "--config-name", "image_classification/cifar10_small"]
    done = python("-m", "fairseq_cli.hydra_train", *config, *keys)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "distortion_conv_dw_weight" in done.stdout + done.stderr
    assert "detected shared parameter" not in done.stdout + done.stderr  # of layers without a bias
    assert (tmp_path / "checkpoint_last.pt").is_file()
