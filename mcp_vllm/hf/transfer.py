"""A transformers cache to bytes, and back, whole or as what changed since a base.

A cache is a context of named tensors (`layers.N.keys`, `layers.N.values`, `token_ids`), and an
export is a delta between two of these with the state of the layers in front.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mcp_vllm.hf import envelope, library
from mcp_vllm.hf.errors import DamagedCacheError, OtherModelError, UnsupportedCacheError
from mcp_vllm.hf.layers import LayerState, check_tensors, fill, held_tensors, state_of
from mcp_vllm.hf.model_identity import check_same_model, identify, text_config
from mcp_vllm.session.delta import DEFAULT_MAX_BYTES, compress_context, decompress_context
from mcp_vllm.session.fingerprint import Fingerprint

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedConfig, PreTrainedModel
    from typing_extensions import Buffer

    from mcp_vllm.codec.calibration import Calibration

_TOKEN_IDS = "token_ids"


class CachedChat(NamedTuple):
    """A cache, and the tokens of the chat if they were given: integers [batch, token].

    `model.generate(token_ids, past_key_values=cache)` continues it. The tokens are usually one more
    than the cache has seen: the last was sampled, and not yet read.
    """

    cache: Cache
    token_ids: torch.Tensor | None = None


def snapshot(cache: Cache, token_ids: torch.Tensor | None = None) -> CachedChat:
    """The chat as it is now, left alone when the cache goes on: a base for the next export.

    A growing cache shares its tensors with the snapshot until it replaces them; a static cache,
    which writes in place, is copied.
    """
    kept = copy.copy(cache)
    kept.layers = [copy.copy(layer) for layer in cache.layers]
    for number, layer in enumerate(kept.layers):
        if state_of(layer, number).kind in ("static", "static_sliding") and layer.is_initialized:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            layer.cumulative_length = layer.cumulative_length.clone()
    return CachedChat(kept, token_ids)


def export_cache(
    cache: Cache,
    model: PreTrainedModel | PreTrainedConfig,
    *,
    token_ids: torch.Tensor | None = None,
    base: CachedChat | None = None,
    held: CachedChat | None = None,
    codec: str = "lossless",
    calibration: Calibration | None = None,
) -> bytes:
    """The bytes that `import_cache` restores the cache from, on any device it may be on.

    ``base`` is a `snapshot` of what the receiver has already: then only what was added since is
    coded, for sliding windows, too. ``codec``, ``held`` and ``calibration`` are those of
    `compress_context`: after a lossy export, ``held`` is what `import_cache` gave for it.

    Raises UnsupportedCacheError, LibraryError; ArrayError or CodecError of the layers below.
    """
    kind = _kind_of(cache)
    states = _states(cache)
    state = envelope.CacheState(
        model=dict(identify(model).fields),
        cache=kind,
        layers=states,
        has_token_ids=token_ids is not None,
    )
    delta = compress_context(
        _context(base),
        _context(CachedChat(cache, token_ids)),
        codec=codec,
        held=None if held is None else _context(held),
        calibration=calibration,
        first_tokens={
            _names(number)[0]: layer.seen - layer.num_held for number, layer in enumerate(states)
        },
    )
    return envelope.pack(state, delta)


def import_cache(
    data: Buffer,
    model: PreTrainedModel | PreTrainedConfig,
    *,
    base: CachedChat | None = None,
    device: torch.device | str | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    accept: Collection[str] = (),
    calibration: Calibration | None = None,
) -> CachedChat:
    """The cache of an export, bit for bit (unless a lossy codec was asked for), in new tensors.

    ``base`` is what the export was made against, and is not changed. ``device`` is the model's
    unless given, the CPU for a configuration. ``max_bytes`` bounds the tensors, ``accept`` names
    the lossy codecs that will do, ``calibration`` is what two of them need: see
    `decompress_context`.

    Raises OtherModelError, naming the field, if the model is not the one that filled the cache;
    DamagedCacheError or DeltaError if the bytes are not intact or the base is not the right one;
    LibraryError.
    """
    state, delta = envelope.unpack(data)
    check_same_model(Fingerprint(state.model), model)
    cache = _empty_cache(state, model)
    context = decompress_context(
        _context(base), delta, max_bytes=max_bytes, accept=accept, calibration=calibration
    )
    token_ids = context.pop(_TOKEN_IDS, None)
    if (token_ids is not None) != state.has_token_ids:
        raise DamagedCacheError("the token ids are missing, or nobody asked for them")
    _check_context(state, context, max_bytes)
    target = device if device is not None else getattr(model, "device", "cpu")
    for number, layer in enumerate(state.layers):
        if layer.seen:
            keys, values = (context[name].to(target) for name in _names(number))
            _grow(cache, number)
            fill(cache.layers[number], layer, keys, values)
    return CachedChat(cache, token_ids)


def _kind_of(cache: Cache) -> Literal["dynamic", "static"]:
    library_caches = library.cache_utils()
    if type(cache) is library_caches.DynamicCache:
        return "dynamic"
    if type(cache) is library_caches.StaticCache:
        return "static"
    raise UnsupportedCacheError(
        f"a {type(cache).__name__} cannot be exported; use a DynamicCache or a StaticCache"
    )


def _states(cache: Cache) -> list[LayerState]:
    return [state_of(layer, number) for number, layer in enumerate(cache.layers)]


def _names(number: int) -> tuple[str, str]:
    return f"layers.{number}.keys", f"layers.{number}.values"


def _context(chat: CachedChat | None) -> dict[str, Any]:
    """The tensors of a chat by name, on the CPU."""
    if chat is None:
        return {}
    context: dict[str, Any] = {}
    _kind_of(chat.cache)
    for number, layer in enumerate(chat.cache.layers):
        held = held_tensors(layer, state_of(layer, number), number)
        if held is not None:
            context.update(zip(_names(number), (each.detach().cpu() for each in held), strict=True))
    if chat.token_ids is not None:
        context[_TOKEN_IDS] = chat.token_ids.detach().cpu()
    return context


def _empty_cache(state: envelope.CacheState, model: Any) -> Any:
    """A cache whose layers are of the kinds that the export has."""
    library_caches, config = library.cache_utils(), text_config(model)
    wanted = [(layer.kind, layer.capacity) for layer in state.layers]
    if state.cache == "static":
        longest = max((layer.capacity for layer in state.layers), default=0)
        cache = library_caches.StaticCache(config=config, max_cache_len=longest)
    else:
        cache = library_caches.DynamicCache(config=config)
        made_without_config = all(kind == "full" for kind, _ in wanted) and any(cache.is_sliding)
        if not wanted or (made_without_config and len(wanted) == len(cache.layers)):
            return library_caches.DynamicCache()
    found = [(each.kind, each.capacity) for each in _states(cache)]
    if found != wanted:
        raise OtherModelError(
            f"the cache has {len(wanted)} layers of other kinds or windows than this model's "
            f"{len(found)}; load the model it was made with"
        )
    return cache


def _check_context(state: envelope.CacheState, context: Mapping[str, Any], max_bytes: int) -> None:
    """Whether the tensors are those that the layers' states ask for, no more and no less."""
    expected = [number for number, layer in enumerate(state.layers) if layer.seen]
    names = {name for number in expected for name in _names(number)}
    if names != context.keys():
        raise DamagedCacheError(
            f"layers and tensors disagree: {sorted(names ^ context.keys())[:4]}"
        )
    allocated = 0
    for number in expected:
        layer = state.layers[number]
        keys, values = (context[name] for name in _names(number))
        check_tensors(layer, keys, values, number)
        # A static layer allocates its whole capacity, whatever it holds.
        size = keys.nbytes + values.nbytes
        allocated += size // layer.num_held * max(layer.num_held, layer.capacity)
    if state.cache == "static" and allocated > max_bytes:
        raise DamagedCacheError(
            f"the static cache takes {allocated} bytes; at most {max_bytes} are allowed"
        )


def _grow(cache: Any, number: int) -> None:
    """A cache that was made without a configuration gets its layers one by one."""
    while len(cache.layers) <= number:
        cache.layers.append(cache.layer_class_to_replicate())
