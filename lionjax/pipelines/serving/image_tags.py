# SPDX-License-Identifier: Apache-2.0
"""Tags of images by a tagger, found once for each image."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from PIL import Image

from lionjax.inference.tagger import Tagger

KEPT_IMAGES = 64


class ImageTags:
    """The tags of images; those of the newest are kept. Safe to call from several threads."""

    def __init__(self, tagger: Tagger):
        self.tagger = tagger
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()

    def find(self, image: Image.Image) -> tuple[str, ...]:
        """The tags of an RGB image."""
        digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        with self._lock:
            if digest not in self._kept:
                (result,) = self.tagger.tag([image])
                self._kept[digest] = tuple(result.tags)
            while len(self._kept) > KEPT_IMAGES:
                self._kept.popitem(last=False)
            return self._kept[digest]
