"""Networks of others, small and with random weights, each with a batch of inputs.

From timm, Hugging Face's transformers, torch itself, torch_geometric, peft and Lightning's demos.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "Entry", "hugging_face", "timm_network", "tokens"]


class Entry(NamedTuple):
    """A network of the zoo.

    Args:
        family: Architecture that it belongs to.
        make: Function that makes it.
        batch: Function that makes the named arguments of its forward pass.
    """

    family: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Mapping[str, Any]]


NETWORKS: dict[str, Entry] = {}


def _add(
    name: str,
    family: str,
    make: Callable[[], nn.Module],
    batch: Callable[[], Mapping[str, Any]],
) -> None:
    NETWORKS[name] = Entry(family, make, batch)


# ----------------------------------------------------------------------------------------- timm


class _Torchvision(MetaPathFinder, Loader):
    """Stands for torchvision, of which timm imports names that its networks do not use."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "torchvision":
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Anything(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Members(name, (), {})


class _Members(type):
    """A class that has every member, such as an enumeration of interpolations."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name

    def __iter__(cls) -> Iterator[str]:
        return iter(())


def timm_network(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        stand_in = _Torchvision()
        if find_spec("torchvision") is None:
            sys.meta_path.append(stand_in)
        import timm

        if stand_in in sys.meta_path:  # other libraries ask whether it is there
            sys.meta_path.remove(stand_in)
            for module in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[module]
        network: nn.Module = timm.create_model(name, num_classes=10, **settings)
        return network

    return make


def _images(size: int, channels: int = 3) -> Callable[[], Mapping[str, Any]]:
    return lambda: {"x": torch.randn(4, channels, size, size)}


for _name, _family, _size, _settings in (
    ("test_resnet", "ResNet", 32, {}),
    ("resnet10t", "ResNet (zero gamma)", 32, {"zero_init_last": True}),
    ("test_vit", "ViT", 32, {"img_size": 32}),
    ("test_vit3", "ViT (layer scale)", 32, {"img_size": 32}),
    ("test_efficientnet", "EfficientNet", 32, {}),
    ("test_efficientnet_evos", "EfficientNet (EvoNorm)", 32, {}),
    ("test_convnext", "ConvNeXt", 32, {}),
    ("test_nfnet", "NFNet (weight standardisation)", 32, {}),
    ("test_byobnet", "BYOBNet", 32, {}),
    ("test_mambaout", "MambaOut", 32, {}),
    ("mobilenetv3_small_050", "MobileNetV3", 32, {}),
    ("mobileone_s0", "MobileOne", 32, {}),
    ("lcnet_035", "LCNet", 32, {}),
    ("ghostnet_050", "GhostNet", 32, {}),
    ("regnetx_002", "RegNet", 32, {}),
    ("densenet121", "DenseNet", 32, {"growth_rate": 8, "block_config": (2, 2, 2)}),
    ("gmlp_ti16_224", "gMLP", 64, {"img_size": 64}),
    ("mobilevit_xxs", "MobileViT", 64, {}),
    ("edgenext_xx_small", "EdgeNeXt", 64, {}),
    ("levit_128s", "LeViT", 224, {}),
    ("xcit_nano_12_p16_224", "XCiT", 64, {"img_size": 64, "depth": 2}),
    ("swin_tiny_patch4_window7_224", "Swin", 64,
     {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)}),
    ("crossvit_tiny_240", "CrossViT", 240, {}),
    ("convit_tiny", "ConViT", 64, {"img_size": 64, "depth": 4}),
    ("dla46x_c", "DLA", 64, {}),
    ("res2net50_14w_8s", "Res2Net", 32, {"layers": (1, 1, 1, 1)}),
):  # fmt: skip
    _add(_name, _family, timm_network(_name, **_settings), _images(_size))


# --------------------------------------------------------------------------------- Hugging Face


def tokens(**more: Any) -> Callable[[], Mapping[str, Any]]:
    return lambda: {"input_ids": torch.randint(5, 90, (2, 12)), **more}


def hugging_face(model: str, config: str | None = None, **settings: Any) -> Callable[[], nn.Module]:
    """Make a network from a configuration alone, with random weights."""

    def make() -> nn.Module:
        import transformers

        name = config or model.partition("For")[0].removesuffix("Model") + "Config"
        network: nn.Module = getattr(transformers, model)(getattr(transformers, name)(**settings))
        return network

    return make


_SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}
_DECODER: dict[str, Any] = _SMALL | {"num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 8}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_IMAGE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_SPEECH: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8),
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0,
}  # fmt: skip

for _model, _family, _settings in (
    ("BertForSequenceClassification", "BERT", _SMALL),
    ("RobertaForMaskedLM", "RoBERTa", _SMALL | {"pad_token_id": 0}),
    ("AlbertForMaskedLM", "ALBERT", _SMALL | {"embedding_size": 16}),
    ("ElectraForSequenceClassification", "ELECTRA", _SMALL | {"embedding_size": 16}),
    ("DebertaV2ForMaskedLM", "DeBERTa",
     _SMALL | {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 16}),
    ("MobileBertForMaskedLM", "MobileBERT",
     _SMALL | {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}),
    ("LlamaForCausalLM", "Llama", _DECODER),
    ("Qwen3ForCausalLM", "Qwen3", _DECODER),
    ("Gemma2ForCausalLM", "Gemma", _DECODER),
    ("Phi3ForCausalLM", "Phi-3", _DECODER),
    ("FalconForCausalLM", "Falcon", _SMALL | {"ffn_hidden_size": 64}),
    ("GPTNeoXForCausalLM", "GPT-NeoX", _SMALL),
    ("OPTForCausalLM", "OPT", _SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ("BloomForCausalLM", "BLOOM",
     {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    ("MixtralForCausalLM", "Mixtral", _DECODER | _EXPERTS),
    ("GptOssForCausalLM", "GPT-OSS", _DECODER | _EXPERTS),
    ("Qwen3MoeForCausalLM", "Qwen3-MoE", _DECODER | _EXPERTS | {"moe_intermediate_size": 24}),
    ("MambaForCausalLM", "Mamba",
     {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
):  # fmt: skip
    _add(_model, _family, hugging_face(_model, **_settings), tokens())

_add("GPT2LMHeadModel", "GPT-2",
     hugging_face("GPT2LMHeadModel", "GPT2Config", vocab_size=100, n_embd=32, n_layer=2, n_head=4,
                   n_positions=16), tokens())  # fmt: skip
_add("DistilBertForMaskedLM", "DistilBERT",
     hugging_face("DistilBertForMaskedLM", vocab_size=100, dim=32, hidden_dim=48, n_layers=2,
                   n_heads=4, max_position_embeddings=16), tokens())  # fmt: skip
_add("T5ForConditionalGeneration", "T5",
     hugging_face("T5ForConditionalGeneration", vocab_size=100, d_model=32, d_kv=8, d_ff=48,
                   num_layers=2, num_heads=4),
     lambda: {"input_ids": torch.randint(5, 90, (2, 12)),
              "decoder_input_ids": torch.randint(5, 90, (2, 6))})  # fmt: skip
_add("BartForConditionalGeneration", "BART",
     hugging_face("BartForConditionalGeneration", vocab_size=100, d_model=32, encoder_layers=1,
                   decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
                   encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=16),
     tokens())  # fmt: skip
_add("ViTForImageClassification", "ViT (Hugging Face)",
     hugging_face("ViTForImageClassification", **_IMAGE),
     lambda: {"pixel_values": torch.randn(2, 3, 32, 32)})  # fmt: skip
_add("SegformerForSemanticSegmentation", "SegFormer",
     hugging_face("SegformerForSemanticSegmentation", num_encoder_blocks=2, depths=[1, 1],
                   sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[3, 3], strides=[2, 2],
                   num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16),
     lambda: {"pixel_values": torch.randn(2, 3, 32, 32)})  # fmt: skip
_add("CLIPVisionModel", "CLIP", hugging_face("CLIPVisionModel", **_IMAGE),
     lambda: {"pixel_values": torch.randn(2, 3, 32, 32)})  # fmt: skip
_add("Wav2Vec2ForCTC", "Wav2Vec2",
     hugging_face("Wav2Vec2ForCTC", num_feat_extract_layers=2, **_SPEECH),
     lambda: {"input_values": torch.randn(2, 1600)})  # fmt: skip
_add("WhisperForConditionalGeneration", "Whisper",
     hugging_face("WhisperForConditionalGeneration", vocab_size=100, d_model=32, encoder_layers=1,
                   decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
                   encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=20,
                   max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                   decoder_start_token_id=3),
     lambda: {"input_features": torch.randn(2, 16, 40),
              "decoder_input_ids": torch.randint(5, 90, (2, 6))})  # fmt: skip


# ---------------------------------------------------------------------------------------- torch


class Recurrent(nn.Module):
    """An embedding, a recurrent network and a classifier of its last state."""

    def __init__(self, kind: Callable[..., nn.Module], **settings: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.rnn = kind(16, 24, batch_first=True, **settings)
        with torch.no_grad():
            size = self.rnn(torch.zeros(1, 1, 16))[0].shape[-1]
        self.head = nn.Linear(size, 10)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.rnn(self.embedding(x))[0]
        logits: Tensor = self.head(states[:, -1])
        return logits


class Bags(nn.Module):
    """Words without order, and a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(200, 16)
        self.pair, self.head = nn.Bilinear(16, 16, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        words = self.bag(x)
        logits: Tensor = self.head(self.pair(words, words).relu())
        return logits


class WeightNormed(nn.Module):
    """Convolutions with weight norm and a head with spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        from torch.nn.utils.parametrizations import spectral_norm, weight_norm

        self.convs = nn.Sequential(
            weight_norm(nn.Conv1d(8, 16, 3, padding=1)),
            nn.ReLU(),
            weight_norm(nn.Conv1d(16, 16, 3, padding=1, groups=4)),
            nn.ReLU(),
        )
        self.up = weight_norm(nn.ConvTranspose1d(16, 8, 4, 2))
        self.head = spectral_norm(nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.up(self.convs(x)).mean(2))
        return logits


class Attention(nn.Module):
    """A transformer of torch's own layers, encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.transformer = nn.Transformer(16, 4, 1, 1, 32, batch_first=True)
        self.head = nn.Linear(16, 50)

    def forward(self, x: Tensor) -> Tensor:
        words = self.embedding(x)
        logits: Tensor = self.head(self.transformer(words, words))
        return logits


class UNet(nn.Module):
    """Down, up, and a concatenation across."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 3, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        across = self.norm(self.first(x)).relu()
        up = self.up(self.down(across).relu())
        image: Tensor = self.last(torch.cat([across, up], 1))
        return image


class Standardised(nn.Module):
    """A convolution that standardises its weight in the forward pass, as in NFNets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 3, 3, 3))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), True), self.weight.std((1, 2, 3), keepdim=True)
        maps = nn.functional.conv2d(x, (self.weight - mean) / (std + 1e-5), padding=1).relu()
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


class Experts(nn.Module):
    """A router and four fused experts, each token through the best one."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.up = nn.Parameter(0.2 * torch.randn(4, 24, 16))
        self.down = nn.Parameter(0.2 * torch.randn(4, 16, 24))

    def forward(self, x: Tensor) -> Tensor:
        gates, best = self.router(x).softmax(-1).max(-1)
        hidden = torch.einsum("ni,noi->no", x, self.up[best]).relu()
        outputs: Tensor = torch.einsum("ni,noi->no", hidden, self.down[best]) * gates[:, None]
        return outputs


class Adversaries(nn.Module):
    """A generator and its discriminator, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16))
        self.discriminator = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, x: Tensor) -> Tensor:
        judged: Tensor = self.discriminator(self.generator(x))
        return judged


def _words() -> Mapping[str, Any]:
    return {"x": torch.randint(0, 50, (4, 9))}


_add("LSTM", "LSTM", lambda: Recurrent(nn.LSTM), _words)
_add(
    "LSTM, projected",
    "LSTM",
    lambda: Recurrent(nn.LSTM, proj_size=12, bidirectional=True, num_layers=2),
    _words,
)
_add("GRU", "GRU", lambda: Recurrent(nn.GRU, num_layers=2), _words)
_add("RNN", "RNN", lambda: Recurrent(nn.RNN), _words)
_add("Bags", "EmbeddingBag", Bags, _words)
_add("Attention", "nn.Transformer", Attention, _words)
_add("WeightNormed", "Weight norm", WeightNormed, lambda: {"x": torch.randn(4, 8, 16)})
_add("UNet", "U-Net", UNet, _images(16))
_add("Standardised", "Weight standardisation", Standardised, _images(12))
_add("Experts", "Mixture of experts", Experts, lambda: {"x": torch.randn(12, 16)})
_add("Adversaries", "GAN, manual optimization", Adversaries, lambda: {"x": torch.randn(12, 8)})


# ------------------------------------------------------------------------- graphs, adapters, demos


class Graph(nn.Module):
    """Two layers of torch_geometric on a ring of nodes."""

    def __init__(self, kind: str, **settings: Any) -> None:
        super().__init__()
        from torch_geometric import nn as geometric

        layer = getattr(geometric, kind)
        self.first, self.second = layer(16, 24, **settings), layer(24, 10, **settings)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        nodes: Tensor = self.second(self.first(x, edges).relu(), edges)
        return nodes


def _ring() -> Mapping[str, Any]:
    nodes = torch.arange(12)
    return {"x": torch.randn(12, 16), "edges": torch.stack([nodes, nodes.roll(1)])}


for _kind in ("GCNConv", "GATConv", "SAGEConv", "GraphConv"):
    _add(_kind, f"{_kind} (PyG)", lambda kind=_kind: Graph(kind), _ring)  # type: ignore[misc]


def _lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    base: Any = NETWORKS["BertForSequenceClassification"].make()
    network: nn.Module = get_peft_model(base, LoraConfig(r=8, target_modules=["query", "value"]))
    return network


def _demo() -> nn.Module:
    from lightning.pytorch.demos import Transformer

    return Transformer(vocab_size=50, ninp=32, nhead=4, nhid=48, nlayers=2)


_add("LoRA", "LoRA (peft)", _lora, tokens())
_add(
    "Demo",
    "Lightning's Transformer",
    _demo,
    lambda: {"inputs": torch.randint(0, 50, (2, 8)), "target": torch.randint(0, 50, (2, 8))},
)
