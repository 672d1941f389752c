"""The ops as Triton kernels, for GPUs the compiled module does not run on: imported when one is first needed."""
