"""Packaging of stem-tf-client, the wheel of this folder: a ranking service needs no TensorFlow.

LICENSE, NOTICE and version.py are links to files above this folder; archives and wheels contain the files.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def version() -> str:
    """The version, read as text, because the package cannot be imported before it is installed."""
    match = re.search(r'^__version__ = "(.+)"$', (HERE / "version.py").read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise ValueError('version.py has no line __version__ = "..."')
    return match[1]


class BuildPackage(build_py):
    """Everything in this folder but this file."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


setup(
    name="stem-tf-client",
    version=version(),
    description="gRPC client of ranking services that serve models of stem-tf, without TensorFlow.",
    long_description="`RankingClient(target).rank(user, items)` returns scores of each task; see docs/client.md",
    long_description_content_type="text/markdown",
    author="The stem-tf authors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    package_dir={"stem_client": "."},
    packages=["stem_client"],
    cmdclass={"build_py": BuildPackage},
    package_data={"stem_client": ["py.typed"]},
    python_requires=">=3.10",
    # tools/client_matrix.sh tests both ends of these ranges.
    install_requires=["numpy>=1.23", "grpcio>=1.50", "protobuf>=4.22,<8"],
    classifiers=[
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
