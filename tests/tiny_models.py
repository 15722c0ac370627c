"""Tiny seeded models with real tokenizers: causal Qwen3, Llama, GPT-2, Gemma 3 and Cohere 2, and a RoBERTa.

Norm weights are random, so that states before and after the final norm differ.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

CAUSAL = ("qwen3", "llama", "gpt2")
N_LAYERS = {"qwen3": 4, "llama": 3, "gpt2": 3, "roberta": 2, "gemma3": 4, "cohere2": 4}
HEAD = 32  # smallest head size that vLLM supports on CPUs
POSITIONS = 256
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The beginning of Llama 3's template: it prints the day on which it is rendered.
LLAMA_TEMPLATE = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "Today Date: {{ date_string }}\n" + TEMPLATE
)
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in ("a", "e", "i", "o", "an", "er")]


def words(n: int, seed: int) -> list[str]:
    """`n` generated words."""
    rng = random.Random(seed)
    return ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(n)]


def prompts(n: int, seed: int = 0, longest: int = 40) -> list[str]:
    """`n` different texts of 1 to `longest` generated words."""
    rng, lexicon = random.Random(seed), words(500, seed)
    return [f"{' '.join(rng.choices(lexicon, k=rng.randint(1, longest)))} {row}?" for row in range(n)]


def save_model(kind: str, folder: Path, chat_template: bool | str = False) -> Path:
    """Saves the tiny model `kind` with its tokenizer; returns the folder. `chat_template`: its text; True: TEMPLATE."""
    tokenizer = _tokenizer(wrapped=kind == "roberta")
    if chat_template:
        tokenizer.chat_template = TEMPLATE if chat_template is True else chat_template
    torch.manual_seed(7)
    model = _model(kind, len(tokenizer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "position" not in name and "wpe" not in name:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scale_mlp(folder: Path, block: int, factor: float) -> Path:
    """Multiplies the output of a block's MLP by `factor` in the weights of a saved Llama; returns the folder."""
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.{block}.mlp.down_proj.weight"] *= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _tokenizer(wrapped: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; `wrapped` adds <bos> and <eos> to every text, as encoders do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>"]
    tokenizer.train_from_iterator(
        [" ".join(words(2000, 1))],
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if wrapped:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        cls_token="<bos>",
        sep_token="<eos>",
    )


def _model(kind: str, vocabulary: int) -> PreTrainedModel:
    ids = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    wide = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": N_LAYERS[kind], "num_attention_heads": 4}
    if kind == "qwen3":
        return Qwen3ForCausalLM(
            Qwen3Config(num_key_value_heads=2, head_dim=HEAD, max_position_embeddings=POSITIONS, **wide, **ids)
        )
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(num_key_value_heads=2, head_dim=HEAD, max_position_embeddings=POSITIONS, **wide, **ids)
        )
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=N_LAYERS[kind], n_head=4, n_positions=POSITIONS, **ids))
    if kind == "gemma3":  # every other block has a sliding window shorter than most prompts
        return Gemma3ForCausalLM(
            Gemma3TextConfig(
                num_key_value_heads=2,
                head_dim=HEAD,
                max_position_embeddings=POSITIONS,
                sliding_window=16,
                layer_types=["sliding_attention", "full_attention"] * (N_LAYERS[kind] // 2),
                **wide,
                **ids,
            )
        )
    if kind == "cohere2":  # attention and MLP of a block run in parallel
        return Cohere2ForCausalLM(
            Cohere2Config(
                num_key_value_heads=2,
                head_dim=HEAD,
                max_position_embeddings=POSITIONS,
                sliding_window=16,
                **wide,
                **ids,
            )
        )
    if kind == "roberta":
        return RobertaModel(RobertaConfig(max_position_embeddings=POSITIONS, **wide, **ids), add_pooling_layer=False)
    raise ValueError(f"kind: got {kind!r}, allowed are {', '.join(N_LAYERS)}")
