"""Products of quantized weights on a CPU, as one custom call whose C++ half is `handlers.cc`.

`matmul` is the kernel, `library` finds what `scripts/build-ffi` made. [docs/kernels/cpu.md] explains the kernels.
"""
