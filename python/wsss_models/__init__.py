"""Training models, data, files and the `wsss` command on top of `wsss_kernels`."""
