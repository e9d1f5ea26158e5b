"""FP8 layers for Flax NNX: the public names, nothing else.

`update_params`, `reload_params`, `dequantize_params` and `trainable_mask` of jaxfp8 take an
nnx.State as they take a tree of Linen.
"""

from jaxfp8._nnx_calibrate import calibrate as calibrate
from jaxfp8._nnx_calibrate import set_x_scales as set_x_scales
from jaxfp8._nnx_linear import PaddedFP8Linear as PaddedFP8Linear
from jaxfp8._nnx_quantize import quantize_linears as quantize_linears
from jaxfp8._nnx_quantize import quantized_paths as quantized_paths
from jaxfp8._nnx_reload import WEIGHTS as WEIGHTS
from jaxfp8._nnx_reload import reload_model as reload_model
from jaxfp8._nnx_variables import ActivationScale as ActivationScale
from jaxfp8._nnx_variables import FP8Param as FP8Param
