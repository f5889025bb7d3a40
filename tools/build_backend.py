"""setuptools, asking for torch at build time only where native code is built: `SPARSEKERN_BUILD=0 pip install .` downloads none.

setup.py imports torch, so it must not run before these requirements are there: the hooks that tell them do not run it.
"""

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (a build backend is the hooks that its module holds)

NATIVE = ["torch>=2.10", "ninja"]


def get_requires_for_build_wheel(config_settings=None):
    return [] if os.environ.get("SPARSEKERN_BUILD") == "0" else NATIVE


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None):
    return []


def build_sdist(sdist_directory, config_settings=None):
    os.environ["SPARSEKERN_BUILD"] = "0"
    return build_meta.build_sdist(sdist_directory, config_settings)
