"""Triton kernels of the fused layer loop, and their plain twins.

Every kernel has a twin of the same name and signature in :mod:`ragkv.kernels.twins`, in plain torch. Only that module
can be imported without Triton; the others are imported where a model runs on CUDA. No kernel is compiled per length:
numbers of rows and keys are run-time arguments, and only what is fixed for a model is a constant.
"""
