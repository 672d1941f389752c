"""Speed, memory and quality of wsss_kernels, measured beside what a user would pick instead."""
