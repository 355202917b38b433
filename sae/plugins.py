"""Find plug-ins by file name: no registry, no decorator, nothing imported until it is asked for."""

import importlib
import importlib.util
import pkgutil
from typing import Any

from sae.errors import UnknownPlugin, did_you_mean


def names(package: str) -> list[str]:
    """Sorted plug-in names of ``package``: its file names without a leading underscore. Imports none of them."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise UnknownPlugin(f"there is no plug-in package {package!r}")
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return sorted(m.name for m in found if not m.name.startswith("_"))


def find(package: str, name: str) -> Any:
    """The ``PLUGIN`` of ``package/name.py``, or of an outside object written ``"module:object"``.

    Raises :class:`UnknownPlugin` with near names when there is no such plug-in.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise UnknownPlugin(f"cannot load {name!r}: {error}") from error
    if name not in names(package):
        kind = package.rpartition(".")[2]
        raise UnknownPlugin(f"no plug-in {name!r} in {kind}{did_you_mean(name, names(package))}")
    return importlib.import_module(f"{package}.{name}").PLUGIN
