"""Map folders to packages; everything else is in pyproject.toml.

The folder `kernels/` installs as `mlembed_kernels`: Hugging Face ships a package called `kernels`,
and a wheel with a top-level `kernels` would overwrite it. `kernels/pyproject.toml` builds the same
folder alone.
"""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithVersion(build_py):
    """Copy the kernels' version file to mlembed, which compares both when it is imported."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file("kernels/_version.py", str(Path(self.build_lib, "mlembed")))


setup(
    packages=[
        *find_packages(include=["mlembed", "mlembed.*"]),
        "mlembed_kernels",
        *(f"mlembed_kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"mlembed_kernels": "kernels"},
    cmdclass={"build_py": BuildWithVersion},
)
