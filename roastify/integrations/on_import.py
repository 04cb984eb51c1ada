"""Registers roastify with transformers as soon as both are imported, in whichever order."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# What is extended. Models load both, the first one last; some tools ask the second one alone. Tokenizers load neither.
_MODELS, _QUANTIZERS = "transformers.modeling_utils", "transformers.quantizers"
_OURS = "roastify.integrations.transformers"


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets something run after a watched module was loaded.

    roastify does not import transformers, which takes seconds. A user who writes only `import roastify` may import
    transformers before or afterwards.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (_MODELS, _QUANTIZERS):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((each for each in found if each is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                # While models load, they load quantizers, and are complete afterwards.
                if fullname == _MODELS or _MODELS not in sys.modules:
                    _register()

            # A loader belongs to one module.
            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Register with transformers now if it is loaded, and otherwise when it is."""
    if _MODELS in sys.modules or _QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    try:
        importlib.import_module(_OURS)
    except Exception as error:  # whatever another version of transformers may lack; it must stay importable
        version = getattr(sys.modules.get("transformers"), "__version__", "of an unknown version")
        warnings.warn(
            f"roastify does not fit transformers {version} ({type(error).__name__}: {error}), so save_pretrained and "
            f"from_pretrained do not know converted models: use roastify.save and roastify.load, or install another "
            f"version",
            stacklevel=2,
        )
