"""Comparing exported models by their bytes."""

import hashlib


def fingerprint(directory):
    """Hash of every exported file but the model card, which names settings that may differ."""
    files = sorted(path for path in directory.iterdir() if path.name != "README.md")
    assert any(path.suffix == ".safetensors" for path in files)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
