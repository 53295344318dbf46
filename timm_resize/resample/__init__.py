"""Pure tensor → tensor resampling, and the frozen values that describe it."""

from timm_resize.resample.axis import Adjoint, AxisMap, Geometric, Interpolate, MirroredOffset, PatchKernel
from timm_resize.resample.maps import (
    flatten_linear,
    offset_table,
    patch_kernel,
    pos_embed,
    pos_embed_map,
    rel_pos_table,
    token_matrix,
    token_reader,
    token_writer,
)
from timm_resize.resample.resample import Resample

__all__ = [
    "Adjoint",
    "AxisMap",
    "Geometric",
    "Interpolate",
    "MirroredOffset",
    "PatchKernel",
    "Resample",
    "flatten_linear",
    "offset_table",
    "patch_kernel",
    "pos_embed",
    "pos_embed_map",
    "rel_pos_table",
    "token_matrix",
    "token_reader",
    "token_writer",
]
