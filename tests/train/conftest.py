"""Makes `tiny`, the small models and tasks of these tests, importable here and in the processes that they start."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
