"""Products of NVIDIA's cuBLASLt as one custom call: jittable, batchable, inside CUDA graphs.

`matmul` has the 8-bit products, `dense` those of bfloat16 and float16, `microscaling` the block scales of Blackwell;
all three go through `call`, whose C++ half is `handlers.cc`.
"""
