"""What users do to models with other libraries works on a converted model as on a dense one, or is refused by name.

PEFT, Accelerate, transformers, Lightning, torch's own tools and torch.distributed. The dense model beside a converted
one is the converted model's densified twin, so that both have the same weights.
"""

from __future__ import annotations

import abc
import copy
import io
import pickle
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tools_cases as cases
import torch
import torch.nn.functional as F
from processes import Processes, assert_same
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import flop_counter
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import roastify
from roastify.conversion.converted import pool_of, pools_in
from roastify.errors import RoastError

WORDS, WIDTH = 96, 64
RATIO = 4
# The libraries themselves warn of old interfaces, of adapters that are merged twice, and the like.
pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.arange(16).view(2, 8)
POOL = "roast_pool.weight"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net() -> Any:
    torch.manual_seed(0)
    return Net()


def converted_net(**settings: Any) -> Any:
    return roastify.convert(net(), RATIO, inplace=True, **settings)


def llama(tied: bool = False) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def converted_llama(tied: bool = False, **settings: Any) -> Any:
    return roastify.convert(llama(tied), RATIO, inplace=True, **settings)


def outputs(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        found = model.eval()(x)
    return found if isinstance(found, Tensor) else found.logits


def loss_of(model: nn.Module, x: Tensor = X) -> Tensor:
    found = model(x)
    scores = found if isinstance(found, Tensor) else found.logits
    return F.cross_entropy(scores.flatten(0, 1), X.roll(1, 1).flatten())


def train(model: nn.Module, steps: int = 2, lr: float = 0.5) -> None:
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def assert_saved_and_densified_alike(model: nn.Module, dense: nn.Module, folder: Path) -> None:
    """Check that an artifact, loaded into a dense architecture, and the densified model compute the same."""
    expected = outputs(model)
    roastify.save(model, folder)
    assert torch.equal(outputs(roastify.load(folder, dense)), expected)
    torch.testing.assert_close(outputs(roastify.densify(model)), expected)


def one_pool(model: nn.Module) -> bool:
    """Whether all layers hold the Parameter that the pool has now."""
    pool = pool_of(model)
    held = [each for name, each in model.named_parameters(remove_duplicate=False) if name.endswith(POOL)]
    return len(held) > 1 and all(each is pool.weight for each in held)


# PEFT.


def adapted(model: nn.Module, method: str, **settings: Any) -> Any:
    """Put adapters on a model, with the same values in every model, and different from those that change nothing."""
    peft = pytest.importorskip("peft")
    kind = {"ia3": peft.IA3Config, "adalora": peft.AdaLoraConfig}.get(method, peft.LoraConfig)
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    if method == "ia3":
        settings = {"feedforward_modules": [], **settings}
    elif method == "adalora":
        settings = {"init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "total_step": 4, **settings}
    else:
        settings = {"r": 4, "use_dora": method == "dora", **settings}
    torch.manual_seed(1)
    model = peft.get_peft_model(model, kind(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith(POOL):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


METHODS = {
    "lora": {},
    "lora of embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "lora of all layers": {"target_modules": "all-linear"},
    "dora": {},
    "ia3": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_adapters_train_as_on_the_dense_model_and_load(method: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = converted_llama()
    pool, start = pool_of(model).weight, pool_of(model).weight.detach().clone()
    dense = adapted(roastify.densify(model), method.split()[0], **METHODS[method])
    model = adapted(model, method.split()[0], **METHODS[method])
    assert trainable(model) == trainable(dense) and trainable(model)
    before = outputs(model)
    torch.testing.assert_close(before, outputs(dense))
    for each in (model, dense):
        train(each)
    torch.testing.assert_close(outputs(model), outputs(dense), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(model), before, atol=1e-4)
    # The pool is frozen, and the same one.
    assert pools_in(model) == [pool_of(model)] and pool_of(model).weight is pool
    assert torch.equal(pool, start) and not pool.requires_grad and pool.grad is None
    model.save_pretrained(tmp_path / "adapter")
    roastify.save(converted_llama(), tmp_path / "base")
    again = peft.PeftModel.from_pretrained(roastify.load(tmp_path / "base", llama()), tmp_path / "adapter")
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("operation", ["merge_adapter", "merge_and_unload"])
def test_adapters_are_not_merged_into_the_pool_but_into_dense_weights(method: str, operation: str) -> None:
    model = adapted(converted_llama(), method)
    before, start = outputs(model), pool_of(model).weight.clone()
    with pytest.raises(RoastError, match=r"lives in the shared pool.*roastify\.densify\(model\)"):
        getattr(model, operation)()
    model.unmerge_adapter()
    assert torch.equal(outputs(model), before) and torch.equal(pool_of(model).weight, start)
    dense = roastify.densify(model)
    assert type(dense) is type(model)
    torch.testing.assert_close(outputs(dense), before)
    merged = dense.merge_and_unload()
    torch.testing.assert_close(outputs(merged), before, rtol=1e-4, atol=1e-5)
    assert list(merged.state_dict()) == list(llama().state_dict())


def test_adapters_of_layers_that_stayed_dense_are_merged_and_taken_out_again(tmp_path: Path) -> None:
    plain = converted_llama(exclude=["*.q_proj", "*.v_proj"])
    model = adapted(plain, "lora")
    before = outputs(model)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model), before, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged), before, rtol=1e-4, atol=1e-5)
    assert_saved_and_densified_alike(merged, llama(), tmp_path)


def test_unloaded_disabled_and_deleted_adapters_leave_the_converted_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    expected = outputs(converted_llama())
    model = adapted(converted_llama(), "lora")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    train(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model), expected)
    model.delete_adapter("second")
    plain = model.unload()
    assert torch.equal(outputs(plain), expected)
    assert_saved_and_densified_alike(plain, llama(), tmp_path)


def test_an_artifact_holds_a_models_adapters(tmp_path: Path) -> None:
    model = adapted(converted_llama(), "lora")
    assert_saved_and_densified_alike(model, adapted(llama(), "lora"), tmp_path)


def test_adalora_asks_for_a_frozen_pool_and_then_trains() -> None:
    model = converted_llama()
    with pytest.raises(RoastError, match=r"which is trained as a whole\. Set roast_pool\.weight\.requires_grad"):
        adapted(model, "adalora")
    model = converted_llama().requires_grad_(False)
    dense = adapted(roastify.densify(model), "adalora")
    model = adapted(model, "adalora")
    start = pool_of(model).weight.clone()
    for each in (model, dense):
        train(each, 1)
        each.base_model.update_and_allocate(1)
    torch.testing.assert_close(outputs(model), outputs(dense), rtol=1e-4, atol=1e-5)
    assert torch.equal(pool_of(model).weight, start)


def prompted(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


def tuned_prompt(model: Any) -> Tensor:
    model.train()
    for _ in range(2):
        model.zero_grad()
        model(input_ids=X, labels=X).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.sub_(parameter.grad)
    with torch.no_grad():
        return model.eval()(input_ids=X).logits


@pytest.mark.parametrize("way", ["set by hand", "excluded"])
def test_prompts_are_tuned_if_peft_knows_the_embedding(way: str, tmp_path: Path) -> None:
    """PEFT looks for a Parameter with a row for each word; the pool has none."""
    peft = pytest.importorskip("peft")
    settings = {"exclude": ["model.embed_tokens"] if way == "excluded" else []}
    model = converted_llama(**settings)
    dense = prompted(roastify.densify(model))
    model = prompted(model)
    if way == "set by hand":
        assert model.word_embeddings is None
        model.word_embeddings = model.base_model.get_input_embeddings()
    start = pool_of(model).weight.clone()
    tuned = tuned_prompt(model)
    torch.testing.assert_close(tuned, tuned_prompt(dense), rtol=1e-4, atol=1e-5)
    assert torch.equal(pool_of(model).weight, start) and trainable(model) == trainable(dense)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(converted_llama(**settings), tmp_path)
    again.word_embeddings = again.base_model.get_input_embeddings()
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=X).logits, tuned)


def test_a_layer_to_save_trains_as_a_copy_and_loads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(converted_llama(), "lora", modules_to_save=["lm_head"])
    own = model.base_model.model.lm_head.modules_to_save["default"]
    pool, copied = pools_in(model)[0], own.roast_pool
    assert copied is not pool and copied.weight.requires_grad and not pool.weight.requires_grad
    start, before = pool.weight.clone(), own.weight.detach().clone()
    train(model)
    assert torch.equal(pool.weight, start) and not torch.allclose(own.weight, before)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(converted_llama(), tmp_path / "adapter")
    assert torch.equal(outputs(again), expected)
    torch.testing.assert_close(outputs(roastify.densify(model).merge_and_unload()), expected, rtol=1e-4, atol=1e-5)
    unloaded = model.unload()
    assert unloaded.lm_head is own
    assert_saved_and_densified_alike(unloaded, llama(), tmp_path / "artifact")


# Accelerate.


@pytest.fixture
def other_precision() -> Iterator[None]:
    """Let a test choose a precision: Accelerate keeps the first one for the process."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("other_precision")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_model_is_unwrapped_as_often_as_one_likes(precision: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = converted_net()
    expected = outputs(model)
    prepared = accelerator.prepare(model)
    narrow = outputs(prepared)
    assert torch.equal(outputs(accelerator.unwrap_model(prepared, keep_fp32_wrapper=True)), narrow)
    for _ in range(2):
        prepared = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert prepared is model and torch.equal(outputs(model), expected)
    assert torch.equal(outputs(copy.deepcopy(model)), expected)
    loss_of(model).backward()
    other = converted_net()
    loss_of(other).backward()
    assert torch.equal(model.roast_pool.weight.grad, other.roast_pool.weight.grad)
    assert_saved_and_densified_alike(model, net(), tmp_path)
    dense = roastify.densify(model, inplace=True)
    # Nothing of the conversion is left: the pool's memory is free.
    assert "forward" not in vars(dense) or not hasattr(vars(dense)["forward"].__func__, "pool")


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_offloading_computes_the_same_or_is_refused_by_name(way: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = converted_net()
    expected = outputs(model)
    if way == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    try:
        found = outputs(model)
    except RoastError as error:
        assert "pool" in str(error)
    else:
        assert torch.equal(found, expected)


def test_a_dispatched_model_computes_the_same(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = outputs(converted_net())
    whole = accelerate.dispatch_model(converted_net(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(outputs(whole), expected)
    places = {"roast_pool": "cpu", "words": "cpu", "blocks": "disk", "head": "cpu"}
    parts = accelerate.dispatch_model(converted_net(), places, main_device="cpu", offload_dir=str(tmp_path))
    assert torch.equal(outputs(parts), expected) and torch.equal(outputs(parts), expected)


def test_a_device_map_puts_the_pool_and_its_readers_in_one_place() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = converted_net()
    names = {name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith(POOL)}
    (tied,) = accelerate.utils.find_tied_parameters(model)
    assert set(tied) == names
    sizes = accelerate.utils.compute_module_sizes(model)
    assert sizes[""] == sum(4 * parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", [POOL, f"words.{POOL}"], ids=["model", "layer"])
@pytest.mark.parametrize("way", ["accelerate", "assigned"])
def test_a_pool_that_is_replaced_under_one_name_is_that_of_all_layers(way: str, name: str) -> None:
    model, other = converted_net(), converted_net()
    values = torch.randn(other.roast_pool.weight.shape) / 8
    with torch.no_grad():
        other.roast_pool.weight.copy_(values)
    if way == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        accelerate.utils.set_module_tensor_to_device(model, name, "cpu", value=values)
    else:
        model.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(values)
    assert torch.equal(outputs(model), outputs(other))
    assert torch.equal(model.state_dict()[POOL], values) and one_pool(model)
    assert [each for each, _ in model.named_parameters()] == [each for each, _ in other.named_parameters()]
    train(model, 1)
    train(other, 1)
    assert torch.equal(model.roast_pool.weight, other.roast_pool.weight)


def test_accelerate_loads_a_saved_model(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = converted_net()
    expected = outputs(model)
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path))
    other = converted_net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    accelerate.load_checkpoint_in_model(other, str(tmp_path))
    assert torch.equal(outputs(other), expected)


# transformers.


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_writes_the_pool_once(tied: bool, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = converted_llama(tied)
    train(model, 1)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    found = safetensors.load_file(tmp_path / "model.safetensors")
    # The placeholder stands where transformers, without roastify, would put random numbers.
    assert found.keys() == model.state_dict().keys() | {"model.embed_tokens.weight"}
    assert [name for name in found if "roast_pool" in name] == [POOL, "roast_pool._extra_state"]
    other = converted_llama(tied)
    missing, unexpected = other.load_state_dict(found)
    assert not missing and not unexpected and torch.equal(outputs(other), expected)


@pytest.mark.parametrize(("tied", "size"), [(False, WORDS + 4), (True, WORDS + 4), (True, WORDS - 4)])
def test_a_resized_vocabulary_leaves_the_pool_and_is_saved(tied: bool, size: int, tmp_path: Path) -> None:
    model = converted_llama(tied)
    before = outputs(model)
    model.resize_token_embeddings(size, mean_resizing=False)
    kept = min(size, WORDS)
    torch.testing.assert_close(outputs(model)[..., :kept], before[..., :kept])
    dense = llama(tied)
    dense.resize_token_embeddings(size, mean_resizing=False)
    assert_saved_and_densified_alike(model, dense, tmp_path)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied


def test_recomputed_blocks_give_the_gradient_of_kept_ones() -> None:
    gradients = []
    for recomputed in (False, True):
        model = converted_llama().train()
        if recomputed:
            model.gradient_checkpointing_enable()
        loss_of(model).backward()
        gradients.append(model.roast_pool.weight.grad)
    assert torch.equal(*gradients)


# Torch's own tools.


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.words.weight


class Free(nn.Module):
    """A model with a weight of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / 8)
        self.layer = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x @ self.weight)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))


def flops(model: nn.Module, x: Tensor, trained: bool) -> int:
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trained):
        found = model.train(trained)(x)
        if trained:
            found.square().sum().backward()
    return counter.get_total_flops()


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def untaught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's counter as a new process has it, without the formulas of this package."""
    for operator in [each for each in flop_counter.flop_registry if str(each).startswith("roastify")]:
        monkeypatch.delitem(flop_counter.flop_registry, operator)


@pytest.mark.usefixtures("untaught")
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("build", "x"),
    [(perceptron, rows(5, WIDTH)), (perceptron, rows(500, WIDTH)), (Net, X), (Tied, X), (Free, rows(5, WIDTH))],
    ids=["few rows", "many rows", "words", "tied", "free"],
)
def test_flops_are_those_of_the_dense_model(build: Callable[[], nn.Module], x: Tensor, trained: bool) -> None:
    dense = build()
    model = roastify.convert(dense, 2)
    assert flops(model, x, trained) == flops(dense, x, trained) > 0


@pytest.mark.usefixtures("untaught")
@pytest.mark.parametrize("trained", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("count", [0, 4], ids=["plain", "basis"])
def test_flops_of_convolutions_are_the_dense_models_and_those_of_combining_kernels(count: int, trained: bool) -> None:
    dense = convolutions()
    model = roastify.convert(dense, config=roastify.RoastConfig(ratio=2, kernel_basis=count or "none"))
    kernels = 8 * 16 + 16 * 16
    # The backward pass multiplies twice more: for the coefficients and for the basis.
    combining = 2 * kernels * count * 9 * (3 if trained else 1)
    x = rows(2, 8, 9, 9)
    assert flops(model, x, trained) == flops(dense, x, trained) + combining


def test_a_symbolic_trace_trains_the_same_pool() -> None:
    model = converted_net()
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(outputs(graph), outputs(model))
    loss_of(graph).backward()
    found = model.roast_pool.weight.grad.clone()
    model.zero_grad()
    loss_of(model).backward()
    assert torch.equal(found, model.roast_pool.weight.grad)
    assert pools_in(graph) == [model.roast_pool]


def test_a_jit_trace_computes_the_same_and_says_that_it_is_not_for_training() -> None:
    model = roastify.convert(perceptron(), 2).eval()
    x = rows(5, WIDTH)
    with pytest.warns(UserWarning, match="Use the traced module for inference"):
        traced = torch.jit.trace(model, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_trains_the_pool_as_the_model_does(strict: bool) -> None:
    model = roastify.convert(perceptron(), 2)
    x = rows(5, WIDTH)
    exported = torch.export.export(model, (x,), strict=strict).module()
    (pool,) = [parameter for name, parameter in exported.named_parameters() if name.endswith(POOL)]
    exported(x).square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(pool.grad, pool_of(model).weight.grad)


def test_pruning_before_the_conversion_stays_and_is_made_permanent_in_the_dense_model() -> None:
    dense = net()
    prune.l1_unstructured(dense.head, "weight", 0.5)
    model = roastify.convert(dense, RATIO)
    expected = outputs(model)
    with pytest.raises(
        RoastError, match=r"computed from weight_orig, which lives in the shared pool.*densify\(model\)"
    ):
        prune.remove(model.head, "weight")
    assert torch.equal(outputs(model), expected)
    assert bool((model.head.weight[model.head.weight_mask == 0] == 0).all())
    train(model, 1)
    assert bool((model.head.weight[model.head.weight_mask == 0] == 0).all())
    trained = outputs(model)
    plain = roastify.densify(model)
    prune.remove(plain.head, "weight")
    torch.testing.assert_close(outputs(plain), trained)


@pytest.mark.parametrize("way", ["one", "global"])
def test_pruning_after_the_conversion_is_refused_by_name(way: str) -> None:
    model = converted_net()
    expected, names = outputs(model), list(model.state_dict())
    with pytest.raises(RoastError, match="pool"):
        if way == "one":
            prune.l1_unstructured(model.head, "weight", 0.5)
        else:
            layers = [(block.up, "weight") for block in model.blocks]
            prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.5)
    assert torch.equal(outputs(model), expected) and list(model.state_dict()) == names
    assert not model.head._forward_pre_hooks
    prune.l1_unstructured(model.head, "bias", 0.5)
    prune.remove(model.head, "bias")


def test_dynamic_quantization_says_that_it_leaves_layers_as_they_are() -> None:
    model = converted_net()
    with pytest.warns(UserWarning, match=r"to quantize it, pass roastify\.densify\(model\)"):
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert torch.equal(outputs(quantized), outputs(model))


class Quantized(Tensor):
    """A tensor of another kind, as libraries of quantization put into Parameters."""


def test_a_parameter_of_another_kind_of_tensor_is_refused() -> None:
    model = converted_net()
    expected = outputs(model)
    for layer in (model.words, model.head):
        with pytest.raises(RoastError, match="lives in the shared pool and cannot be assigned a Quantized"):
            layer.weight = nn.Parameter(layer.weight.detach().clone().as_subclass(Quantized))
    assert torch.equal(outputs(model), expected)


def test_an_average_of_a_model_works_on_and_is_saved(tmp_path: Path) -> None:
    model = converted_net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    start = model.roast_pool.weight.detach().clone()
    for _ in range(2):
        train(model, 1)
        average.update_parameters(model)
    assert one_pool(average.module) and average.module.roast_pool is not model.roast_pool
    assert not torch.equal(average.module.roast_pool.weight, start)
    # The first update copies the model.
    assert not torch.equal(average.module.roast_pool.weight, model.roast_pool.weight)
    assert_saved_and_densified_alike(average.module, net(), tmp_path)
    train(average, 1)
    other = AveragedModel(converted_net(), use_buffers=True)
    other.load_state_dict(average.state_dict())
    assert torch.equal(outputs(other), outputs(average))
    torch.testing.assert_close(outputs(roastify.densify(average)), outputs(average))


# Classes with another layout: a base without `__dict__` goes before nn.Module.

_T = typing.TypeVar("_T")


class Kind(abc.ABC, nn.Linear):
    @abc.abstractmethod
    def kind(self) -> str: ...


class Abstract(Kind):
    def kind(self) -> str:
        return "abstract"


class Typed(typing.Generic[_T], nn.Linear):
    pass


class Reading(abc.ABC, nn.Linear):
    """A layer with code of its own, which reads the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.weight.sum()


class Root(abc.ABC, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.layer()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    @abc.abstractmethod
    def layer(self) -> nn.Module: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) @ self.weight


class AbstractRoot(Root):
    def layer(self) -> nn.Module:
        return Abstract(WIDTH, WIDTH)


class TypedRoot(typing.Generic[_T], Root):
    def layer(self) -> nn.Module:
        return Typed[int](WIDTH, WIDTH)


class ReadingRoot(Root):
    def layer(self) -> nn.Module:
        return Reading(WIDTH, WIDTH)


class OfMetaclass(nn.Module, metaclass=abc.ABCMeta):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) @ self.weight


class Callee(typing.Protocol):
    def forward(self, x: Tensor) -> Tensor: ...


class OfProtocol(Callee, nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) @ self.weight


@pytest.mark.parametrize("build", [AbstractRoot, TypedRoot, TypedRoot[int], ReadingRoot, OfMetaclass, OfProtocol])
def test_abstract_and_typed_classes_are_converted_copied_pickled_and_densified(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = build()
    x = rows(3, WIDTH)
    model = roastify.convert(dense, RATIO)
    assert isinstance(model, type(dense)) and isinstance(model.first, type(dense.first))
    expected = outputs(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and torch.equal(outputs(other, x), expected)
        other(x).sum().backward()
        assert other.roast_pool.weight.grad is not None and model.roast_pool.weight.grad is None
    plain = roastify.densify(model)
    assert type(plain) is type(dense) and type(plain.first) is type(dense.first)
    torch.testing.assert_close(outputs(plain, x), expected)
    roastify.save(model, tmp_path)
    assert torch.equal(outputs(roastify.load(tmp_path, build()), x), expected)


def test_classes_that_cannot_be_instantiated_stay_abstract() -> None:
    model = roastify.convert(AbstractRoot(), RATIO)
    assert model.first.kind() == "abstract" and isinstance(model.first, Kind)
    with pytest.raises(TypeError, match="abstract"):
        Kind(2, 2)  # type: ignore[abstract]


# Lightning.


def test_lightning_keeps_a_moving_average_that_is_saved(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning")
        callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = converted_net()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return loss_of(self.net, batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=3,
        callbacks=[callbacks.EMAWeightAveraging(decay=0.5)],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(X.repeat(3, 1)), batch_size=len(X)))
    # By hand: the first update copies the model.
    other = converted_net()
    average: Tensor | None = None
    for _ in range(3):
        train(other, 1)
        weight = other.roast_pool.weight.detach()
        average = weight.clone() if average is None else average.lerp(weight, 0.5)
    assert average is not None
    # At the end of the training, the callback puts the average into the model.
    torch.testing.assert_close(module.net.roast_pool.weight.detach(), average)
    assert one_pool(module.net)
    assert_saved_and_densified_alike(module.net, net(), tmp_path / "artifact")


# Two processes.


@pytest.mark.long
def test_an_optimizer_whose_state_is_split_gives_the_weights_of_one_process(two: Processes) -> None:
    for alone, together in two.run(cases.zero_redundancy):
        assert_same(together, alone)


@pytest.mark.parametrize("way", cases.WRAPS)
def test_fsdp_without_the_pools_owner_is_refused_on_the_first_forward(two: Processes, way: str) -> None:
    """Else every process would train a pool of its own."""
    for message, alike in two.run(cases.wrapped_without_pool, way):
        assert alike, "the processes have different gradients of the pool"
        assert "pool" in message and "fully_shard" in message, message


def test_fsdp_shards_a_new_model_that_has_the_pool(two: Processes) -> None:
    # Only the first process gets the gathered values.
    alone, together = two.run(cases.new_model_with_the_pool)[0]
    assert_same(together, alone)


def test_fsdp_may_shard_every_layer_if_the_model_is_the_last(two: Processes) -> None:
    alone, together = two.run(cases.every_layer_then_root)[0]
    assert_same(together, alone)


def test_distributed_state_dicts_go_from_a_sharded_model_to_another_and_from_a_plain_one(two: Processes) -> None:
    names, (first, second, plain, loaded) = two.run(cases.state_dicts)[0]
    assert names == list(cases.converted().state_dict())
    assert_same(second, first, atol=0.0)
    assert_same(loaded, plain, atol=0.0)


def test_tensor_parallelism_is_refused_and_leaves_the_model_whole(two: Processes) -> None:
    for messages, whole in two.run(cases.tensor_parallel):
        *by_name, row_wise = messages
        assert whole and len(by_name) == 3
        assert all("pool" in message and "densify" in message for message in by_name), messages
        # Torch refuses it itself, before it asks the layer.
        assert "found non-leaf tensor" in row_wise


def test_stages_of_a_pipeline_train_one_pool_if_its_gradient_is_summed(two: Processes) -> None:
    """Each stage has a copy of the pool, as of any tied Parameter."""
    for expected, found in two.run(cases.stages):
        torch.testing.assert_close(found, expected)
