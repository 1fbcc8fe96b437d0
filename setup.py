"""Only the package mapping; everything else is in pyproject.toml.

The folder `kernels/` installs as `mlembed_kernels`: Hugging Face ships a package called `kernels`,
and a wheel with a top-level `kernels` would overwrite it.
"""

from setuptools import setup

setup(
    packages=["mlembed", "mlembed_kernels"],
    package_dir={"mlembed": "mlembed", "mlembed_kernels": "kernels"},
)
