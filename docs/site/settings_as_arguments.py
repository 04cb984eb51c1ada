"""Shows `recover` in the reference as it is called: the fields of `RecoverOptions` are arguments of its own."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import griffe

from roastify.recovery.options import RecoverOptions


class SettingsAsArguments(griffe.Extension):
    """Puts the settings in the place of the argument `options`, in the signature and in the docstring.

    A decorator does the same in the package. Griffe does not see it, because it reads source code without running it.
    """

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Change `recover` and the description of `RecoverOptions` once all modules are read."""
        fields = dataclasses.fields(RecoverOptions)
        meanings = [f"    {each.name}: {each.metadata['meaning']}." for each in fields]
        described = pkg["recovery.options.RecoverOptions"]
        described.docstring.value = RecoverOptions.__doc__
        function = pkg["api.recover"]
        function.docstring.value = re.sub(
            r"^    options: .*$", "\n".join(meanings), function.docstring.value, flags=re.M
        )
        own = [parameter for parameter in function.parameters if parameter.name != "options"]
        function.parameters = griffe.Parameters(*own, *map(_parameter, fields))


def _parameter(field: dataclasses.Field[Any]) -> griffe.Parameter:
    kind = griffe.ParameterKind.keyword_only if field.kw_only else griffe.ParameterKind.positional_or_keyword
    return griffe.Parameter(field.name, annotation=str(field.type), kind=kind, default=repr(field.default))
