"""The product of one quantized layer on CUDA: which kernel, and how it is launched."""
