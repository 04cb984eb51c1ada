"""transformers' architectures with small random configs: every task family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from zoo.examine import Entry
from zoo.shrink import tiny_config

# Model types by family; types that the installed transformers does not know are skipped.
FAMILIES = {
    "encoder": (
        "albert bert big_bird camembert canine convbert data2vec-text deberta deberta-v2 distilbert electra ernie "
        "eurobert flaubert fnet ibert longformer megatron-bert mobilebert modernbert mpnet mra nomic_bert "
        "nystromformer rembert roberta roberta-prelayernorm roformer splinter squeezebert xlm xlm-roberta "
        "xlm-roberta-xl yoso "
    ),
    "decoder": (
        "apertus arcee biogpt bitnet bloom cohere cohere2 cpmant ctrl cwm diffllama doge ernie4_5 exaone4 gemma "
        "gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese granite helium jais2 llama "
        "ministral3 mistral modernbert-decoder moshi mpt nanochat olmo olmo2 olmo3 openai-gpt opt persimmon phi "
        "phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 vaultgemma xglm "
    ),
    "encoder-decoder": (
        "bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp pegasus "
        "pegasus_x plbart t5 t5gemma umt5 "
    ),
    "mixture of experts": (
        "afmoe cohere2_moe deepseek_v4 ernie4_5_moe exaone_moe flex_olmo glm4_moe gpt_oss granitemoe "
        "granitemoeshared hy_v3 jetmoe llama4_text minimax minimax_m2 mixtral nllb-moe olmoe phimoe qwen2_moe "
        "qwen3_moe qwen3_vl_moe_text solar_open switch_transformers "
    ),
    "state space and recurrent": ("falcon_h1 falcon_mamba lfm2 mamba olmo_hybrid rwkv "),
    "vision": (
        "aimv2_vision_model beit clip_vision_model data2vec-vision deit dinov2 dinov2_with_registers dinov3_vit "
        "dpt glpn ijepa imagegpt internvl_vision levit mlcd mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 pixio "
        "pixtral poolformer pvt_v2 radio sam_vision_model segformer siglip_vision_model swiftformer textnet vit "
        "vit_mae vit_msn vitdet yolos "
    ),
    "audio": (
        "audio-spectrogram-transformer data2vec-audio glmasr_encoder hubert mimi_encoder "
        "moonshine qwen2_audio_encoder sew sew-d unispeech unispeech-sat voxtral_encoder wav2vec2 "
        "wav2vec2-conformer wavlm whisper "
    ),
    "multimodal": (
        "aimv2 altclip aria aya_vision blip bridgetower chinese_clip clip clipseg flava fuyu gemma3 git got_ocr2 "
        "groupvit idefics2 idefics3 internvl kosmos-2.5 layoutlm llava llava_next llava_onevision markuplm mllama "
        "owlv2 owlvit paligemma phi4_multimodal qwen2_audio qwen3_vl siglip smolvlm tapas vilt visual_bert voxtral "
    ),
    "time series": ("patchtsmixer patchtst timesfm2_5 "),
}
# In eval mode RWKV divides the weights of deeper blocks in place, for half precision. Weights that a model writes to
# stay dense, and here they are too many for ratio 10, so the division is switched off.
_OWN_SETTINGS: dict[str, dict[str, Any]] = {"rwkv": {"rescale_every": 0}}

# Whole models with the heads of their tasks.
HEADS = (
    "AlbertForMaskedLM BartForConditionalGeneration BertForMaskedLM BertForSequenceClassification "
    "BloomForCausalLM DebertaV2ForMaskedLM DistilBertForQuestionAnswering ElectraForPreTraining "
    "FalconMambaForCausalLM Gemma2ForCausalLM GPT2LMHeadModel GPT2DoubleHeadsModel GPTNeoXForCausalLM "
    "LlamaForCausalLM LlamaForTokenClassification MambaForCausalLM MarianMTModel MistralForCausalLM "
    "MixtralForCausalLM MobileBertForMaskedLM OPTForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM "
    "RobertaForMaskedLM SwitchTransformersForConditionalGeneration "
    "T5ForConditionalGeneration ViTForImageClassification ViTForMaskedImageModeling Wav2Vec2ForCTC "
    "WhisperForConditionalGeneration XGLMForCausalLM "
).split()


def entries() -> Iterator[Entry]:
    """Yield every architecture listed here that the installed transformers has."""
    for family, types in FAMILIES.items():
        for model_type in types.split():
            entry = base_model(model_type, family)
            if entry:
                yield entry
    import transformers

    for name in HEADS:
        model_class = getattr(transformers, name, None)
        if model_class is not None:
            yield Entry(name, "with a head", _builder(model_class, model_class.config_class, {}))


def unlisted() -> Iterator[Entry]:
    """Yield every other architecture of the installed transformers: models that nobody has looked at."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    listed = {model_type for types in FAMILIES.values() for model_type in types.split()}
    for model_type in sorted(set(MODEL_MAPPING_NAMES) - listed):
        entry = base_model(model_type, "unlisted")
        if entry:
            yield entry


def base_model(model_type: str, family: str) -> Entry | None:
    """Return a type's base model, or None if the installed transformers has none."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    names = MODEL_MAPPING_NAMES.get(model_type)
    model_class = getattr(transformers, names if isinstance(names, str) else names[0], None) if names else None
    if model_class is None:
        return None
    return Entry(
        model_type, family, _builder(model_class, CONFIG_MAPPING[model_type], _OWN_SETTINGS.get(model_type, {}))
    )


def _builder(model_class: Any, config_class: Any, own: dict[str, Any]) -> Any:
    def build() -> nn.Module:
        return model_class(tiny_config(config_class, **own))

    return build
