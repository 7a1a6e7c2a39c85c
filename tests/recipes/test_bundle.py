"""scripts/bundle.sh, check_bundle.py and setup.sh --bundle: what is refused, and the cure. Nothing is downloaded."""

import hashlib
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = "{}.{}".format(*sys.version_info)


@pytest.fixture
def bundle(tmp_path):
    """A bundle of one package that is none, for this machine."""
    folder = tmp_path / "bundle"
    (folder / "packages").mkdir(parents=True)
    (folder / "packages" / "torch-2.13.0.whl").write_text("wheel")
    (folder / "source.tar.gz").write_text("source")
    facts = {"python": PYTHON, "torch": "torch==2.13.0+cpu", "machine": f"{sys.platform}-{platform.machine()}"}
    (folder / "bundle.txt").write_text("".join(f"{k}={v}\n" for k, v in {**facts, "dev": "0"}.items()))
    sealed(folder)
    return folder


def sealed(folder):
    """Write the manifest as sha256sum does."""
    names = ["bundle.txt", "packages/torch-2.13.0.whl", "source.tar.gz"]
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def check(folder, *options):
    command = [sys.executable, ROOT / "scripts/check_bundle.py", folder, *options]
    return subprocess.run(command, capture_output=True, text=True)


def script(name, *arguments, **env):
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **env}
    command = ["bash", ROOT / "scripts" / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def refused(done, *parts):
    """One line on standard error with these parts, and exit code 2."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def test_a_whole_bundle_for_this_machine_is_taken_and_names_its_torch(bundle):
    done = check(bundle)
    assert (done.returncode, done.stdout.strip()) == (0, "torch==2.13.0+cpu")


@pytest.mark.parametrize("name", ["packages/torch-2.13.0.whl", "source.tar.gz"])
def test_a_damaged_or_missing_file_is_named(bundle, name):
    (bundle / name).write_text("something else")
    refused(check(bundle), name, "SHA-256 differs", "copy the bundle again")
    (bundle / name).unlink()
    refused(check(bundle), name, "missing", "copy the bundle again")


def test_a_package_that_was_not_bundled_is_refused_since_pip_would_take_it(bundle):
    (bundle / "packages" / "torch-99.whl").write_text("not listed")
    refused(check(bundle), "torch-99.whl is not in SHA256SUMS", "remove it")


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        (f"python={PYTHON}", "python=3.9", ["for Python 3.9", "PYTHON=python3.9"]),
        (f"machine={sys.platform}", "machine=vax", ["for vax-"]),
    ],
)
def test_a_bundle_for_another_python_or_machine_is_refused(bundle, old, new, parts):
    facts = bundle / "bundle.txt"
    facts.write_text(facts.read_text().replace(old, new))
    sealed(bundle)
    refused(check(bundle), *parts)


def test_tools_for_the_tests_must_have_been_bundled(bundle):
    refused(check(bundle, "--dev"), "without --dev; leave it out")


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    refused(check(tmp_path), "SHA256SUMS is missing", "scripts/bundle.sh")
    refused(script("setup.sh", "--bundle", tmp_path / "nowhere"), "no such folder")
    refused(script("setup.sh", "--bundle"), "no such folder")


def test_bundling_refuses_what_it_cannot_do_before_it_downloads_anything(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    refused(script("bundle.sh"), "no folder given")
    refused(script("bundle.sh", tmp_path), "holds something else")
    refused(script("bundle.sh", tmp_path / "new", "--torch", "rocm"), "give cpu or cuda")
    refused(script("bundle.sh", tmp_path / "new", "--torch"), "give cpu or cuda")
    refused(script("bundle.sh", tmp_path / "new", "--wheels"), "unknown option --wheels")
    refused(script("bundle.sh", tmp_path / "new", PYTHON="python2"), "python2 does not run")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(("kind", "version"), [("cuda", "2.13.0"), ("cpu", "2.13.0+cpu")])
def test_the_torch_that_is_asked_for_is_bundled(tmp_path, kind, version):
    """pip takes 2.13.0+cpu for 2.13.0, where its index has both."""
    index, folder = tmp_path / "index", tmp_path / "bundle"
    index.mkdir()
    for name in ("2.13.0", "2.13.0+cpu"):
        about = f"torch-{name}.dist-info"
        with zipfile.ZipFile(index / f"torch-{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {name}\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(index)}
    done = script("bundle.sh", folder, "--torch", kind, **offline)
    assert "a package could not be downloaded" in done.stderr, "there is nothing but torch"
    assert [path.name for path in (folder / "packages").iterdir()] == [f"torch-{version}-py3-none-any.whl"]
