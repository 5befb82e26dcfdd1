"""``python -m lwkd``."""

from __future__ import annotations

import sys

from lwkd.cli import main

sys.exit(main())
