"""Packaging of stem-tf. BUILD.md explains the pinned versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The version, read as text: the package cannot be imported before its requirements are installed."""
    text = (ROOT / "stem_util" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise ValueError('stem_util/version.py has no line __version__ = "..."')
    return match[1]


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


PLOTS = ["matplotlib>=3.8,<4"]
COMPARE = [*PLOTS, "optuna>=4.2,<5"]
# pipelines/convert/beam.py starts the direct runner's processes by parts that another minor version may change.
BEAM = ["apache-beam>=2.72,<2.78"]

setup(
    name="stem-tf",
    version=version(),
    description="STEM-Net and the multi-task ranking models around it on TensorFlow, from raw logs to scores.",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="The stem-tf authors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    # Makes editable installs use a static path, so that a package added later is found without another install.
    package_dir={"": "."},
    packages=find_packages(
        include=["stem_util", "stem_util.*", "pipelines", "pipelines.*", "stem_tf", "stem_tf.*", "export", "export.*"]
    ),
    package_data={
        "pipelines": ["schemas/*.yaml"],
        "stem_tf": ["compare/templates/*", "compare/plans/*.yaml", "submission/templates/*.j2"],
        "export": ["gate/rules.yaml", "deployment/templates/*.j2", "deployment/templates/kubernetes/*.j2"],
    },
    python_requires=">=3.11,<3.13",
    install_requires=[
        # The wheel of stem_client/, which is in this tree; tools/environment.sh installs both.
        f"stem-tf-client=={version()}",
        "tensorflow==2.16.2",
        "tensorflow-serving-api==2.16.1",
        "tf-keras==2.16.0",
        "tensorflow-recommenders==0.7.7",
        "tensorflow-io==0.37.1",
        "pyarrow>=21,<26",
        "numpy>=1.26,<2",
        "pandas>=2.2,<3",
        "protobuf>=4.25,<5",
        "absl-py>=2.1",
        "ml-collections>=1.0",
        "pyyaml>=6",
        "tqdm>=4.66",
        "google-crc32c>=1.5",
        "grpcio>=1.62",
        "grpcio-health-checking>=1.62,<1.63",
        "grpcio-reflection>=1.62,<1.63",
        "prometheus-client>=0.20,<1",
        "aiohttp>=3.10,<4",
        "jinja2>=3.1,<4",
        "scikit-learn>=1.5,<2",
        "setuptools>=77,<81",
    ],
    extras_require={
        "gpu": ["tensorflow[and-cuda]==2.16.2"],
        "plots": PLOTS,
        "compare": COMPARE,
        "beam": BEAM,
        # Google's libraries of newer versions of Beam need protobuf 6.
        "dataflow": ["apache-beam[gcp]>=2.72,<2.73"],
        "dev": [
            *COMPARE,
            *BEAM,
            "build>=1.2",
            # moto's S3 server, without the packages that its other services need (moto[server]).
            "flask>=3,<4",
            "flask-cors>=5",
            "duckdb>=2,<3",
            "hypothesis>=6.100,<7",
            "kubernetes-validate>=1.31",
            "moto[s3]>=5.1,<6",
            "mypy>=2.1,<3",
            "pandas-stubs>=2.2,<3",
            "pytest>=8",
            "pytest-xdist>=3.6,<4",
            # A new minor version of the formatter may format differently and turn `make test` red.
            "ruff>=0.17,<0.18",
            "types-PyYAML",
            "types-tqdm",
            "wheel",
        ],
    },
    entry_points={
        "console_scripts": [
            "stem-describe=pipelines.jobs.describe:run",
            "stem-convert=pipelines.jobs.convert:run",
            "stem-recipe=pipelines.jobs.recipe:run",
            "stem-train=stem_tf.jobs.train:run",
            "stem-evaluate=stem_tf.jobs.evaluate:run",
            "stem-inspect=stem_tf.jobs.inspect:run",
            "stem-compare=stem_tf.jobs.compare:run",
            "stem-launch=stem_tf.jobs.launch:run",
            "stem-submit=stem_tf.jobs.submit:run",
            "stem-export=export.jobs.export:run",
            "stem-publish=export.jobs.publish:run",
            "stem-versions=export.jobs.versions:run",
            "stem-daily=export.jobs.daily:run",
            "stem-predict=export.jobs.predict:run",
            "stem-serve=export.jobs.serve:run",
            "stem-deploy=export.jobs.deploy:run",
            "stem-load=export.jobs.load:run",
        ]
    },
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
