"""Tools that turn a large image classifier into the best small one for a given piece of hardware, and prove it."""

from importlib.metadata import version

__version__ = version("fofa-deploy")
