"""Puts one file of mamba-ssm beside the other oracles; ``make install`` runs it with their folder as its argument.

The package has no wheels and its build wants CUDA; of its source archive, as it is on PyPI, one file is needed.
"""

import hashlib
import io
import sys
import tarfile
import urllib.request
from pathlib import Path

HOST = "https://files.pythonhosted.org/packages"
ARCHIVE = f"{HOST}/af/48/aa7bec0efc7453fa0512276c0069c854bf684219050294266534bfef34bb/mamba_ssm-2.3.2.post1.tar.gz"
SHA256 = "104cc47e9101e5401a675fa2b784f2952b9b037f3b1dd83b5ac544394e95d028"
FILE = Path("mamba_ssm/modules/ssd_minimal.py")


def main(folder: Path) -> None:
    """Writes `FILE` into ``folder``; stops when the archive is not the one that was read here."""
    with urllib.request.urlopen(ARCHIVE) as response:
        archive = response.read()
    found = hashlib.sha256(archive).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{ARCHIVE}\nhas the SHA-256 {found}, expected {SHA256}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        source = members.extractfile(f"mamba_ssm-2.3.2.post1/{FILE}")
        assert source is not None
        text = source.read()
    (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_bytes(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
