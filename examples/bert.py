"""BERT-base for masked language modelling (110 M parameters), from its configuration."""

import torch
from transformers import BertConfig, BertForMaskedLM


def build_model() -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig())


def example_inputs() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(1000, 30000, (2, 32), generator=torch.Generator().manual_seed(0))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
