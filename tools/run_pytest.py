"""Run the test suite from Bazel's runfiles, which is the current directory of a Bazel test."""

import sys

import pytest


sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
