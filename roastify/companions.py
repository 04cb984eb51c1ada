"""Config and tokenizer, the files beside a model's weights that other programs read: into an artifact, and out of it.

In an artifact, `config.json` names weights that do not exist. Otherwise transformers would take the artifact for a
dense model, miss most of its weights, and make them up at random.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from roastify.errors import SourceError
from roastify.files import reason_of

CONFIG = "config.json"
_COMPANIONS = (
    CONFIG,
    "generation_config.json",
    "*tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "chat_template.*",
    "*processor_config.json",
)
# Where transformers looks up the name of the weights' file.
_WEIGHTS_KEY = "transformers_weights"
_QUANTIZATION_KEY = "quantization_config"
_NO_WEIGHTS = "this-is-a-roastify-artifact.read-it-with-roastify.load.safetensors"


def companions_of(model: str) -> dict[str, bytes]:
    """Return names and contents of a transformers model's config and tokenizer files, as an artifact has them.

    Args:
        model: a directory, a config file, or a name on the hub.

    Raises:
        SourceError: the files cannot be read.
    """
    path = Path(model)
    try:
        if path.is_file():
            return {CONFIG: _marked(path.read_bytes())}
        folder = path if path.is_dir() else _from_hub(model)
        found = sorted(each for each in folder.iterdir() if is_companion(each.name) and each.is_file())
        return {each.name: _marked(each.read_bytes()) if each.name == CONFIG else each.read_bytes() for each in found}
    except Exception as error:  # errors of files, of JSON and of the hub
        raise SourceError(f"hf:{model}: its config and tokenizer cannot be read: {reason_of(error)}") from error


def is_companion(name: str) -> bool:
    """Return whether a file of this name belongs to a model beside its weights."""
    return any(fnmatchcase(name, pattern) for pattern in _COMPANIONS)


def _from_hub(model: str) -> Path:
    # Here, because only names on the hub need it.
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=list(_COMPANIONS)))


def _marked(content: bytes) -> bytes:
    return _with(content, {_WEIGHTS_KEY: _NO_WEIGHTS})


def for_dense(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return an artifact's files as they belong beside dense weights."""
    return {name: _with(content, {}) if name == CONFIG else content for name, content in files.items()}


def _with(content: bytes, more: Mapping[str, Any]) -> bytes:
    values = json.loads(content)
    values.pop(_WEIGHTS_KEY, None)
    quantization = values.get(_QUANTIZATION_KEY)
    if isinstance(quantization, dict) and quantization.get("quant_method") == "roastify":
        # save_pretrained of a converted model wrote it. An artifact has its plan elsewhere, and a dense model has none.
        del values[_QUANTIZATION_KEY]
    return (json.dumps({**values, **more}, indent=2, ensure_ascii=False) + "\n").encode()
