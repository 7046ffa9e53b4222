"""The tests; they mirror the package and never ask the Hub for anything."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
