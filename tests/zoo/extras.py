"""Models of timm, torchvision and torch-geometric, where those are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from zoo.examine import Entry

TIMM = (
    "resnet18 resnetv2_50 regnety_002 efficientnet_b0 mobilenetv3_small_100 convnext_atto convnextv2_atto densenet121 "
    "vgg11 inception_v3 xception41 rexnet_100 hrnet_w18_small ghostnet_100 repvgg_a0 nfnet_l0 vit_tiny_patch16_224 "
    "deit_tiny_distilled_patch16_224 beit_base_patch16_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 "
    "cait_xxs24_224 crossvit_tiny_240 coat_lite_tiny pit_ti_224 levit_128s mixer_s32_224 gmlp_ti16_224 resmlp_12_224 "
    "poolformer_s12 maxvit_tiny_tf_224 volo_d1_224 xcit_nano_12_p16_224 tnt_s_patch16_224 twins_pcpvt_small "
    "visformer_tiny mobilevit_xxs edgenext_xx_small efficientformer_l1 eva02_tiny_patch14_224"
).split()
TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2 "
    "mobilenet_v3_small regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t "
    "swin_v2_t vgg11 vit_b_32 wide_resnet50_2 deeplabv3_mobilenet_v3_large fcn_resnet50 "
    "lraspp_mobilenet_v3_large r3d_18 mvit_v2_s raft_small "
).split()
GEOMETRIC = "GCN GraphSAGE GIN GAT PNA EdgeCNN".split()


def entries() -> Iterator[Entry]:
    """Yield the models of the packages that are there."""
    if importlib.util.find_spec("timm"):
        yield from (
            Entry(f"timm {name}", "timm", _timm(name), lambda name=name: _images(_timm_size(name))) for name in TIMM
        )
    if importlib.util.find_spec("torchvision"):
        yield from (
            Entry(f"torchvision {name}", "torchvision", _torchvision(name), lambda name=name: _pictures(name))
            for name in TORCHVISION
        )
    if importlib.util.find_spec("torch_geometric"):
        yield from (Entry(f"geometric {name}", "geometric", _geometric(name), _graph) for name in GEOMETRIC)


def _images(size: tuple[int, ...]) -> tuple[torch.Tensor]:
    return (torch.randn(2, *size, generator=torch.Generator().manual_seed(3)),)


def _pictures(name: str) -> tuple[torch.Tensor, ...]:
    """Return what a model of torchvision takes: pictures, a pair of them, or films."""
    if name.startswith("raft"):
        return _images((3, 128, 128)) * 2
    if name in ("r3d_18", "mvit_v2_s"):
        return _images((3, 16, 224, 224) if name == "mvit_v2_s" else (3, 8, 64, 64))
    return _images((3, 299, 299) if name == "inception_v3" else (3, 224, 224))


def _timm(name: str) -> Any:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=10)

    return build


def _timm_size(name: str) -> tuple[int, ...]:
    import timm

    return timm.get_pretrained_cfg(name).input_size


def _torchvision(name: str) -> Any:
    def build() -> nn.Module:
        import torchvision

        # Both would initialise their weights by drawing from a truncated normal on the CPU, which takes half a minute.
        own: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        if name.startswith(("deeplabv3", "fcn", "lraspp")):
            # Otherwise torchvision downloads the backbone's weights.
            own = {"weights_backbone": None}
        return torchvision.models.get_model(name, weights=None, **own)

    return build


def _geometric(name: str) -> Any:
    def build() -> nn.Module:
        import torch_geometric.nn.models as models

        own = {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": torch.tensor([0, 1, 2])}
        return getattr(models, name)(32, 48, 2, 10, **(own if name == "PNA" else {}))

    return build


def _graph() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(20, 32, generator=generator), torch.randint(20, (2, 60), generator=generator)
