"""Packages of the optional extra ``graph``."""

import importlib
import warnings
from typing import Any

from framp_core.errors import ConfigError


def extra(module: str) -> Any:
    """Import a module of the extra ``graph``; as a rule inside the function that needs it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # What these packages use of torch that is on its way out is not for our users to mend.
            warnings.simplefilter("ignore", FutureWarning)
            importlib.import_module(module.partition(".")[0])
            return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"this needs {module} ({error}); install it with: pip install 'framp[graph]'") from error
