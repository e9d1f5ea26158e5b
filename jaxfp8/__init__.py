"""FP8 dense layers for JAX on Hopper GPUs."""

from jaxfp8.matmul import fp8_dense as fp8_dense
from jaxfp8.matmul import scaled_matmul as scaled_matmul
from jaxfp8.padded import DenseWeight as DenseWeight
from jaxfp8.padded import FP8Weight as FP8Weight
from jaxfp8.padded import PaddedKernel as PaddedKernel
from jaxfp8.quantize import quantize as quantize
