"""The register model: what ships inside every published checkpoint."""
