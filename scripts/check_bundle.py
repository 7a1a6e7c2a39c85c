"""Whether a bundle of scripts/bundle.sh is whole and made for this machine: one line on a fault, exit code 2.

    python scripts/check_bundle.py DIR [--dev] [--vision]

Every file is compared with its SHA-256 in DIR/SHA256SUMS, and a package that is not listed there is refused: pip would
take it. Runs on the standard library alone. Prints the version of torch that is in it.
"""

import hashlib
import platform
import sys
from pathlib import Path

MANIFEST, FACTS, PACKAGES = "SHA256SUMS", "bundle.txt", "packages"


class BundleError(Exception):
    """What is wrong, and the cure."""


def facts_of(bundle: Path) -> dict[str, str]:
    """What the bundle is for: python, torch, machine, dev. Raises BundleError where it is no bundle."""
    for name in (MANIFEST, FACTS):
        if not (bundle / name).is_file():
            raise BundleError(f"{bundle / name} is missing; give --bundle the folder that scripts/bundle.sh made")
    return dict(line.split("=", 1) for line in (bundle / FACTS).read_text().splitlines() if "=" in line)


def check_files(bundle: Path) -> int:
    """Compare each file with its hash; returns how many there are. Raises BundleError at the first that differs."""
    listed = {}
    for line in (bundle / MANIFEST).read_text().splitlines():
        sha256, _, name = line.partition("  ")
        listed[name] = sha256
    for name, sha256 in listed.items():
        path = bundle / name
        if not path.is_file():
            raise BundleError(f"{path} is missing, and {MANIFEST} lists it; copy the bundle again")
        if _sha256(path) != sha256:
            raise BundleError(f"{path} is not the file that was bundled (its SHA-256 differs); copy the bundle again")
    for path in sorted((bundle / PACKAGES).iterdir()):
        if f"{PACKAGES}/{path.name}" not in listed:
            raise BundleError(f"{path} is not in {MANIFEST}; remove it: pip would install it")
    return len(listed)


def check_fit(facts: dict[str, str], extras: list[str]) -> None:
    """Raise BundleError where the bundle is for another Python or machine, or lacks what is asked for."""
    here = {"python": "{}.{}".format(*sys.version_info[:2]), "machine": f"{sys.platform}-{platform.machine()}"}
    if facts.get("python") != here["python"]:
        raise BundleError(
            f"the bundle is for Python {facts.get('python')}, and this is {here['python']}; give "
            f"PYTHON=python{facts.get('python')}, or make another bundle with PYTHON=python{here['python']}"
        )
    if facts.get("machine") != here["machine"]:
        raise BundleError(
            f"the bundle is for {facts.get('machine')}, and this is {here['machine']}; make it on one like this"
        )
    for extra in extras:
        if facts.get(extra.removeprefix("--")) != "1":
            raise BundleError(f"the bundle was made without {extra}; leave it out, or give it to scripts/bundle.sh too")


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def main() -> int:
    """0 when the bundle is whole and fits."""
    bundle = Path(sys.argv[1])
    try:
        facts = facts_of(bundle)
        check_fit(facts, sys.argv[2:])
        check_files(bundle)
    except (BundleError, OSError, ValueError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    print(facts["torch"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
