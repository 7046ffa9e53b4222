"""``python -m unirefiner_hf``: the same as ``unirefiner``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
