"""setuptools, asking for torch at build time only where native code is built: `SPARSEKERN_BUILD=0 pip install .` downloads none.

setup.py imports torch, so it must not run before these requirements are there: the hooks that tell them do not run it.
"""

import os
import warnings

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (a build backend is the hooks that its module holds)

# torch warns at its import where NumPy is absent.
NATIVE = ["torch>=2.11", "numpy", "ninja"]


def get_requires_for_build_wheel(config_settings=None):
    return [] if os.environ.get("SPARSEKERN_BUILD") == "0" else NATIVE


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None):
    return []


def build_sdist(sdist_directory, config_settings=None):
    os.environ["SPARSEKERN_BUILD"] = "0"
    return build_meta.build_sdist(sdist_directory, config_settings)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Build an editable wheel without setuptools' remark on every one of them, which calls for no action."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Editable installation")
        return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
