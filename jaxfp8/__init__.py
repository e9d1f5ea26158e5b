"""FP8 dense layers for JAX on Hopper GPUs: padded once, updated in place, one custom call each."""

from jaxfp8._dispatch import export_safety_checks as export_safety_checks
from jaxfp8.doctor import Report as Report
from jaxfp8.doctor import doctor as doctor
from jaxfp8.inputs import QuantizedInput as QuantizedInput
from jaxfp8.inputs import quantize_input as quantize_input
from jaxfp8.linen import PaddedFP8Dense as PaddedFP8Dense
from jaxfp8.matmul import fp8_dense as fp8_dense
from jaxfp8.matmul import fp8_dense_float as fp8_dense_float
from jaxfp8.matmul import scaled_matmul as scaled_matmul
from jaxfp8.padded import DenseWeight as DenseWeight
from jaxfp8.padded import FP8Weight as FP8Weight
from jaxfp8.padded import PaddedKernel as PaddedKernel
from jaxfp8.quantize import quantize as quantize
from jaxfp8.update import ReloadError as ReloadError
from jaxfp8.update import dequantize_params as dequantize_params
from jaxfp8.update import reload_params as reload_params
from jaxfp8.update import trainable_mask as trainable_mask
from jaxfp8.update import update_params as update_params


__version__ = "0.1.0"
