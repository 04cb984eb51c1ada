"""What a user of transformers does, from `from_pretrained` to `generate`; `make wheel` runs it with the wheel alone."""

import sys
from pathlib import Path

import torch
import transformers

folder = Path(sys.argv[1])
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=4, eos_token_id=None, **sizes)
torch.manual_seed(0)
transformers.LlamaForCausalLM(config).save_pretrained(folder / "dense")
# It learns to count.
words = torch.arange(16) + torch.arange(0, 48, 3)[:, None]

# The lines of the user.
import roastify  # noqa: E402, I001
from transformers import AutoModelForCausalLM  # noqa: E402

settings = roastify.RoastifyConfig(ratio=4, init="match")
model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=settings)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model.train()
for _ in range(40):
    loss = model(input_ids=words, labels=words).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()

model.save_pretrained(folder / "trained")
again = AutoModelForCausalLM.from_pretrained(folder / "trained")
prompt = words[2:3, :8]
counted = again.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8)

# What is promised of them.
assert torch.equal(again(words).logits, model(words).logits), "the folder that was loaded gives other outputs"
assert torch.equal(counted, words[2:3]), f"the model counts {counted[0].tolist()}"
dense, trained = ((folder / name / "model.safetensors").stat().st_size for name in ("dense", "trained"))
assert trained < dense / 3.5, f"{dense:,} bytes became {trained:,}"
place = Path(roastify.__file__).parent
print(f"{place}: loss {loss.item():.3f}, counts to {int(counted.max())}, {dense:,} → {trained:,} bytes")  # noqa: T201
