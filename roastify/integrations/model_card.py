"""The part of a model card that says how a converted model was made, what it takes, and how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from roastify.files import replace_file
from roastify.pool.plan import RoastPlan

BEGIN, END = "<!-- roastify: written by save_pretrained -->", "<!-- end of roastify -->"
_TAG = "roastify"
_METADATA = "---\nlibrary_name: transformers\n---\n\n"


def write_card(folder: Path, class_name: str, plans: Sequence[RoastPlan]) -> None:
    """Write README.md, or the part of it that is about the conversion; the rest of an existing card stays.

    Args:
        folder: the folder that `save_pretrained` wrote.
        class_name: the model's class.
        plans: the plans of its pools.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {class_name}, converted with roastify\n"
    # `ModelCard` warns of a card without metadata.
    card = ModelCard(text if text.startswith("---") else f"{_METADATA}{text}", ignore_metadata_errors=True)
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or ()), _TAG]))
    head, mark, rest = card.text.partition(BEGIN)
    tail = rest.partition(END)[2] if mark else "\n"
    card.text = f"{head.rstrip()}\n\n{BEGIN}\n{_about(class_name, plans)}\n{END}{tail}"
    content = str(card)
    replace_file(path, lambda part: part.write_text(content, encoding="utf-8"))


def _about(class_name: str, plans: Sequence[RoastPlan]) -> str:
    dense, stored = sum(each.total_numel for each in plans), sum(each.stored_numel for each in plans)
    dense_bytes, stored_bytes = sum(each.total_nbytes for each in plans), sum(each.stored_nbytes for each in plans)
    shared = sum(bool(tensor.aliases) for plan in plans for tensor in plan.shared)
    kept = sum(len(plan.kept) for plan in plans)
    start = "the fit of the dense model's weights" if plans[0].init == "project" else "random"
    return f"""
## Size

The large weights of this model are tile-hashed views into one small pool (ROAST). Before any training the pool was
{start}.

| | dense model | this model | ratio |
|---|---|---|---|
| parameters | {dense:,} | {stored:,} | {dense / stored:.2f} (asked for: {plans[0].ratio:g}) |
| bytes | {dense_bytes:,} | {stored_bytes:,} | {dense_bytes / stored_bytes:.2f} |

{shared} tensors are in the pool, {kept} are stored as they are; `roastify_plan.json` lists all of them.

## Loading

```python
import roastify  # pip install 'roastify[integrations]'
from transformers import {class_name}

model = {class_name}.from_pretrained("this folder or repository")
```

Without `import roastify`, loading ends with an error. `model.dequantize()` returns the dense model.

## Verification

Every tensor was read back from the files after it was written, and has the bits that the model had. Loaded in the dtype
in which it was saved, the model therefore has the same outputs, bit for bit. The class, the signature of `forward` and
the outputs' structure are those of the dense {class_name}; `roastify.verify` compares them.
"""
