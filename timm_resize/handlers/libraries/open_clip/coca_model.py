"""open_clip's CoCa: an image tower, a text tower and a decoder."""

from __future__ import annotations

from open_clip.coca_model import CoCa

from timm_resize.core.registry import register
from timm_resize.handlers.libraries.open_clip.model import image_size, plan_clip

register(
    CoCa, state="that of the image tower", method="as the image tower's", sizes="as the image tower's", size=image_size
)(plan_clip)
