"""Gemma's tokenizer in Hugging Face form, built from the vocabulary inside a GGUF file.

The vocabulary is a SentencePiece BPE model: a piece's score is minus its merge rank. Merges are
the ways to cut a piece into two pieces of the vocabulary, best score first. Gemma must see `<bos>`
first or its answers are nonsense, so the post-processor always adds it.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

_SPACE = "▁"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

# The weights are those of the base model, which knows no chat format: a transcript of questions and
# answers is what it continues sensibly. `<bos>` is here too because chat requests are tokenised
# without special tokens.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set text = message['content'] if message['content'] is string \
else message['content'] | map(attribute='text') | join -%}
{%- if message['role'] == 'assistant' -%}
{{- 'Answer: ' + text | trim + '\\n\\n' -}}
{%- elif message['role'] == 'user' -%}
{{- 'Question: ' + text | trim + '\\n' -}}
{%- else -%}
{{- text | trim + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Answer:' -}}
{%- endif -%}
"""


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The tokenizer that GGUF `metadata` describes: `<bos>` first, no space before the text."""
    kinds = metadata["tokenizer.ggml.token_type"]
    pieces = [piece.replace(" ", _SPACE) for piece in metadata["tokenizer.ggml.tokens"]]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    scores = {
        piece: score
        for piece, score, kind in zip(pieces, metadata["tokenizer.ggml.scores"], kinds, strict=True)
        if kind == _NORMAL
    }
    bos_id = metadata["tokenizer.ggml.bos_token_id"]
    bos = pieces[bos_id]
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges(scores),
            unk_token=pieces[metadata["tokenizer.ggml.unknown_token_id"]],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(piece, special=True, normalized=False)
            for piece, kind in zip(pieces, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    # Runs of spaces, tabs and newlines and HTML tags are matched whole, on normalised text.
    tokenizer.add_tokens(
        [
            AddedToken(piece, special=False, normalized=True)
            for piece, kind in zip(pieces, kinds, strict=True)
            if kind == _USER_DEFINED
        ]
    )
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    merges = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(left, right) for left, right in cuts if left in scores and right in scores]
    return merges


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, loadable by AutoTokenizer and by vLLM."""
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"), pretty=False)
    tokens = metadata["tokenizer.ggml.tokens"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["gemma3.context_length"],
        "chat_template": metadata.get("tokenizer.chat_template", CHAT_TEMPLATE),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
