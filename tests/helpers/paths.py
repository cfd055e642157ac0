"""Where the checkout and the embedded model are."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PYLM = ROOT / "examples" / "pylm-4m"  # a small trained model
