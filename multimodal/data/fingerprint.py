"""What tells training data from others, cheaply: keys, and what a few samples read as."""

import hashlib
from typing import Any

from multimodal.parts import BadSample, Source

KEYS, PROBES = 10_000, 16
"""So many keys, and so many whole samples, evenly over the data."""


def fingerprint(source: Source) -> dict[str, int | str]:
    """The same for the same data; a change in a sample that was not read does not show, one in their number does."""
    keys, samples = hashlib.sha256(), hashlib.sha256()
    for index in _evenly(len(source), KEYS):
        keys.update(f"{source.key(index)}\0".encode())
    for index in _evenly(len(source), PROBES):
        try:
            sample = source[index]
        except BadSample:
            samples.update(b"broken")
            continue
        samples.update(str(sample.label).encode())
        for name in sorted(sample.inputs):
            samples.update(name.encode() + _bytes(sample.inputs[name]))
    return {"num_samples": len(source), "keys": keys.hexdigest()[:16], "samples": samples.hexdigest()[:16]}


def _evenly(size: int, count: int) -> range:
    return range(0, size, -(-size // count)) if size else range(0)


def _bytes(value: Any) -> bytes:
    """Of an image its pixels, of anything else how it is written."""
    if hasattr(value, "tobytes"):
        form = getattr(value, "mode", ""), getattr(value, "size", "")
        return repr(form).encode() + bytes(value.tobytes())
    return repr(value).encode()
