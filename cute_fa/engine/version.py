"""The version of the package: a module without imports, so that building the package can read it."""

__version__ = "0.1.0"
