"""The 4-bit forward: loading, layers, kernels, stacked probes, generation, streaming."""
