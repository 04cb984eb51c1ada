"""What Python is asked to do while artifacts are loaded: nothing is unpickled, compiled, run, started or downloaded.

python -m trust.code_audit
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import roastify
from roastify import api
from roastify.pool.plan import RoastPlan
from roastify.recovery import checkpoint
from trust.mutations import KINDS

# Python's audit events by which code that a file holds could be run, or anything outside be reached.
_CODE = ("compile", "exec", "import", "pickle.", "marshal.", "ctypes.", "code.", "function.", "cpython.run_")
_OUTSIDE = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "socket.",
    "urllib.",
    "ftplib",
)


class Audit:
    """Counts the events of `with` blocks. Python has no way to remove an audit hook, so one hook serves them all."""

    def __init__(self) -> None:
        self.active = False
        self.events: Counter[str] = Counter()
        self.opened: set[str] = set()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        self.events[event] += 1
        if event == "open" and isinstance(arguments[0], str):
            self.opened.add(arguments[0])

    def during(self, work: Callable[[], object]) -> Counter[str]:
        """Return the events while a function runs."""
        self.events, self.opened, self.active = Counter(), set(), True
        try:
            work()
        finally:
            self.active = False
        return self.events


def small_bert() -> torch.nn.Module:
    """Return a small model of transformers."""
    # Here, because it takes seconds, and most parts of the package of tests do without it.
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **sizes)).eval()


def works(folder: Path) -> dict[str, Callable[[], object]]:
    """Return, by name, everything that reads files of others; artifacts of all kinds are made in the folder."""
    found: dict[str, Callable[[], object]] = {}
    for kind, (dense, converted, _) in KINDS.items():
        torch.manual_seed(0)
        path = folder / kind
        roastify.save(converted(), path)
        found[f"load, {kind}"] = lambda path=path, dense=dense: roastify.load(path, dense())
        found[f"densify, {kind}"] = lambda path=path: api.densify_artifact(path, folder / "dense.safetensors")
    roastify.save(roastify.convert(small_bert(), 3), folder / "bert")
    found["load alone, bert"] = lambda: roastify.load(folder / "bert")
    plan = json.dumps(roastify.plan(torch.nn.Linear(64, 64), 2).to_dict())
    found["plan from JSON"] = lambda: RoastPlan.from_dict(json.loads(plan))
    checkpoint.write_checkpoint(folder / "checkpoint", {}, {"values": torch.ones(3), "step": 4})
    found["checkpoint"] = lambda: checkpoint.read_checkpoint(folder / "checkpoint", {})
    return found


def run() -> list[str]:
    """Return what was seen that must not happen."""
    audit, wrong = Audit(), []
    with tempfile.TemporaryDirectory() as place:
        for name, work in works(Path(place)).items():
            # The first time, Python imports modules of ours and of torch that were not needed before.
            work()
            events = audit.during(work)
            wrong += [f"{name}: {event}" for event in events if event.startswith(_CODE + _OUTSIDE)]
            wrong += [f"{name}: opened {path}" for path in audit.opened if not path.startswith(place)]
            if not events["open"] and name != "plan from JSON":
                wrong.append(f"{name}: the hook saw no file opened, so it saw nothing")
    return wrong


def main() -> int:
    wrong = run()
    sys.stdout.write("".join(f"{line}\n" for line in wrong) or "no code was run, and no other file opened\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
