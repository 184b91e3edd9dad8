"""The version, read from the installed package's metadata where there is one."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("uma-engine")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.1.0"
