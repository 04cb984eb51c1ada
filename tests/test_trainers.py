"""Hugging Face's Trainer, Accelerate and Lightning train a converted model, save it and resume."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import roastify

WORDS, LENGTH, BATCH = 96, 8, 4
RATIO = 4
# The trainers themselves warn of workers, logging and old interfaces.
pytestmark = pytest.mark.filterwarnings("ignore")


def words(count: int) -> Tensor:
    return torch.randint(0, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(0))


def small_bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return transformers.BertForMaskedLM(config)


def converted_bert() -> Any:
    return roastify.convert(small_bert(), RATIO, inplace=True)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0.0, atol=0.0, msg=lambda text, name=name: f"{name}: {text}"
        )


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return float((after["roast_pool.weight"] - before["roast_pool.weight"]).abs().max()) > 1e-3


class Sentences(torch.utils.data.Dataset):
    """Rows of words that are their own labels, as Trainer takes them."""

    def __init__(self, count: int) -> None:
        self.rows = words(count)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer_of(model: nn.Module, folder: Path, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-2,
        weight_decay=0.1,
        logging_strategy="no",
        seed=0,
        **settings,
    )
    return transformers.Trainer(model, arguments, train_dataset=Sentences(32), eval_dataset=Sentences(8))


def test_trainer_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    whole = trainer_of(converted_bert(), tmp_path / "whole", max_steps=4, save_steps=2)
    start = values(whole.model)
    whole.train()
    assert moved(start, values(whole.model))
    resumed = trainer_of(converted_bert(), tmp_path / "whole", max_steps=4, save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(values(resumed.model), values(whole.model))


@pytest.mark.long
def test_trainer_loads_the_best_model_at_the_end(tmp_path: Path) -> None:
    # After the first evaluation the learning rate rises sharply, so that the best model is not the last.
    trainer = trainer_of(
        converted_bert(),
        tmp_path,
        max_steps=4,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        lr_scheduler_type="constant",
    )
    seen: list[dict[str, Tensor]] = []

    transformers = pytest.importorskip("transformers")

    class Spoil(transformers.TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
            seen.append(values(model))
            for group in others["optimizer"].param_groups:
                group["lr"] = 10.0

    trainer.add_callback(Spoil())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert len(seen) == 2 and moved(seen[0], seen[1])
    assert_same(values(trainer.model), seen[0])


def test_trainer_saves_a_file_that_loads(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainer = trainer_of(converted_bert(), tmp_path / "run", max_steps=2, save_strategy="no")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    found = load_file(tmp_path / "saved" / "model.safetensors")
    other = converted_bert()
    missing, unexpected = other.load_state_dict(found, strict=False)
    # The missing tensor is tied to one in the file, as in the dense model's file.
    assert set(missing) <= {"cls.predictions.decoder.bias"} and not unexpected
    rows = words(2)
    trained = trainer.model.eval()
    with torch.no_grad():
        expected = trained(rows).logits
        assert torch.equal(other.eval()(rows).logits, expected)
    roastify.save(trained, tmp_path / "artifact")
    with torch.no_grad():
        assert torch.equal(roastify.load(tmp_path / "artifact", small_bert()).eval()(rows).logits, expected)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 64)
        self.up = nn.Linear(64, 128)
        self.head = nn.Linear(128, WORDS)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(F.gelu(self.up(self.words(rows))))


def converted_net() -> nn.Module:
    torch.manual_seed(0)
    return roastify.convert(Net(), RATIO, inplace=True)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows).flatten(0, 1), rows.roll(1, 1).flatten())


def plain_training(steps: int) -> dict[str, Tensor]:
    """Train in a plain loop: two batches a step, clipped."""
    model = converted_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = words(2 * BATCH * steps).split(BATCH)
    for step in range(steps):
        optimizer.zero_grad()
        for part in rows[2 * step : 2 * step + 2]:
            (loss_of(model, part) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return values(model)


def test_accelerate_gives_the_weights_of_a_plain_loop(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    steps = 4
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = converted_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(words(2 * BATCH * steps)), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for (rows,) in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, rows))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    plain = accelerator.unwrap_model(model)
    assert_same(values(plain), plain_training(steps))
    accelerator.save_state(str(tmp_path / "state"))
    trained = values(plain)
    with torch.no_grad():
        plain.roast_pool.weight.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert_same(values(plain), trained)
    accelerator.save_model(model, str(tmp_path / "model"))
    assert (tmp_path / "model" / "model.safetensors").is_file()
    roastify.save(plain, tmp_path / "artifact")
    assert_same(values(roastify.load(tmp_path / "artifact", Net())), trained)


def test_lightning_gives_the_weights_of_a_plain_loop(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning")
    steps = 4

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = converted_net()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return loss_of(self.net, batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def fit(steps: int, checkpoint: str | None = None) -> Module:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Module()
        loader = DataLoader(TensorDataset(words(2 * BATCH * 4)), batch_size=BATCH)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    module = fit(steps)
    assert_same(values(module.net), plain_training(steps))
    other = Module()
    other.load_state_dict(torch.load(tmp_path / f"{steps}.ckpt", weights_only=True)["state_dict"])
    assert_same(values(other.net), values(module.net))
    roastify.save(module.net, tmp_path / "artifact")
    assert_same(values(roastify.load(tmp_path / "artifact", Net())), values(module.net))
