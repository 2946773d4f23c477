"""Products of quantized weights on a CPU, as one custom call whose C++ half is `handlers.cc`.

`matmul` takes x as floats, `matmul_int8` as int8 codes; both go through `call`.
"""
