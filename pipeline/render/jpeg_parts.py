"""JPEGs decoded no further than their views read: whether a library here does that, to the bit.

Here: finding Pillow's libjpeg-turbo at run time, and the proof that its parts are simplejpeg's pixels.
Not here: decoding a part (kernels/decode_region.c), decoding the whole, whose verdict alone counts (pipeline/decode.py).
"""

import functools
import logging
import threading
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from wherefrom.kernels.render_views import decode_part, native_missing, native_stale, open_jpeg

log = logging.getLogger(__name__)

_lock = threading.Lock()
_SUBSAMPLINGS = ("444", "422", "420", "440", "411", "Gray")
_PROBE_SIZE = (75, 131)  # (height, width), no multiples of a block
_PROBE_PARTS = ((0, 0, 20, 40), (18, 33, 30, 41), (39, 64, 36, 67), (1, 1, 73, 129))  # (top, left, height, width)


def part_decoder() -> Any | None:
    """Return the libjpeg-turbo that `ViewPlan.render_jpegs` takes, or None where none serves, which is said once. Safe from any thread."""
    with _lock:
        return _open()[0]


def part_decoder_missing() -> str | None:
    """Return why pictures are decoded whole here, also where views show little of them, or None. Safe from any thread."""
    with _lock:
        return _open()[1]


@functools.cache
def _open() -> tuple[Any, None] | tuple[None, str]:
    """Return the library, or why there is none."""
    if missing := native_missing() or native_stale():
        why = missing
    else:
        try:
            jpeg = open_jpeg(str(Image.core.__file__))
            _prove(jpeg)
        except (ValueError, AttributeError) as error:  # AttributeError: Pillow without its compiled part
            why = f"Pillow's libjpeg does not serve ({error})"
        else:
            return jpeg, None
    log.warning("pictures are decoded whole, also where views show little of them: %s", why)
    return None, why


def _prove(jpeg: Any) -> None:
    """Raise ValueError unless parts of pictures of every subsampling are, bit for bit, what simplejpeg makes of the whole."""
    noise = np.random.default_rng(0).integers(0, 256, (*_PROBE_SIZE, 3), dtype=np.uint8)
    for sampling in _SUBSAMPLINGS:
        colors, picture = ("GRAY", noise[..., :1].copy()) if sampling == "Gray" else ("RGB", noise)
        encoded = simplejpeg.encode_jpeg(picture, quality=90, colorspace=colors, colorsubsampling=sampling)
        whole = simplejpeg.decode_jpeg(encoded, "RGB", strict=True)
        for top, left, height, width in _PROBE_PARTS:
            pixels, (y, x, *_) = decode_part(jpeg, encoded, _PROBE_SIZE, (top, left, height, width))
            shown = pixels.numpy()[top - y : top - y + height, left - x : left - x + width]
            if not np.array_equal(shown, whole[top : top + height, left : left + width]):
                raise ValueError(f"its parts of {sampling} pictures differ from simplejpeg's pixels")
