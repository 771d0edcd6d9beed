"""Element types of the DSL."""

import cutlass

from cute_fa.semantics.types import DType

CUTE_DTYPE = {
    DType.FP16: cutlass.Float16,
    DType.BF16: cutlass.BFloat16,
    DType.E4M3: cutlass.Float8E4M3FN,
    DType.E5M2: cutlass.Float8E5M2,
    DType.INT8: cutlass.Int8,
}
