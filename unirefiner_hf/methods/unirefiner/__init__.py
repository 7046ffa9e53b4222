"""UniRefiner (arXiv 2605.19622): a border of register patches that absorbs artifacts."""
