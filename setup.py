"""Map folders to packages; everything else is in pyproject.toml.

The folder `kernels/` installs as `mlembed_kernels`: Hugging Face ships a package called `kernels`,
and a wheel with a top-level `kernels` would overwrite it.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["mlembed", "mlembed.*"]),
        "mlembed_kernels",
        *(f"mlembed_kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"mlembed_kernels": "kernels"},
)
