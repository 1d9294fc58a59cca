"""`tiny-glm-mtp`: a GLM mixture of experts with a multi-token-prediction (MTP) layer, in 2 MB.

For speculative decoding with a model's own drafts on any machine. scripts/make_tiny_glm.py trained
it; its files lie next to this module and are copied, so nothing is fetched or built.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from cluster.models.progress import Progress

ID = "tiny-glm-mtp"
# Ours, then how the weights' sha256 begins: other weights are another revision.
REVISION = "1-8b0e68de"
NEEDED_BYTES = 3_000_000

FILES = Path(__file__).with_name("tiny_glm_mtp")


def fill(folder: Path, progress: Progress) -> None:
    """Copy the files into `folder`. Raises: OSError."""
    progress("copying", None)
    for path in sorted(FILES.iterdir()):
        # Not its mode: an installation may be read-only.
        shutil.copyfile(path, folder / path.name)
