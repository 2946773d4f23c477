"""Kernels for Hopper, in Pallas lowered through Mosaic GPU: TMA, wgmma, one warpgroup a thread of the program."""
