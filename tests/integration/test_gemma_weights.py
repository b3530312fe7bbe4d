"""The converted Gemma-3-270m is the model it claims to be: mean loss on a known sentence."""

import pytest

from mcp_vllm.demo.weights import ensure_gemma

pytestmark = pytest.mark.engine

MIT_LICENSE_OPENING = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software "
    'and associated documentation files (the "Software"), to deal in the Software without '
    "restriction, including without limitation the rights to use, copy, modify, merge, publish, "
    "distribute, sublicense, and/or sell copies of the Software"
)
LOSS_TOLERANCE = 0.03


def test_mean_loss_is_low_with_bos_and_high_without() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = ensure_gemma(progress=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = {}
    for with_bos in (True, False):
        ids = tokenizer(
            MIT_LICENSE_OPENING, add_special_tokens=with_bos, return_tensors="pt"
        ).input_ids
        assert (ids[0, 0] == 2) == with_bos
        with torch.no_grad():
            losses[with_bos] = model(ids, labels=ids).loss.item()
    print(f"mean loss {losses[True]:.3f} with <bos>, {losses[False]:.3f} without")
    assert losses[True] == pytest.approx(1.22, abs=LOSS_TOLERANCE)
    assert losses[False] == pytest.approx(4.49, abs=LOSS_TOLERANCE)
