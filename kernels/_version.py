"""The version of mlembed and of mlembed-kernels, which are released together."""

__version__ = "0.1.0"
