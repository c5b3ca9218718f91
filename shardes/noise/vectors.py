"""Width of the vectors in compiled kernels."""

import numba
from numba.core.codegen import get_host_cpu_features


def use_widest_vectors() -> None:
    """Set numba to compile for the widest vectors of this processor; call it before anything is compiled.

    On Intel's processors LLVM leaves half of AVX-512 unused, because the first of them lowered their clock
    for it. Noise is nothing but arithmetic, and is made almost twice as fast with all of it
    (benchmarks/README.md). What the user sets by ``NUMBA_CPU_FEATURES`` or ``NUMBA_CPU_NAME`` counts instead.
    """
    config = numba.config
    if config.CPU_FEATURES is None and config.CPU_NAME is None:
        features = get_host_cpu_features()
        if "+avx512vl" in features.split(","):
            config.CPU_FEATURES = f"{features},-prefer-256-bit"
