"""Builds the FFI handlers into a wheel, which then is one platform's, for every Python; all else is in pyproject.toml.

Without a C++ compiler the wheel is a pure one, and the backends that need the handlers say that they are not built. An
editable install leaves the build to `make setup`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

BUILD_FFI = Path(__file__).parent / "scripts" / "build-ffi"


class Libraries(Distribution):
    """Holds libraries where there is a compiler to make them."""

    def has_ext_modules(self) -> bool:
        return shutil.which(os.environ.get("CXX", "g++")) is not None


class BuildPy(build_py):
    """Compiles the handlers beside their sources, from where they are packaged as data."""

    def run(self) -> None:
        if not self.editable_mode:
            subprocess.run([BUILD_FFI, sys.executable], check=True)
        super().run()


class BdistWheel(bdist_wheel):
    """Names the platform, and no version of Python: nothing here is compiled against one."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(distclass=Libraries, cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
