"""`python -m cluster.engines.xllm`: see ranks."""

from __future__ import annotations

import sys

from cluster.engines.xllm.ranks import main

sys.exit(main())
