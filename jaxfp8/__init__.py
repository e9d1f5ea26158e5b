"""FP8 dense layers for JAX on Hopper GPUs: padded once, updated in place, one custom call each."""

from jaxfp8._dispatch import export_safety_checks as export_safety_checks
from jaxfp8._rows import update_rows as update_rows
from jaxfp8.calibrate import calibrate as calibrate
from jaxfp8.calibrate import with_x_scales as with_x_scales
from jaxfp8.dense_float import fp8_dense_float as fp8_dense_float
from jaxfp8.doctor import Report as Report
from jaxfp8.doctor import doctor as doctor
from jaxfp8.inputs import QuantizedInput as QuantizedInput
from jaxfp8.inputs import quantize_input as quantize_input
from jaxfp8.linen import PaddedFP8Dense as PaddedFP8Dense
from jaxfp8.matmul import fp8_dense as fp8_dense
from jaxfp8.matmul import scaled_matmul as scaled_matmul
from jaxfp8.padded import DenseWeight as DenseWeight
from jaxfp8.padded import FP8Weight as FP8Weight
from jaxfp8.padded import PaddedKernel as PaddedKernel
from jaxfp8.ptq import QuantizedModel as QuantizedModel
from jaxfp8.ptq import fp8_dense_interceptor as fp8_dense_interceptor
from jaxfp8.ptq import quantize_dense_params as quantize_dense_params
from jaxfp8.quantize import quantize as quantize
from jaxfp8.shards import KernelShards as KernelShards
from jaxfp8.stream import ReloadStream as ReloadStream
from jaxfp8.stream import reload_stream as reload_stream
from jaxfp8.update import ReloadError as ReloadError
from jaxfp8.update import dequantize_params as dequantize_params
from jaxfp8.update import reload_params as reload_params
from jaxfp8.update import trainable_mask as trainable_mask
from jaxfp8.update import update_params as update_params


__version__ = "0.1.0"
